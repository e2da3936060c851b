"""What is said on the terminal, and what is not."""

from __future__ import annotations

import logging
import pathlib

import pytest
from absl import logging as absl_logging

from coca_jax import commandline


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
