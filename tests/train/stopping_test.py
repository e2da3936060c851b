from __future__ import annotations

import gc
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from coca_jax.train.stopping import Stopped, Stopping


def in_the_garbage_collector(ask: Callable[[], None]) -> None:
    def callback(phase: str, _: Any) -> None:
        gc.callbacks.remove(callback)
        ask()

    gc.callbacks.append(callback)
    gc.collect()


class Thing:
    def __init__(self, at_the_end: Callable[[], None] = lambda: None) -> None:
        self.at_the_end = at_the_end

    def __del__(self) -> None:
        self.at_the_end()


def in_a_weak_references_callback(ask: Callable[[], None]) -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: ask())
    del thing
    assert reference() is None


def in_del(ask: Callable[[], None]) -> None:
    Thing(ask)


@pytest.mark.parametrize("place", [in_the_garbage_collector, in_a_weak_references_callback, in_del])
def test_a_request_where_python_forgets_what_is_raised_is_not_lost(
    place: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    met: list[str] = []

    def ask() -> None:
        met.append("asked")
        signal.raise_signal(signal.SIGTERM)
        met.append("not reached: it was raised here, and forgotten")

    begun = time.monotonic()
    with Stopping(grace=30.0), pytest.raises(Stopped):
        place(ask)
        met.append("went on")
        while time.monotonic() - begun < 4.0:  # after 5 s the process would be ended
            time.sleep(0.01)
    assert met == ["asked", "went on"]
    assert not capsys.readouterr().err  # nor printed


def test_what_others_raise_there_is_printed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda lost: seen.append(lost.exc_value))

    def fail() -> None:
        raise OSError("the disk")

    with Stopping(grace=30.0):
        in_del(fail)
    assert [str(error) for error in seen] == ["the disk"]


def test_a_request_elsewhere_ends_it_at_once() -> None:
    with Stopping(grace=30.0), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")
