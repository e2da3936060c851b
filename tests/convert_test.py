"""What the command line of `coca_jax.convert` says. What it writes is tested in run_test.py and interop/."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import pytest


def test_help_says_what_there_is(run_python: Callable[..., Any]) -> None:
    done = run_python(["-m", "coca_jax.convert", "--help"], devices=1)
    for flag in ("--input", "--output", "--to", "--step", "--name", "--tokenizer", "overwrite"):
        assert flag in done.stdout
    assert "<coca_jax|open_clip|stablehlo|onnx>" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input=PATH is needed"),
        (["--input=a"], "--output=PATH is needed"),
        (["--input={here}", "--output={here}/."], "is --input: name another folder"),
        (["--input={here}/a", "--output={here}", "--overwrite"], "lies in --output={here}: name another folder"),
        (["--input=a", "--output=b", "c"], "unknown argument 'c'"),
        (["--input=a", "--output=b", "--to=torch"], "should be one of <coca_jax|open_clip|stablehlo|onnx>"),
        (["--input=a", "--output=b", "--ouput=c"], "Unknown command line flag 'ouput'"),
        (["--input={here}/nothing", "--output={here}/out"], "nothing: no such file or directory"),
    ],
)
def test_wrong_arguments_get_one_line(
    tmp_path: pathlib.Path, run_python: Callable[..., Any], arguments: list[str], message: str
) -> None:
    command = [argument.format(here=tmp_path) for argument in arguments]
    done = run_python(["-m", "coca_jax.convert", *command], devices=1, check=False)
    assert done.returncode == 1
    assert message.format(here=tmp_path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("raised", "output", "code", "said"),
    [
        ("KeyboardInterrupt", "out", 130, "stopped: out is as it was"),
        ("KeyboardInterrupt", "gs://b/out", 130, "stopped: gs://b/out may be there in part: write it again with"),
        (
            "PermissionError(13, 'Permission denied', 'weights')",
            "out",
            1,
            "error: [Errno 13] Permission denied: 'weights'",
        ),
    ],
)
def test_an_end_before_the_end_is_said(
    run_python: Callable[..., Any], raised: str, output: str, code: int, said: str
) -> None:
    program = f"""
        import sys
        from coca_jax import convert

        def ends():
            raise {raised}

        convert._convert = ends
        sys.argv = ["convert", "--input=in", "--output={output}"]
        convert.cli()
    """
    done = run_python(program, devices=1, check=False)
    assert done.returncode == code and done.stderr.startswith(said), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_format_has_a_writer(run_python: Callable[..., Any]) -> None:
    # In a process of its own: the flags of two programs cannot be defined in one. ONNX has a test with its packages.
    code = "from coca_jax import convert; print({to: callable(convert._writer(to)) for to in convert.FORMATS[:-1]})"
    done = run_python(["-c", code], devices=1)
    assert done.stdout.strip() == "{'coca_jax': True, 'open_clip': True, 'stablehlo': True}"


@pytest.mark.skipif(bool(importlib.util.find_spec("jax2onnx")), reason="jax2onnx is installed: nothing is missing")
def test_a_missing_package_is_said_before_anything_is_read(
    tmp_path: pathlib.Path, run_python: Callable[..., Any]
) -> None:
    command = ["-m", "coca_jax.convert", f"--input={tmp_path}/nothing", f"--output={tmp_path}/out", "--to=onnx"]
    done = run_python(command, devices=1, check=False)
    assert done.returncode == 1 and 'pip install "coca_jax[onnx]"' in done.stderr
