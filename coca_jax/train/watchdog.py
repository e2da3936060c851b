"""A thread that looks at the clock while steps are made, and writes down where all threads are when one is too slow."""

from __future__ import annotations

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from coca_jax import config
from coca_jax.data import side_files

FOLDER = "stalled"
_OFTEN = 0.05  # seconds between two looks at the clock, at least


class Watchdog:
    """Watches one thing at a time: each `begin` starts a new one, `pause` ends the last.

    Where a step takes `stall` times the median of those before it, and `stall_seconds` at least, the stacks of all
    threads are written into the workdir, once for the step. Nothing is ended: what can be said from here is where the
    process waits. Processes that wait for a lost one are ended by peers.py.
    """

    def __init__(self, c: config.Guard, workdir: epath.Path, say: Callable[[str], None]) -> None:
        """
        Args:
          c: the bounds; `stall` 0: off.
          workdir: folder or bucket.
          say: told in a line what was written, from the watching thread.
        """
        self._c, self._folder, self._say = c, workdir / FOLDER, say
        self._end, self._lock = threading.Event(), threading.Lock()
        self._step, self._started, self._median = 0, 0.0, 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if c.stall:
            self._thread.start()

    def begin(self, step: int, median: float) -> None:
        """A step begins.

        Args:
          step: its number.
          median: seconds of the steps before it; 0: not known, and it is not watched.
        """
        with self._lock:
            self._step, self._started, self._median = step, time.monotonic(), median

    def pause(self) -> None:
        """What comes now is no step."""
        with self._lock:
            self._median = 0.0

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        # With stall_seconds=0, too, the thread sleeps: it would take a core and Python's lock from the run.
        while not self._end.wait(min(1.0, max(_OFTEN, self._c.stall_seconds / 4))):
            with self._lock:
                taken, median, step = time.monotonic() - self._started, self._median, self._step
                late = median > 0 and taken > max(self._c.stall * median, self._c.stall_seconds)
                if late:
                    self._median = 0.0  # once
            if late:
                self._tell(step, taken, median)

    def _tell(self, step: int, taken: float, median: float) -> None:
        said = f"step {step} has taken {taken:.1f} s, where steps take {median:.3g} s"
        try:
            with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a file of this machine alone
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            path = self._folder / f"step-{step}-{jax.process_index():05d}.txt"
            side_files.make_room(self._folder, folder=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            side_files.write_text(path, f"{said}\n\n{stacks}")
            self._say(f"{said}; where each thread was: {path}")
        except Exception as error:  # the disk may be what is stuck or full: the run matters more
            logging.error("%s; the stacks could not be written: %s", said, error)
