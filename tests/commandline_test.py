"""What is said on the terminal, and what is not."""

from __future__ import annotations

import logging
import os
import pathlib
import subprocess
import sys

import pytest
from absl import logging as absl_logging

from coca_jax import commandline
from tests import conftest, pairs


@pytest.mark.parametrize(
    "file, level, said",
    [
        (commandline.__file__, logging.INFO, True),
        # The quickstart's environment lies in the clone, which is called coca_jax.
        ("/home/me/coca_jax/.venv/lib/python3.11/site-packages/jax/_src/xla_bridge.py", logging.WARNING, False),
        (f"{pathlib.Path(commandline.__file__).parents[1]}/.venv/lib/library.py", logging.WARNING, False),
        ("/usr/lib/library.py", logging.ERROR, True),
    ],
)
def test_of_libraries_only_errors_are_said(monkeypatch: pytest.MonkeyPatch, file: str, level: int, said: bool) -> None:
    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler, "filters", [])
    commandline.quiet()
    record = logging.LogRecord("name", level, file, 1, "a note", None, None)
    assert bool(handler.filter(record)) is said


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_without_the_letters_ends_nothing(tmp_path: pathlib.Path, encoding: str) -> None:
    source = tmp_path / "一 picture"
    command = [sys.executable, "-m", "coca_jax.data.prepare", "describe", f"folder:{source}"]
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": str(conftest.REPOSITORY)}
    source.mkdir()
    (source / "one.png").write_bytes(pairs.png(pairs.picture("red", "dot")))
    (source / "metadata.csv").write_text("file_name,caption\none.png,\u4e00 dot \u00e9\n", encoding="utf-8")
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    said = done.stdout.decode(encoding)
    assert done.returncode == 0 and "UnicodeEncodeError" not in done.stderr.decode(encoding), done
    assert ("一 dot é" if encoding == "utf-8" else r"\u4e00 dot") in said
