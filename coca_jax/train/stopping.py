"""A run that is asked to end: SIGTERM and Ctrl-C, at any moment, and how long it may take."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 143  # 128 + SIGTERM, what a shell says of one that SIGTERM ended: nothing is lost, start it again
_PATIENCE = 5.0  # seconds for Python to get to the signal, where there is nothing to save

_NOTHING = "stopped: there is nothing new to save"


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), has saved what it had, and can go on from there."""


class Interrupted(Exception):
    """An evaluation was left because the run is to stop."""


class Stopping:
    """Whether the run was asked to stop. To be entered once the processes of the job have found each other.

    One process. A request while there is something to save (`unsaved`) is found by whoever polls next: `asked` after
    every step, `check` at every batch of an evaluation. Where there is nothing to save, Stopped is raised at once; in
    a compilation, which Python cannot leave, the process ends after five seconds. `grace` seconds after the request the
    process ends in any case, with what was saved before. A second Ctrl-C interrupts as usual.

    Several processes. One that is asked stops all of them at one and the same poll: JAX takes SIGTERM and tells the
    others, and all agree on a poll that none has come to. So all must poll alike. A process that takes too long is
    ended by the launcher.
    """

    def __init__(self, grace: float) -> None:
        """
        Args:
          grace: seconds between the request and the end, with one process.
        """
        self.unsaved = False
        self._grace, self._several = grace, jax.process_count() > 1
        self._requests: list[int] = []
        self._polls, self._agreed = 0, False
        self._before: dict[signal.Signals, Any] = {}
        self._unraisable_before: Any = None
        self._pipe: tuple[int, int] | None = None
        self._done = threading.Event()

    def asked(self) -> bool:
        """Whether to stop here. With several processes all call it equally often."""
        if not self._several:
            return bool(self._requests)
        self._polls += 1
        self._agreed = self._agreed or bool(multihost_utils.reached_preemption_sync_point(self._polls))
        return self._agreed

    def check(self) -> None:
        """Raises Interrupted where `asked`."""
        if self.asked():
            raise Interrupted

    def __enter__(self) -> Stopping:
        with contextlib.suppress(ValueError):  # not in the main thread (a notebook's worker): signals are not ours
            # With several processes SIGTERM is JAX's.
            for name in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._before[name] = signal.signal(name, self._note)
            self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
            if not self._several:
                # Written by Python's handler in C, while the main thread may be anywhere.
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
                threading.Thread(target=self._wait, name="stopping", daemon=True).start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._done.set()
        if self._pipe:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._before:
            sys.unraisablehook = self._unraisable_before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requests.append(number)
        if self._several:
            signal.raise_signal(signal.SIGTERM)
        elif not self.unsaved:
            raise Stopped(_NOTHING)

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """What is raised in a callback of the garbage collector or of a weak reference, or in a `__del__`, is printed
        and forgotten; JAX has such callbacks, and after a compilation one is often the first of Python that runs. Of
        ours it is forgotten in silence, and raised again a moment later, when the main thread is elsewhere.
        """
        if not isinstance(lost.exc_value, Stopped):
            return self._unraisable_before(lost)
        again = threading.Timer(0.05, _thread.interrupt_main, [signal.SIGTERM])
        again.daemon = True
        again.start()

    def _wait(self) -> None:
        """In a thread of its own: until a signal comes, and then as long as the process may take."""
        assert self._pipe
        while os.read(self._pipe[0], 1) not in (bytes([signal.SIGTERM]), bytes([signal.SIGINT])):
            if self._done.is_set():
                for side in self._pipe:
                    os.close(side)
                return
        latest = time.monotonic() + max(self._grace, _PATIENCE)
        if self._done.wait(_PATIENCE):
            return
        if self.unsaved:
            if self._done.wait(max(0.0, latest - time.monotonic())):
                return
            text = f"stopped without saving: {self._grace:g} s (config.checkpoint.grace) were not enough"
        else:
            text = _NOTHING
        for child in multiprocessing.active_children():  # readers of data, which would outlive this
            child.terminate()
        print(text, flush=True)
        os._exit(EXIT_STOPPED)
