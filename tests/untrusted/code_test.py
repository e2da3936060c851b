"""Nothing that is read is ever run: what would run it is called nowhere in the package."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

# Modules that make objects of any class, or code, of bytes; and those that start programs or load libraries.
MODULES = (
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "joblib", "marshal", "copyreg", "jsonpickle"),
    *("yaml", "ruamel", "code", "codeop", "runpy", "imp", "pty", "ctypes", "cffi"),
)
CALLS = ("eval", "exec", "compile", "__import__", "execfile")
# Beside what libraries call so: re.compile, lowered.compile() of JAX.
METHODS = ("os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn")
# Modules that are imported by a name which the program itself holds: the file, and what it says.
IMPORTS = {
    "coca_jax/__init__.py": "name, of the table of public names",
    "coca_jax/data/vocabulary.py": "package, tokenizers or ftfy",
}
# A recipe is a program, and --config=FILE says to run it: that is ml_collections' DEFINE_config_file, in these alone.
RECIPES = ("coca_jax/main.py", "coca_jax/plan/__main__.py", "coca_jax/evaluate/__main__.py")
# Programs that are started, with arguments that are not data's.
PROCESSES = {
    "coca_jax/plan/compiled.py": "this package's own module, in a process with another kind of device",
    "coca_jax/supervise.py": "coca_jax.main, with the arguments of its own command line",
}
# Libraries that are loaded: the process's own C library, a function of it with numbers that the program holds; and the
# libtiff that lies in Pillow's wheel, which is told to write nothing to the terminal.
LIBRARIES = dict.fromkeys(("coca_jax/compiler.py", "coca_jax/data/images/plugins.py", "coca_jax/peers.py"), "ctypes")


def calls(source: str, file: str = "") -> Iterator[str]:
    """What is in a file that must not be, a line each."""
    for node in ast.walk(ast.parse(source, file)):
        line = f"{file}:{getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import):
            names = [n.name for n in node.names if n.name.split(".")[0] in MODULES and n.name != LIBRARIES.get(file)]
            yield from (line + f"imports {name}" for name in names)
            if file not in PROCESSES:
                yield from (line + "imports subprocess" for n in node.names if n.name.split(".")[0] == "subprocess")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in (*MODULES, *(() if file in PROCESSES else ("subprocess",))):
                yield line + f"imports {node.module}"
        elif isinstance(node, ast.Call):
            yield from (line + problem for problem in _call(node, file))
        elif isinstance(node, ast.Attribute) and node.attr == "DEFINE_config_file" and file not in RECIPES:
            yield line + "runs a recipe"


def _call(node: ast.Call, file: str) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in CALLS:
        yield f"calls {name}"
    if name in METHODS or last in ("exec_module", "load_module"):
        yield f"calls {name}"
    if last == "load" and "torch" in name and given.get("weights_only") != "True":
        yield f"calls {name} without weights_only=True"
    of_numpy = last in ("load", "read_array") and name.split(".")[0] in ("np", "numpy")
    if of_numpy and given.get("allow_pickle") != "False":
        yield f"calls {name} without allow_pickle=False"
    elif given.get("allow_pickle", "False") != "False":
        yield f"calls {name} with allow_pickle={given['allow_pickle']}"
    if given.get("trust_remote_code", "False") != "False":
        yield f"calls {name} with trust_remote_code"
    if last == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)) and file not in IMPORTS:
        yield f"imports a module by a name that may come from data: {ast.unparse(node)}"


def _files() -> list[pathlib.Path]:
    return sorted((REPOSITORY / "coca_jax").rglob("*.py"))


def test_nothing_runs_what_it_reads() -> None:
    files = _files()
    assert len(files) > 100
    names = {file.relative_to(REPOSITORY).as_posix(): file for file in files}
    found = [problem for name, file in names.items() for problem in calls(file.read_text(encoding="utf-8"), name)]
    assert not found, "\n" + "\n".join(found)
    assert {*IMPORTS, *RECIPES, *PROCESSES, *LIBRARIES} <= set(names), (
        "an exception is for a file that is not there any more"
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "exec(text)",
        "x = compile(text, '', 'exec')",
        "__import__(name)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.lib.format.read_array(file)",
        "import yaml",
        "importlib.import_module(values['class'])",
        "os.system(text)",
        "import subprocess",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "config_flags.DEFINE_config_file('config')",
        "import ctypes",
    ],
)
def test_it_would_be_seen(source: str) -> None:
    assert len(list(calls(source, "coca_jax/new.py"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "re.compile(text)",
        "importlib.import_module('torch')",
        "np.load(file, allow_pickle=False)",
        "torch.load(file, weights_only=True)",
        "json.load(file)",
    ],
)
def test_what_is_allowed(source: str) -> None:
    assert not list(calls(source, "coca_jax/new.py"))
