"""A store that does not answer is asked again, after pauses that grow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from coca_jax.data import opening
from coca_jax.data.sources.base import one_line

# Seconds between the times that a store is asked, each a quarter more or less: about two minutes in all, in pieces that
# a run which is asked to end can wait for.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, *(16.0,) * 7)
_JITTER = random.Random()
# What asking again would not change. DataError is a ValueError.
_FINAL = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError),
    *(ValueError, TypeError, NotImplementedError, ImportError),
)
# Seconds that one answer may take. A listing of a bucket is many answers of its own.
_ASKED = {"info": 120.0, "cat_file": 300.0, "glob": 900.0, "find": 900.0}
_LONGEST = 900.0  # seconds after which a store is asked no more


class Patient:
    """An fsspec file system whose questions are asked `patiently`; all else, streams too, is its own."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        if name not in _ASKED:
            return found
        seconds = _ASKED[name]

        def asked(*arguments: Any, **options: Any) -> Any:
            return patiently(
                lambda: opening.within(lambda: found(*arguments, **options), self._path, seconds), self._path
            )

        return asked


def patiently(ask: Callable[[], Any], path: str) -> Any:
    """What a store answers. One that fails (a broken connection, too many requests, an error of its own) is asked again
    after each of WAITS; a file that is missing or not to be read is not.

    Args:
      ask: reads; may be called several times.
      path: for the log.

    Raises:
      OSError: what the store raised at last, of whatever kind that was. What is _FINAL is raised as it is.
    """
    until = time.monotonic() + _LONGEST
    for number, wait in enumerate((*WAITS, None), 1):
        try:
            return ask()
        except opening.NoAnswer as error:  # a connection that is stuck; a new one may not be
            if wait is None or time.monotonic() > until:
                raise
            logging.warning("%s; asked again", error)
        except _FINAL:
            raise
        except Exception as error:  # stores have many kinds
            code = str(getattr(error, "code", None) or getattr(error, "status", None))  # of HTTP
            if wait is None or (code.startswith("4") and code not in ("408", "429")):
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {one_line(error)}") from error
            pause = wait * _JITTER.uniform(0.75, 1.25)
            logging.warning(
                "%s: %s; asked again in %.1f s (%d of %d)", *(path, one_line(error), pause, number, len(WAITS))
            )
            time.sleep(pause)
    raise AssertionError("not reached")
