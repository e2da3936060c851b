"""The notebooks: what is committed of them, and every cell of them run in a Jupyter kernel.

The slow test runs them on a smaller model with few steps (COCA_JAX_NOTEBOOK_FLAGS); the soak test as a reader does, in
minutes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import pathlib
import re
import subprocess
import tomllib
from collections.abc import Callable
from typing import Any

import nbformat
import numpy as np
import pytest
from flax import traverse_util

from coca_jax.stored import read_weights
from coca_jax.train.metrics import read_lines

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ("finetune", "explore")  # in the order in which they run: the second opens what the first has trained

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

EXECUTE = """
import nbclient, nbformat
notebook = nbformat.read({path!r}, as_version=4)
client = nbclient.NotebookClient(notebook, timeout={timeout}, kernel_name="python3")
try:
    client.execute(cwd={folder!r})
finally:
    nbformat.write(notebook, {output!r})
"""


@functools.cache
def read(name: str) -> Any:
    return nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook: Any, cell_id: str) -> str:
    """What a cell printed."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def numbers(pattern: str, text: str) -> list[float]:
    """Those that the pattern's groups find in its one match."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} is not once in:\n{text}"
    return [float(x) for x in (found[0] if isinstance(found[0], tuple) else found)]


# ---------------------------------------------------------------------------------------------------------------------
# What is committed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_a_notebook_of_today_without_anything_of_a_machine(name: str) -> None:
    notebook, path = read(name), REPOSITORY / "notebooks" / f"{name}.ipynb"
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), f"{cell.id} holds outputs: clear them"
            assert not cell.metadata
    content = path.read_text(encoding="utf-8")
    assert len(content) < 300_000
    assert not re.search(r"/(home|root|Users|tmp|content)/", content)
    cells = notebook.cells
    for before, cell in itertools.pairwise(cells):
        assert "markdown" in (before.cell_type, cell.cell_type) or cell.id == "imports", f"{cell.id} has no prose"
    assert max(cell.source.count("\n") for cell in cells) < 40  # a cell is seen at once


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_it_imports_and_names_is_there(name: str) -> None:
    imported: list[str] = []
    for node in itertools.chain(*(ast.walk(ast.parse(source)) for source in code(read(name)))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
                imported.append(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                imported.append(f"{node.module}.{alias.name}")
    assert len(imported) > 10
    # A training is started as a command; what a notebook imports is open to any program.
    assert not {"coca_jax.run", "coca_jax.main", "coca_jax.train.loop"} & set(imported)
    named = [path for cell in read(name).cells for path in re.findall(r"(?:configs|docs)/[\w/]+\.\w+", cell.source)]
    assert len(named) > 3
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []


def test_one_address_and_one_beginning() -> None:
    """The git address that the notebooks install from is the project's own, or a blank where the project names none."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository", "")
    for name in NOTEBOOKS:
        (line,) = re.findall(r'^REPOSITORY = "(.*)"  # @param', code(read(name))[0], re.MULTILINE)
        assert line == address
    for cell_id in ("install", "model"):  # each notebook stands alone: what both need stands in both
        first, second = (cell.source for name in NOTEBOOKS for cell in read(name).cells if cell.id == cell_id)
        assert first == second


# ---------------------------------------------------------------------------------------------------------------------
# Run


def execute(run_python: RunPython, folder: pathlib.Path, flags: str, timeout: int) -> dict[str, Any]:
    """Runs the notebooks in a folder, where they leave `runs/`; each with its outputs."""
    done = {}
    for name in NOTEBOOKS:
        output = folder / f"{name}.ipynb"
        program = EXECUTE.format(
            path=str(REPOSITORY / "notebooks" / output.name), timeout=timeout, folder=str(folder), output=str(output)
        )
        env = {"COCA_JAX_NOTEBOOK_FLAGS": flags}
        places = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
        env |= {place: str(folder / "jupyter" / place) for place in places}
        run_python(program, devices=1, env=env, cwd=folder, timeout=timeout)
        done[name] = nbformat.read(output, as_version=4)
        assert all(cell.execution_count for cell in done[name].cells if cell.cell_type == "code")
    return done


def flat(path: pathlib.Path) -> dict[str, np.ndarray]:
    return traverse_util.flatten_dict(read_weights(path).params, sep="/")


def check(done: dict[str, Any], folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What holds however few the steps are; the evaluations before and after fine-tuning."""
    outputs = [output for name in NOTEBOOKS for cell in done[name].cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 10
    runs = folder / "runs"
    (pretrained,) = runs.glob("pretrained_*")  # the second notebook opened what the first trained
    assert "complete" in said(done["explore"], "model")
    trained, tuned = flat(pretrained), flat(runs / "finetuned")
    assert trained.keys() == tuned.keys()
    assert not any(np.array_equal(trained[path], tuned[path]) for path in tuned if path.endswith("kernel"))
    exported, foreign = flat(runs / "exported"), flat(runs / "for_open_clip")
    assert exported.keys() == foreign.keys() == tuned.keys()
    for path, value in tuned.items():
        np.testing.assert_array_equal(exported[path], value, err_msg=path)
        np.testing.assert_array_equal(foreign[path], value, err_msg=path)
    (difference,) = numbers(r"NumPy alone: features differ by (\S+) at most", said(done["finetune"], "export-numpy"))
    assert difference < 1e-4
    for cell in ("export-open-clip", "export-stablehlo"):
        assert "captions are the same: True" in said(done["finetune"], cell)
    first, last = (line for line in read_lines(runs / "finetuned" / "metrics.jsonl") if "loss" not in line)
    (loss,) = (key for key in last if key.endswith("/caption_loss"))
    assert last[loss] < first[loss] - 0.2  # of held-out pictures, nats: captions begin with words of their own
    (difference,) = numbers(r"NNX and .*: features differ by (\S+) at most", said(done["explore"], "nnx"))
    assert difference < 1e-4
    return dict(first), dict(last)


@pytest.mark.slow
def test_run_from_top_to_bottom(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    small = ("steps=8", "batch_size=32", "model.image.depth=1", "optimizer.name=adamw")  # a moment to compile
    flags = " ".join(f"--config.{flag}" for flag in small)
    check(execute(run_python, tmp_path, flags, timeout=400), tmp_path)


@pytest.mark.soak
def test_teach_something(run_python: RunPython, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader runs them: what they show is above chance, by far."""
    monkeypatch.delenv("XLA_FLAGS")  # the compiler's passes pay in minutes of training
    done = execute(run_python, tmp_path, flags="", timeout=1800)
    first, last = check(done, tmp_path)
    (split,) = (key.removesuffix("/caption_loss") for key in last if key.endswith("/caption_loss"))
    for way in ("image_to_text", "text_to_image"):
        # Before, in words that it did not learn from; after, it did.
        assert first[f"{split}/{way}/r10"] > 1.5 * first[f"{split}/chance/r10"]
        assert last[f"{split}/{way}/r10"] > 2 * last[f"{split}/chance/r10"]
    (recall,) = numbers(r"image_to_text .*r10 (\S+)", said(done["explore"], "retrieval"))
    (chance,) = numbers(r"chance .*r10 (\S+)", said(done["explore"], "retrieval"))
    assert recall > 5 * chance
    right, among = numbers(r"(\d+) of (\d+) pictures get their own word", said(done["explore"], "zero-shot"))
    assert right > 2 * among / 8
