"""A run that is asked to end: SIGTERM, Ctrl-C and a lost terminal, at any moment, and how long it may take."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 143  # 128 + SIGTERM, what a shell says of one that SIGTERM ended: nothing is lost, start it again
_PATIENCE = 5.0  # seconds for what is given back before a process is ended


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT, SIGHUP), has saved what it had, and can go on from there."""


class Interrupted(Exception):
    """An evaluation was left because the run is to stop."""


class Stopping:
    """Whether the run was asked to stop. To be entered once the processes of the job have found each other.

    One process. A request while there is something to save (`unsaved`) is found by whoever polls next: `asked` after
    every step, `check` at every batch of an evaluation; `grace` seconds after it the process ends in any case, with
    what was saved before. Where there is nothing to save, the process ends at once, from a thread of its own. Nothing
    is raised for that: it would be in the midst of whatever the main thread is at, and compilers that are left so
    crash, threads cannot be joined that were about to start, callbacks of the garbage collector forget what is raised
    in them. A second Ctrl-C interrupts as usual. A terminal that goes away (SIGHUP) is a request too, unless that was
    to be ignored (nohup); what is said after it is said to nobody, and is no error.

    Several processes. One that is asked stops all of them at one and the same poll: JAX takes SIGTERM and tells the
    others, and all agree on a poll that none has come to. So all must poll alike. A process that takes too long is
    ended by the launcher.

    Attributes:
      unsaved: there is something to save; the run says so.
      held: what is entered in it is left when this is, and before the process is ended.
    """

    def __init__(self, grace: float) -> None:
        """
        Args:
          grace: seconds between the request and the end, with one process.
        """
        self.unsaved = False
        self.held = contextlib.ExitStack()
        self._grace, self._several = grace, jax.process_count() > 1
        self._requests: list[int] = []
        self._polls, self._agreed = 0, False
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._terminals: list[int] = []
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
            names = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
            names += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else []
            self._terminals = [number for number in (1, 2) if os.isatty(number)]  # cannot be told once it is gone
            for name in names:
                self._before[name] = signal.signal(name, self._note)
            if not self._several:
                # Written by Python's handler in C, while the main thread may be anywhere.
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
                threading.Thread(target=self._wait, name="stopping", daemon=True).start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.held.close()
        self._done.set()
        if self._pipe:
            signal.set_wakeup_fd(-1)
            os.write(self._pipe[1], b"\0")
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._leave_terminal()
        if self._requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requests.append(number)
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def _leave_terminal(self) -> None:
        """Where it is gone: writing to it is an error, which would end the run before it has saved."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def _wait(self) -> None:
        """In a thread of its own: until a signal comes, and then as long as the process may take."""
        assert self._pipe
        while os.read(self._pipe[0], 1)[0] not in self._before:
            if self._done.is_set():
                for side in self._pipe:
                    os.close(side)
                return
        self._leave_terminal()  # the main thread may be long in noticing it
        text = "stopped: there is nothing new to save"
        if self.unsaved:
            if self._done.wait(self._grace):
                return
            text = f"stopped without saving: {self._grace:g} s (config.checkpoint.grace) were not enough"
        try:
            for child in multiprocessing.active_children():  # readers of data, which would outlive this
                child.kill()  # one that is stopped would not hear SIGTERM
            giving_back = threading.Thread(target=self.held.close, daemon=True)
            giving_back.start()
            giving_back.join(_PATIENCE)  # a storage that does not answer is not waited for
            print(f"\n{text}", flush=True)  # a progress bar has not ended its line
        finally:  # whoever read the output may be gone
            os._exit(EXIT_STOPPED)
