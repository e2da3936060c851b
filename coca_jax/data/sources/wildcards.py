"""The files on a disk that a pattern matches: as Python's glob has them, but bounded, and never round in links."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import time
from collections.abc import Iterator

from absl import logging

from coca_jax.data.records import DataError

# What a pattern may cost. A set of billions of images has a million shards at most.
MATCHES = 1_000_000
LOOKED_AT = 10_000_000  # entries of folders
SECONDS = 300.0
# File systems that are no disk: a wildcard does not lead into them, a name does.
_NOT_DISKS = ("/proc", "/sys", "/dev")


class _Cost:
    """Counts what a pattern costs. `add` raises DataError where it is too much."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._until = pattern, time.monotonic() + SECONDS
        self.entries = self.matches = 0

    def add(self, entries: int = 0, matches: int = 0) -> None:
        self.entries, self.matches = self.entries + entries, self.matches + matches
        if self.matches > MATCHES:
            raise self._error(f"matches more than {MATCHES:,} files")
        if self.entries > LOOKED_AT:
            raise self._error(f"leads through more than {LOOKED_AT:,} files and folders")
        if time.monotonic() > self._until:
            raise self._error(f"took {SECONDS:.0f} s and {self.entries:,} files and folders, without an end")

    def _error(self, what: str) -> DataError:
        found = f"{self.matches:,} matched"
        return DataError(f"{self._pattern} {what} ({found}): write more of the path, without wildcards")


def matching_files(pattern: str) -> list[str]:
    """Paths of the regular files that a pattern matches, sorted; of pipes and such the number is logged.

    Wildcards are * ? [ ] in one part of the path; ** stands for any folders, or none. Names that begin with a dot match
    what begins with one. Links are followed, but for those that lead back to where they are.

    Raises:
      DataError: it costs more than MATCHES, LOOKED_AT or SECONDS.
    """
    cost, found, special = _Cost(pattern), set[str](), list[str]()
    for path, is_file in _walk(pattern, cost):
        if is_file:
            if path not in found:
                found.add(path)
                cost.add(matches=1)
        else:
            special.append(path)
    if special:
        text = "%s: %d pipes, devices, sockets or broken links are passed over, e.g. %r"
        logging.warning(text, pattern, len(special), min(special))
    return sorted(found)


def _walk(pattern: str, cost: _Cost) -> Iterator[tuple[str, bool]]:
    """Each path that matches and is no folder, and whether it is a regular file."""
    written = pattern.split("/")
    parts = [part for n, part in enumerate(written) if part and (part != "**" or n == 0 or written[n - 1] != "**")]
    if not written[-1]:  # folders alone end in a slash
        return
    # Path, the part that is next, and the real folders that `**` went through links from, or to.
    waiting: list[tuple[str, int, tuple[str, ...]]] = [("/" if pattern.startswith("/") else "", 0, ())]
    while waiting:
        path, at, chain = waiting.pop()
        part, last = parts[at], at + 1 == len(parts)
        if not glob.has_magic(part):
            path = os.path.join(path, part)
            if not last:
                waiting.append((path, at + 1, chain))
            elif os.path.lexists(path) and not os.path.isdir(path):
                yield path, os.path.isfile(path)
            continue
        if part == "**" and not last:
            waiting.append((path, at + 1, chain))
        matches = re.compile(fnmatch.translate("*" if part == "**" else part)).match
        for entry in _entries(path):
            cost.add(entries=1)
            if (entry.name.startswith(".") and not part.startswith(".")) or not matches(entry.name):
                continue
            inner = os.path.join(path, entry.name)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if not is_folder:
                if last:
                    yield inner, is_file
            elif inner in _NOT_DISKS:
                continue
            elif part == "**":
                if not entry.is_symlink():
                    waiting.append((inner, at, chain))
                elif links := _through(path, inner, chain):
                    waiting.append((inner, at, links))
            elif not last:
                waiting.append((inner, at + 1, chain))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as entries:
            return list(entries)
    except OSError:  # as glob has it: it is not there, or not ours, or its path is too long
        return []


def _through(folder: str, link: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """The chain with what a link leads to; empty where it leads back to a folder that was gone through."""
    real, target = os.path.realpath(folder), os.path.realpath(link)
    if any(f"{before}/".startswith(target.rstrip("/") + "/") for before in (*chain, real)):
        return ()
    return (*chain, real, target)
