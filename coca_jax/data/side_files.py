"""Small files that a run, an evaluation or a conversion keeps beside its results, read whatever has become of them.

A flipped bit, a line of a gigabyte, a folder, a pipe or a circle of links in the place of such a file neither ends a
run nor stops its log. What cannot be read is renamed to NAME.unreadable-1, which is logged, and a new file is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from coca_jax.config import printing
from coca_jax.data import opening
from coca_jax.data.records import DataError
from coca_jax.data.sources.files import is_remote

ASIDE = ".unreadable-"
_LARGEST = 256 << 20  # bytes of a file that is read at once
_LINE = 16 << 20  # bytes of a line
_PART = 1 << 20  # bytes that are read at once


class Unreadable(DataError):
    """A file is not what is written there, or is no file at all. The message is one line, with its path."""


class Refused(Unreadable):
    """The system does not let it be read: its owner, or the disk. What it holds is not known."""


def is_there(path: epath.Path) -> bool:
    """Whether anything has this name, a link that leads nowhere included."""
    return path.exists() if is_remote(os.fspath(path)) else os.path.lexists(path)


def read(path: epath.Path) -> bytes | None:
    """All bytes of a small file; None where there is none. Raises Unreadable."""
    with _opened(path) as file:
        if file is None:
            return None
        content: bytes = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise Unreadable(f"{path} has more than {_LARGEST >> 20} MiB")
        return content


def read_json(path: epath.Path) -> Any:
    """The value in a JSON file; None where there is none. Raises Unreadable."""
    content = read(path)
    if content is None:
        return None
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is damaged ({printing.one_line(error, 200)})") from error


@dataclasses.dataclass(frozen=True)
class Lines:
    """What a file of JSON objects holds, one a line.

    Attributes:
      objects: what was taken of those that can be read.
      bad: whole lines that are no such object.
      first_bad: number of the first of them, from 1; 0: there is none.
      half: the last line is cut off, as by a kill.
      size: bytes of the lines that have their end.
      ended: the last line has its end.
    """

    objects: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bad: int = 0
    first_bad: int = 0
    half: bool = False
    size: int = 0
    ended: bool = True


Take = Callable[[dict[str, Any]], dict[str, Any] | None]


def _all(line: dict[str, Any]) -> dict[str, Any]:
    return line


def read_lines(path: epath.Path, take: Take = _all) -> Lines:
    """Reads a file of JSON objects, one a line; without the file there are none.

    Args:
      path: of the file.
      take: what is kept of an object; None: it is none of those that are written there.

    Raises:
      Unreadable: it cannot be read at all.
    """
    found: list[dict[str, Any]] = []
    bad = first_bad = size = total = 0
    half = False

    def parts(file: Any) -> Iterator[bytes]:
        nonlocal size, total
        while part := file.read(_PART):
            if end := part.rfind(b"\n") + 1:
                size = total + end
            total += len(part)
            yield part

    with _opened(path) as file:
        for number, line in enumerate(opening.lines(parts(file), _LINE) if file else (), 1):
            value = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads((line or b"").decode("utf-8"))
            taken = take(value) if isinstance(value, dict) else None
            if taken is not None:
                found.append(taken)
            elif line is not None and not line.endswith(b"\n"):
                half = bool(line.strip())
            elif line is None or line.strip():
                bad, first_bad = bad + 1, first_bad or number
    return Lines(found, bad, first_bad, half, size, size == total)


def take_json(path: epath.Path) -> Any:
    """As `read_json`, by who writes the file anew: one that cannot be read is set aside, and None."""
    try:
        return read_json(path)
    except Unreadable as error:
        set_aside(path, str(error))
        return None


def take_lines(path: epath.Path, take: Take = _all) -> list[dict[str, Any]]:
    """The lines of `read_lines`, by who goes on writing there.

    Afterwards the file holds these alone, or is not there. Where there were others it was set aside first.

    Raises:
      OSError: it cannot be set aside or written.
    """
    try:
        lines = read_lines(path, take)
    except Unreadable as error:
        set_aside(path, str(error))
        return []
    if lines.bad or not lines.ended:
        why = f"{path} has {lines.bad} lines that cannot be read; the others are kept" if lines.bad else ""
        write_lines(path, lines.objects, aside=why)
    return lines.objects


def set_aside(path: epath.Path, why: str) -> epath.Path:
    """Renames what is in a file's place, and says so. Raises OSError where it cannot be renamed."""
    number = next(n for n in range(1, 1 << 20) if not is_there(path.with_name(f"{path.name}{ASIDE}{n}")))
    where = path.with_name(f"{path.name}{ASIDE}{number}")
    path.rename(where)
    logging.warning("%s: set aside as %s", why, where.name)
    return where


def make_room(path: epath.Path, *, folder: bool = False) -> None:
    """Sets aside what is in the place of a file (or a folder) that is about to be written, where it is no such thing.

    Raises:
      OSError: it cannot be renamed.
    """
    if is_remote(os.fspath(path)) or not os.path.lexists(path):
        return
    right = os.path.isdir(path) if folder else os.path.isfile(path)
    # A link to a file that is not there yet is a place to write to.
    if not right and not (os.path.islink(path) and not os.path.exists(os.path.realpath(path)) and not _loops(path)):
        set_aside(path, f"{path} is not a {'folder' if folder else 'file'}")


def _loops(path: epath.Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def write_whole(path: epath.Path, write: Callable[[epath.Path], object], *, aside: str = "") -> None:
    """Writes a file beside its place and renames it: where that fails, what was there is still there.

    Args:
      path: of the file; what is there and is no file is set aside.
      write: called with the path beside it.
      aside: why a file that is there is set aside and not replaced; empty: it is replaced.

    Raises:
      OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    make_room(partial)
    try:
        write(partial)
        make_room(path)
        if aside and is_there(path):
            set_aside(path, aside)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: epath.Path, text: str, *, aside: str = "") -> None:
    """`write_whole` of a text, UTF-8. Raises OSError."""
    write_whole(path, lambda partial: partial.write_bytes(text.encode("utf-8")), aside=aside)


def write_lines(path: epath.Path, lines: list[dict[str, Any]], *, aside: str = "") -> None:
    """`write_whole` of JSON objects, one a line. Raises OSError."""
    write_text(path, "".join(map(as_line, lines)), aside=aside)


def as_line(value: dict[str, Any]) -> str:
    """A JSON object with the end of its line. Half of a surrogate pair, as of a name that is no text, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[Any]:
    """The file, open for bytes; None where there is none. Raises Unreadable; OSError where the storage fails."""
    try:
        try:
            file: Any = path.open("rb") if is_remote(os.fspath(path)) else opening.open_file(os.fspath(path))
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        except IsADirectoryError as error:
            raise Unreadable(f"{path} is not a file") from error
        except opening.UnusableFile as error:
            what = str(error).removeprefix(f"{os.fspath(path)} is ").partition(": ")[0]
            raise Unreadable(f"{path} is not a file but {what}") from error
        with file:
            yield file
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Unreadable(f"{path} is a link that leads to itself") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise Refused(f"{path} cannot be read ({printing.one_line(error, 200)})") from error
        raise
