from __future__ import annotations

import gc
import signal
import time
from typing import Any

import pytest

from coca_jax.train.stopping import Stopped, Stopping


def test_a_request_in_the_garbage_collector_is_not_lost() -> None:
    """Python prints what is raised in a callback of it, and goes on."""
    met: list[str] = []

    def callback(phase: str, _: Any) -> None:
        if not met:
            met.append(phase)
            signal.raise_signal(signal.SIGTERM)
            met.append("handled")

    gc.callbacks.append(callback)
    begun = time.monotonic()
    try:
        with Stopping(grace=30.0), pytest.raises(Stopped):
            gc.collect()
            assert met == ["start", "handled"]  # it went on, and nothing was raised here
            while time.monotonic() - begun < 4.0:  # after 5 s the process would be ended
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)


def test_a_request_elsewhere_ends_it_at_once() -> None:
    with Stopping(grace=30.0), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")
