"""Watches what a process does while it reads what it should not trust."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = (
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.rename",
    "os.link",
    "os.symlink",
)
# Nothing that is read may start a program, reach a network, or name what is run.
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)


class Escaped(BaseException):
    """It wrote outside of its folder, started something, or ran what it read. No `except Exception` hides it."""


class Guard:
    """An audit hook (PEP 578). It stays as long as the process; `active` turns it on and off.

    It sees what Python does. What a library in C writes by itself, it does not: see `strays`.

    Args:
      folder: the only one that may be written to; code that lies in it is never run.
    """

    def __init__(self, folder: str):
        self._folder = os.path.realpath(folder)
        self.active = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        if not self.active:
            return
        if event in _NEVER:
            self._say(event, arguments)
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITES) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            if writes and not isinstance(path, int) and not self._allowed(path):
                self._say(event, arguments)
        elif event in _PATHS:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
            paths = arguments[1:2] if event == "os.symlink" else paths
            if event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] >= 0:  # in a folder that is open
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(paths[0]))]
            if not all(isinstance(path, int) or self._allowed(path) for path in paths):
                self._say(event, arguments)
        elif event in ("exec", "compile"):
            name = getattr(arguments[0], "co_filename", arguments[-1])
            if isinstance(name, str) and self._inside(name) and os.path.isfile(name):
                self._say(event, [name])

    def _inside(self, path: Any) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == self._folder or real.startswith(self._folder + os.sep)

    def _allowed(self, path: Any) -> bool:
        return os.fsdecode(path) == os.devnull or self._inside(path)

    def _say(self, event: str, arguments: Sequence[Any]) -> None:
        self.seen.append(f"{event}{tuple(arguments)!r}"[:500])
        raise Escaped(self.seen[-1])


def strays(folder: str, known: Sequence[str]) -> list[str]:
    """Names in a folder that are not known: what was written beside the place for it."""
    return sorted(set(os.listdir(folder)) - set(known))
