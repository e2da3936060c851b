"""A process that coca_jax starts ends with the one that started it, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

PARENT = "COCA_JAX_PARENT"  # variable: number of the process that the one it starts is to end with
_LOOK = 0.5  # seconds between two looks


def environment() -> dict[str, str]:
    """The variable for a process that this one starts, and that calls `follow`."""
    return {PARENT: str(os.getpid())}


def follow(end: Callable[[], object] | None = None) -> None:
    """Ends this process soon after the one that started it has ended; of a process that nobody named, does nothing.

    A thread looks who the parent is: the system gives an orphan another one. Linux would send a signal, but already
    when the thread ends that started the process, and Grain's readers are started by threads.

    Args:
      end: called when the parent has gone, in place of ending the process at once.
    """
    told = os.environ.pop(PARENT, "")  # not for the children of this process
    started_by = multiprocessing.parent_process()
    number = started_by.pid if started_by else int(told) if told.isdecimal() else None

    def look() -> None:
        while os.getppid() == number:
            time.sleep(_LOOK)
        if end:
            end()
        else:
            os._exit(1)

    if number is not None:
        threading.Thread(target=look, name="follow parent", daemon=True).start()
