"""coca_jax.main, saying what it is at: a line in a pipe whenever one thing ends and another begins. For resume_test.

The pipe's number is in COCA_JAX_MARKS. What was written last when a process died is what it died in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from coca_jax import compiler, main

_PIPE = int(os.environ["COCA_JAX_MARKS"])


def mark(name: str) -> None:
    os.write(_PIPE, f"{name}\n".encode())


def marked(name: str, function: Callable[..., Any], then: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        mark(name)
        result = function(*arguments, **named)
        mark(then)
        return result

    return call


def ending(function: Callable[..., Any], then: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        mark(then)
        return result

    return call


class Batches:
    def __init__(self, batches: Any) -> None:
        self._iterator = iter(batches)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        mark("data")
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first call compiles, or loads what was compiled; from a call on, the step is made and waited for."""
    called = False

    def call(*arguments: Any) -> Any:
        nonlocal called
        mark("step" if called else "compile")
        result = function(*arguments)
        called = True
        mark("step")
        return result

    return call


def watch() -> None:
    compiler.setup()  # as main does it: before JAX is loaded, which what is imported here does
    from coca_jax import evaluator
    from coca_jax.evaluate import report
    from coca_jax.train import checkpoint, loop, stopping

    batches, compile_step = loop._batches, loop.compile_step
    loop._batches = lambda *arguments: Batches(batches(*arguments))
    loop.compile_step = lambda *arguments: compiled(compile_step(*arguments))
    checkpoint.Checkpoints.save = marked("save", checkpoint.Checkpoints.save, "step")  # type: ignore
    checkpoint.Checkpoints.restore = marked("restore", checkpoint.Checkpoints.restore, "restored")  # type: ignore
    report.write = marked("report", report.write, "reported")
    # From here on a signal is heard, and until here.
    stopping.Stopping.__enter__ = ending(stopping.Stopping.__enter__, "ready")  # type: ignore
    stopping.Stopping.__exit__ = marked("over", stopping.Stopping.__exit__, "over")  # type: ignore
    evaluator.Evaluator.__call__ = marked("evaluate", evaluator.Evaluator.__call__, "step")  # type: ignore


if __name__ == "__main__":
    mark("start")
    watch()
    main.cli()
