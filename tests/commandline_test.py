"""What is said on the terminal, and what is not."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from absl import logging as absl_logging

from coca_jax import commandline
from coca_jax.config import printing
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


@pytest.mark.parametrize(("folder", "said"), [("orbax/checkpoint/_src", False), ("mine", True)])
def test_tasks_of_orbax_that_fail_are_not_printed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: str, said: bool
) -> None:
    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler, "filters", [])
    commandline.quiet()

    async def fail() -> None:
        raise ValueError("No space left on device")

    async def forget() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task

    fail.__code__ = fail.__code__.replace(co_filename=f"/lib/{folder}/serialization.py")
    asyncio.run(forget())
    gc.collect()
    (record,) = caplog.records
    assert "never retrieved" in record.getMessage() and bool(handler.filter(record)) is said


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


# Run where the first import of JAX is the moment at which Ctrl-C is pressed; JAX drops it, as its own callbacks do.
PRESSED = """
import importlib.abc, os, runpy, signal, sys

class Pressing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "{last}":
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    pass
            except KeyboardInterrupt:
                pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has ignored
sys.meta_path.insert(0, Pressing())
sys.argv = {arguments!r}
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["coca_jax.main", "--config=configs/debug.py", "--workdir={here}/run"], "jax"),
        (["coca_jax.caption", "{here}", "--checkpoint={here}/no", "--output={here}/o.jsonl"], "jax"),
        (["coca_jax.embed", "{here}", "--checkpoint={here}/no", "--output={here}/o.jsonl"], "jax"),
        (["coca_jax.evaluate", "--checkpoint={here}/no", "--output={here}/out"], "jax"),
        (["coca_jax.convert", "--input={here}/no", "--output={here}/out"], "jax"),
        (["coca_jax.convert", "--input={here}/no", "--output={here}/out"], "coca_jax.stored"),
        (["coca_jax.checkpoint", "list", "{here}"], "jax"),
        (["coca_jax.data.prepare", "describe", "{here}"], "grain"),
        pytest.param(
            *(["coca_jax.demo", "--checkpoint={here}/no"], "jax"),
            marks=pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="the demo needs gradio"),
        ),
    ],
)
def test_ctrl_c_while_libraries_are_loaded_is_a_line(
    tmp_path: pathlib.Path, run_python: Callable[..., Any], arguments: list[str], last: str
) -> None:
    filled = [argument.format(here=tmp_path) for argument in arguments]
    done = run_python(["-c", PRESSED.format(last=last, arguments=filled)], devices=1, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_that_is_ignored_stays_ignored_and_is_heard_again_afterwards(run_python: Callable[..., Any]) -> None:
    program = """
        import os, signal, sys
        from coca_jax import commandline

        for handler in (signal.SIG_IGN, signal.default_int_handler):
            signal.signal(signal.SIGINT, handler)
            with commandline.starting():
                if handler == signal.SIG_IGN:
                    os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is handler

        def main(argv):
            os.kill(os.getpid(), signal.SIGINT)

        commandline.run(main)
    """
    done = run_python(program, devices=1, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_what_came_with_data_is_printed_escaped_by_whoever_prints_it(run_python: Callable[..., Any]) -> None:
    """Written to a terminal as they are, such texts set its title, hide lines or show a name backwards."""
    done = run_python(
        """
        import sys
        from absl import logging
        import tqdm
        from coca_jax import commandline
        commandline.printable()
        commandline.printable()  # once more changes nothing
        text = "a\\x1b]0;title\\x07 \\x9b31m \\u202egpj.exe \\u200b \\ufeff x\\ry \\x7f"
        print(text)
        logging.error("%s", text)
        for _ in tqdm.tqdm(range(1), desc=text):
            tqdm.tqdm.write(text)
        print("caf\u00e9 \u0928\u094d\u200d \U0001f469\u200d\U0001f467\tb")
        sys.exit("error: " + text)
        """,
        devices=1,
        check=False,
    )
    assert done.returncode == 1
    controls = {char for char in done.stdout + done.stderr if printing.escaped(char, lines=True) != char}
    assert controls <= {"\r"}, controls  # with which a bar is drawn again
    for printed in (done.stdout, done.stderr):
        assert r"a\u001b]0;title\u0007 \u009b31m \u202egpj.exe \u200b \ufeff x\u000dy \u007f" in printed
    assert "caf\u00e9 \u0928\u094d\u200d \U0001f469\u200d\U0001f467\tb\n" in done.stdout


def test_a_text_is_one_line_whatever_is_in_it() -> None:
    assert printing.one_line("a\n b\x1b[2J\u2028c\udce9") == r"a b\u001b[2J c\udce9"
    assert printing.one_line(ValueError()) == "ValueError"
    assert printing.escaped("back\\slash \u4e2d") == "back\\slash \u4e2d"
