"""The command line as its user would break it: each time an exit status and one line that says what to do."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Callable

import pytest

from tests import pairs

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

DEBUG = "--config=configs/debug.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With a set of pictures, a vocabulary, a file where a folder is wanted, and two recipes with mistakes."""
    folder = tmp_path_factory.mktemp("main")
    pairs.write(folder)
    (folder / "file").write_text("not a folder\n")
    start = "from coca_jax.config import default\n\n\ndef get_config():\n    c = default()\n"
    (folder / "typo.py").write_text(start + "    c.optimizer.peak_rl = 1e-3\n    return c\n")
    (folder / "syntax.py").write_text(start + "    c.steps = \n    return c\n")
    (folder / "wrong_type.py").write_text(start + "    c.steps = 'many'\n    return c\n")
    return folder


def refused(run_python: RunPython, arguments: list[str], devices: int = 1) -> str:
    """The one line that main says before it exits with a status that is not 0."""
    done = run_python(["-m", "coca_jax.main", *arguments], devices=devices, check=False)
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1, said
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    return said


# These are refused before JAX is loaded.
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["--config=configs/NAME.py is needed", "launch/quickstart"]),
        (["--workdir={folder}/run"], ["--config=configs/NAME.py is needed"]),
        ([DEBUG], ["--workdir=FOLDER is needed"]),
        (["--config=configs/nothing.py"], ["--config=configs/nothing.py: no such file"]),
        (["--config={folder}/typo.py"], ["typo.py:6", 'Did you mean "peak_lr"']),
        (["--config={folder}/syntax.py"], ["syntax.py, line 6"]),
        (["--config={folder}/wrong_type.py"], ["wrong_type.py:6", "steps", "many"]),
        ([DEBUG, "--config.model.image.widht=3"], ["config.model.image.widht", "near it: config.model.image.width"]),
        ([DEBUG, "--config.steps=many"], ["--config.steps=many", "int"]),
        ([DEBUG, "--workdri=x"], ["workdri", "workdir"]),
        ([DEBUG, "--steps=5"], ["'steps': it is a key of the configuration, --config.steps"]),
        ([DEBUG, "--workdir={folder}/run", "train"], ["unknown argument 'train'", "--config.key=value"]),
        ([DEBUG, "--workdir={folder}/run", "--mode=test"], ["--mode=test", "train|evaluate"]),
        (
            [DEBUG, "--workdir={folder}/run", "--config.model.image.heads=5"],
            ["config.model.image.heads=5", "config.model.image.width=32", "near it: 2, 4, 8"],
        ),
    ],
    ids=[
        *("no arguments", "no config", "no workdir", "no such config", "typo in a recipe", "syntax of a recipe"),
        *(
            "type in a recipe",
            "unknown key",
            "type of a key",
            "unknown flag",
            "key without config",
            "no flag",
            "unknown mode",
            "heads",
        ),
    ],
)
def test_flags_and_recipes(
    run_python: RunPython, folder: pathlib.Path, arguments: list[str], wanted: list[str]
) -> None:
    said = refused(run_python, [argument.format(folder=folder) for argument in arguments])
    assert [part for part in wanted if part not in said] == [], said
    assert not (folder / "run").exists()


# These need JAX, or the files.
@pytest.mark.parametrize(
    ("arguments", "wanted", "devices"),
    [
        (
            [DEBUG, "--workdir={folder}/run", "--config.batch_size=30"],
            ["config.batch_size=30", "4 shards", "near it: 28, 32"],
            4,
        ),
        # A model of a billion parameters: only its shapes are thought of, on whatever machine.
        (
            ["--config=configs/coca_large.py", "--workdir={folder}/run", "--config.mesh.fsdp=1"],
            ["config.data.train is empty", "--config.data.train=", "coca_jax.data.prepare"],
            1,
        ),
        (
            [DEBUG, "--workdir={folder}/run", "--config.data.train=array_record:{folder}/nothing-*.array_record"],
            ["nothing-*.array_record: no file matches", "config.data.train"],
            1,
        ),
        (
            [
                *("--config=tests/tiny_recipe.py", "--workdir={folder}/run"),
                *("{data}", "--config.data.tokenizer=/no.model"),
            ],
            ["tokenizer /no.model: no such file", "config.data.tokenizer"],
            1,
        ),
        (
            [*("--config=tests/tiny_recipe.py", "--workdir={folder}/file"), *("{data}", "{tokenizer}")],
            ["--workdir={folder}/file", "cannot be made"],
            1,
        ),
    ],
    ids=["batch over devices", "no data set", "no data file", "no tokenizer", "a file for a workdir"],
)
def test_devices_and_files(
    run_python: RunPython, folder: pathlib.Path, arguments: list[str], wanted: list[str], devices: int
) -> None:
    values = {
        "folder": folder,
        "data": f"--config.data.train=array_record:{folder}/shapes.array_record",
        "tokenizer": f"--config.data.tokenizer={folder}/shapes.model",
    }
    said = refused(run_python, [argument.format(**values) for argument in arguments], devices)
    assert [part for part in wanted if part.format(**values) not in said] == [], said
    assert not (folder / "run").exists()


def test_help(run_python: RunPython) -> None:
    done = run_python(["-m", "coca_jax.main", "--help"])
    assert not done.stderr
    for wanted in (
        "--config=configs/quickstart.py",
        "--workdir",
        "--mode: <train|evaluate>",
        "--config.optimizer.peak_lr",
        "loss: lambda_con * contrastive",
        "peak_lr=0.0008",
    ):
        assert wanted in done.stdout
    part = run_python(["-m", "coca_jax.main", "--help=loss"])
    assert part.stdout.startswith("loss: ") and "lambda_cap=2.0" in part.stdout and "peak_lr" not in part.stdout
    assert "near it: " in refused(run_python, ["--help=lambda_kap"], 1)
