"""Which room may import which. The table is the contract; docs/architecture.md says why."""

from __future__ import annotations

import ast
import pathlib
import subprocess
from collections.abc import Callable, Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# A room of coca_jax, and the rooms beside itself that it may import. Everything may import `config`, which imports
# nothing, but for `sharding`, which is told sizes and paths and needs no configuration.
_BELOW_RUN = (
    *("config", "sharding", "distributed", "data", "model", "losses"),
    *("generate", "apply", "evaluate", "train", "interop", "plan"),
)
ROOMS: dict[str, tuple[str, ...]] = {
    "config": (),
    "sharding": (),
    "peers": (),
    "distributed": ("peers",),
    "chips": (),
    "cache": (),
    "compiler": ("cache",),
    "commandline": ("config",),
    "parent": (),
    "supervise": ("parent",),
    "data": ("config", "cache", "parent"),
    "data.prepare.__main__": ("data", "commandline"),
    "model": ("config", "sharding"),
    "losses": ("config", "sharding", "model"),
    "generate": ("config", "model"),
    "apply": ("config", "sharding", "data", "model", "losses", "generate"),
    "evaluate": ("config", "data", "generate"),
    "evaluate.__main__": ("config", "commandline", "compiler", "evaluation"),  # flags alone
    "train": ("config", "sharding", "chips", "distributed", "peers", "data", "model", "losses"),
    "interop": ("config", "data", "model", "train.state"),
    "plan": (
        *("config", "commandline", "compiler", "chips", "parent", "sharding", "model", "train"),
        *("data.records", "interop", "stored"),  # of the checkpoint that a run begins with, its model
    ),
    "stored": ("config", "data", "interop", "model", "train"),  # weights, whatever wrote them
    "start": ("config", "distributed", "data", "interop", "train", "stored"),  # what a run begins from
    "evaluator": ("config", "sharding", "distributed", "data", "apply", "evaluate", "train"),
    "evaluation": (
        *("config", "commandline", "sharding", "distributed", "data", "evaluate", "evaluator", "interop", "train"),
        "stored",
    ),
    "run": (
        *("config", "commandline", "sharding", "distributed", "data", "evaluate", "evaluator", "start", "supervise"),
        *("train", "train.loop", "peers"),
    ),
    "main": ("config", "commandline", "compiler", "run"),
    "pictures": ("data",),
    "caption": (
        "config",
        "commandline",
        "compiler",
        "data",
        "generate",
        "interop",
        "train.checkpoint",
        "pictures",
        "pretrained",
    ),
    "embed": ("config", "commandline", "compiler", "data", "interop", "train.checkpoint", "pictures", "pretrained"),
    # What the page answers, and the page; flags open what it is made of.
    "demo": (
        *("config", "commandline", "compiler", "data", "evaluate", "interop", "train.checkpoint"),
        *("pictures", "pretrained"),
    ),
    "checkpoint": ("config", "commandline", "train.checkpoint"),
    "convert": ("config", "commandline", "compiler", "data", "interop", "train.checkpoint", "stored"),
    "pretrained": (*_BELOW_RUN, "stored"),  # load()
    "__init__": (*_BELOW_RUN, "pretrained"),  # the public surface
    "configs": ("config",),  # the recipes, beside the package
}
# A part of a room that is closed even to its own room: it must be named above to be imported.
CLOSED = ("train.loop",)

FORBIDDEN = dict.fromkeys(("torch", "tensorflow"), "the project runs without it")
# Run against libraries that are made of these, in an environment of its own; and files that only PyTorch can read.
MAY_IMPORT_TORCH = ("tests/peers/", "coca_jax/interop/torch_files.py", "benchmarks/open_clip_", "benchmarks/peers.py")
# In all that a user runs. Tests may: they send things through pickle as Grain does to its worker processes.
FORBIDDEN_OUTSIDE_TESTS = dict.fromkeys(
    ("pickle", "_pickle", "cloudpickle", "dill", "shelve"), "a pickle runs the code it holds"
)


def _python_files(root: pathlib.Path, *folders: str) -> list[pathlib.Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def _imports(file: pathlib.Path, root: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a file: `from a.b import c` is `a.b.c`."""
    package = file.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def _within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def _may_import(file: str, room: str, target: str) -> bool:
    """Whether a file (its name inside coca_jax, e.g. `train.step`) of a room may import a target, named alike."""
    for part in CLOSED:
        if _within(target, part):
            return part in ROOMS[room] or _within(file, part)
    return any(_within(target, allowed) for allowed in (room, *ROOMS[room]))


def violations(root: pathlib.Path) -> list[str]:
    """One line for each import that the table does not allow."""
    found = []
    for path in _python_files(root, "coca_jax", "configs"):
        parts = path.relative_to(root).with_suffix("").parts
        file = ".".join(parts[1:] if parts[0] == "coca_jax" else parts)
        room = file if file in ROOMS else file.split(".")[0]
        where = path.relative_to(root)
        if room not in ROOMS:
            found.append(
                f"{where}: no room {room!r} in the table of tests/imports_test.py, which has {', '.join(ROOMS)}"
            )
            continue
        for line, name in _imports(path, root):
            if not _within(name, "coca_jax"):
                continue
            target = name.removeprefix("coca_jax").lstrip(".") or "__init__"
            if not _may_import(file, room, target):
                allowed = ", ".join((room, *ROOMS[room])) if ROOMS[room] else f"{room} alone, nothing else of coca_jax"
                closed = "".join(f"; {part} only where it is named" for part in CLOSED if _within(target, part))
                found.append(f"{where}:{line}: imports {name}; allowed in {room}: {allowed}{closed}")
    return found


def forbidden(root: pathlib.Path) -> list[str]:
    """One line for each import of a module that the file may not import."""
    found = []
    for path in _python_files(root, "coca_jax", "configs", "tests", "benchmarks", "launch"):
        where = path.relative_to(root)
        if str(where).startswith(MAY_IMPORT_TORCH):
            continue
        banned = FORBIDDEN if where.parts[0] == "tests" else FORBIDDEN | FORBIDDEN_OUTSIDE_TESTS
        for line, name in _imports(path, root):
            if (top := name.split(".")[0]) in banned:
                found.append(f"{where}:{line}: imports {name}: {banned[top]}")
    return found


def test_imports_go_one_way() -> None:
    assert _python_files(REPOSITORY, "coca_jax")
    found = violations(REPOSITORY)
    assert not found, "\n" + "\n".join(found)


def test_nothing_imports_what_is_forbidden() -> None:
    found = forbidden(REPOSITORY)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        (
            "coca_jax/config/rules.py",
            "from coca_jax import sharding",
            "imports coca_jax.sharding; allowed in config: config alone",
        ),
        ("coca_jax/data/images.py", "from coca_jax.model import coca", "allowed in data: data, config, cache"),
        (
            "coca_jax/model/coca.py",
            "def f():\n    import coca_jax.train.step",
            "coca.py:2: imports coca_jax.train.step",
        ),
        ("coca_jax/model/coca.py", "from .. import losses", "imports coca_jax.losses"),
        ("coca_jax/model/coca.py", "import coca_jax", "imports coca_jax; allowed in model"),
        ("coca_jax/data/images.py", "import importlib\nimportlib.import_module('coca_jax.losses')", "images.py:2"),
        ("coca_jax/train/step.py", "from coca_jax.train import loop", "train.loop only where it is named"),
        ("coca_jax/train/step.py", "from coca_jax.evaluate import suite", "imports coca_jax.evaluate.suite"),
        ("coca_jax/pretrained.py", "from .train.loop import run", "imports coca_jax.train.loop.run"),
        (
            "coca_jax/interop/a.py",
            "from coca_jax.train.step import train_step",
            "imports coca_jax.train.step.train_step",
        ),
        ("coca_jax/plan/search.py", "from coca_jax.train import loop", "train.loop only where it is named"),
        (
            "coca_jax/main.py",
            "from coca_jax.train import loop",
            "imports coca_jax.train.loop; allowed in main: main, config, commandline, compiler, run",
        ),
        ("coca_jax/pretrained.py", "from coca_jax import run", "imports coca_jax.run"),
        ("coca_jax/helpers.py", "", "no room 'helpers'"),
        ("configs/base.py", "from coca_jax import main", "imports coca_jax.main; allowed in configs: configs, config"),
    ],
)
def test_a_violation_is_found_and_explained(tmp_path: pathlib.Path, file: str, source: str, reason: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert [reason in line for line in violations(tmp_path)] == [True], violations(tmp_path)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("coca_jax/main.py", "from coca_jax import run"),
        ("coca_jax/run.py", "from coca_jax.train import loop"),
        (
            "coca_jax/train/loop.py",
            "from coca_jax.train import step\nfrom .loop import run\nfrom coca_jax import losses",
        ),
        ("coca_jax/plan.py", "from coca_jax.train import state\nfrom coca_jax.train.state import TrainState"),
        ("coca_jax/data/__init__.py", "from . import images\nfrom coca_jax import config\nimport coca_jaxtra"),
        ("coca_jax/__init__.py", "from coca_jax.pretrained import load"),
        ("configs/base.py", "from coca_jax import config"),
    ],
)
def test_what_the_table_allows_is_not_a_violation(tmp_path: pathlib.Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []


def test_a_forbidden_import_is_found(tmp_path: pathlib.Path) -> None:
    source = "import tensorflow_datasets\ndef f():\n    from tensorflow.io import gfile\n    import pickle as p\n"
    for folder in ("coca_jax", "configs", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(source)
    assert [line.rsplit(": ", 1)[0] for line in forbidden(tmp_path)] == [
        *("coca_jax/a.py:3: imports tensorflow.io.gfile", "coca_jax/a.py:4: imports pickle"),
        *("configs/a.py:3: imports tensorflow.io.gfile", "configs/a.py:4: imports pickle"),
        "tests/a.py:3: imports tensorflow.io.gfile",
    ]


# Packages that cost seconds or gigabytes. matplotlib and tensorflow_datasets are imported where they are used.
_HEAVY = ["jax", "flax", "tensorflow", "torch", "tensorflow_datasets", "matplotlib", "cv2", "grain", "orbax", "optax"]


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [
        ("coca_jax", _HEAVY),
        ("coca_jax.main", _HEAVY),  # `--help` answers at once
        ("coca_jax.checkpoint", _HEAVY),
        ("coca_jax.convert", _HEAVY),
        ("coca_jax.caption", _HEAVY),
        ("coca_jax.embed", _HEAVY),
        ("coca_jax.demo.__main__", [*_HEAVY, "gradio"]),
        ("coca_jax.run", ["tensorflow", "torch", "tensorflow_datasets"]),
    ],
)
def test_importing_loads_no_more_than_needed(run_python: RunPython, module: str, not_loaded: list[str]) -> None:
    done = run_python(
        f"""
        import sys
        import {module} as module
        print(module.__file__)
        print(*[name for name in {not_loaded} if name in sys.modules])
        """
    )
    file, loaded = done.stdout.splitlines()[-2:]
    assert pathlib.Path(file).is_relative_to(REPOSITORY / "coca_jax")
    assert not loaded, f"import {module} loads {loaded}"
