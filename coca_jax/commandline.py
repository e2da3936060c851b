"""The command lines of `coca_jax.main` and the others: what is wrong with them is said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging as std_logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from coca_jax import config
from coca_jax.config import printing

# Not the name alone: a clone is called coca_jax too, and its .venv, with all libraries, lies inside.
_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_ORBAX = os.sep + os.path.join("orbax", "checkpoint", "")
_CURSOR_UP = "\x1b[A"
_INTERRUPTED = 130  # as a shell has it of what Ctrl-C has ended
_PARTS = "--help=model.image lists a section, --help=peak_lr a key"
_KEYS = {field.name for field in dataclasses.fields(config.Config)}


def run(main: Callable[[list[str]], None]) -> None:
    """Reads the flags, and calls `main` with the other arguments; Ctrl-C, where `main` does not hear it, is a line."""
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        sys.exit(stopped())


def stopped(said: str = "stopped") -> int:
    """Says that Ctrl-C has ended the program; what it exits with."""
    print(said, file=sys.stderr)
    return _INTERRUPTED


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the import of JAX and all that imports it, before anything is done: Ctrl-C ends the process at once.

    As an exception it would come up inside of JAX, which drops it where garbage is collected (the program went on), and
    crashes where its libraries are half loaded.
    """

    def end(*_: object) -> None:
        os.write(2, b"stopped\n")
        os._exit(_INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as in a shell's background, or somebody else's
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and returns the other arguments; exits with one line that says what is wrong with them."""
    printable()
    try:
        for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
            name, equals, value = argument.partition("=")
            name = name.lstrip("-") if name.startswith("-") else ""
            file = (value if equals else following).split(":")[0]
            if name == "config" and not os.path.isfile(file):
                raise config.ConfigError(
                    f"--config={file}: no such file; a recipe is a file such as configs/quickstart.py"
                )
            if name.startswith("config."):
                config.check_key(name.removeprefix("config."))
            if name == "help" and equals and "config" in flags.FLAGS:
                print(config.list_keys(value))
                sys.exit(0)
        return flags.FLAGS(argv)
    except SystemExit as done:
        if {"--help", "-help"} & set(argv) and "config" in flags.FLAGS:
            print(f"\nConfiguration keys, set by --config.KEY=VALUE ({_PARTS}):\n\n{config.list_keys()}")
        # absl ends with 1 after its help, which is no failure.
        sys.exit(0 if {"--help", "-help", "--helpshort", "--helpfull"} & set(argv) else done.code)
    except flags.UnrecognizedFlagError as error:
        is_key = "config" in flags.FLAGS and error.flagname.partition(".")[0] in _KEYS
        key = f": it is a key of the configuration, --config.{error.flagname}" if is_key else ""
        sys.exit(f"error: {_one_line(error)}{key}")
    except Exception as error:  # a recipe is a program: it may raise anything
        sys.exit(f"error: {_one_line(error)}")


def printable() -> None:
    """What a terminal has no letters for (a caption, a file's name) is printed escaped, and ends no program.

    Nor does it obey what came with data: whatever is printed, by whom ever, goes through `printing.escaped`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
            stream.write = functools.partial(_write, type(stream).write, stream)  # type: ignore[method-assign]


def _write(write: Callable[[io.TextIOWrapper, str], int], stream: io.TextIOWrapper, text: str) -> int:
    if not text.replace(_CURSOR_UP, ""):  # tqdm's, alone, between two bars
        return write(stream, text)
    start = text[:1] if text.startswith("\r") else ""  # with which a bar is drawn again
    return write(stream, start + printing.escaped(text[len(start) :], lines=True))


def quiet() -> None:
    """The libraries' notes to themselves are not for the person at the terminal; their errors are.

    But for Orbax's: what it prints pages of is said by who has called it (train/checkpoint), in a line. So is what
    asyncio prints of Orbax's tasks, one traceback for each array that a full disk did not take.
    """

    def by_orbax(record: std_logging.LogRecord) -> bool:
        return _ORBAX in record.pathname or (record.name == "asyncio" and _ORBAX in record.getMessage())

    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: (
            record.pathname.startswith(_PACKAGE) or (record.levelno >= std_logging.ERROR and not by_orbax(record))
        )
    )


def _one_line(error: BaseException) -> str:
    """The message, on one line; of an error in a recipe, where in its file it was raised."""
    cause: BaseException | None = error
    while cause is not None:
        for frame in traceback.extract_tb(cause.__traceback__):
            if frame.name == "get_config":
                return f"{frame.filename}:{frame.lineno}: {type(cause).__name__}: {printing.one_line(str(cause))}"
        cause = cause.__cause__ or cause.__context__
    return printing.one_line(error)
