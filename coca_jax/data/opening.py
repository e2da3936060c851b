"""The one way to open a file that a user or data name: a regular file of a bounded size, without waiting for ever.

Opening a named pipe waits for its other end, a device may never end, and a network mount may never answer.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, TypeVar

from etils import epath

from coca_jax.data import addresses
from coca_jax.data.records import DataError

# Bytes of a file that an option names: a vocabulary (the largest tokenizer.json have 30 MB), labels, templates.
SETTINGS_BYTES = 256 << 20
# Seconds that a disk or a store has to answer, for a file of settings and for each part of a longer one.
PATIENCE = 120.0
# Bytes of an image, or of a text beside it. More is no web image, and a few at once would fill a host's memory.
EXAMPLE_BYTES = 256 << 20
# Bytes of one line of a file of captions.
LINE_BYTES = 4 << 20
_PART = 1 << 20
# Opens without waiting for the other end of a pipe.
_WITHOUT_WAITING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_T = TypeVar("_T")


class UnusableFile(DataError, OSError):
    """A path leads to something that is never read as a file, or to a file that is too large."""


class NoAnswer(UnusableFile):
    """A disk or a store did not answer in time."""


def check_regular(path: str, found: os.stat_result) -> None:
    """Raises UnusableFile where a path leads to something else than a regular file; IsADirectoryError for a folder."""
    if stat.S_ISREG(found.st_mode):
        return
    what = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder, and a file is wanted")
    raise UnusableFile(f"{path} is {what}, which is never read: name a regular file")


def open_descriptor(path: str) -> int:
    """The descriptor of a regular file on a disk, opened for reading.

    Raises:
      UnusableFile: it is a pipe, a device or a socket; nothing was waited for.
      OSError: it cannot be opened.
    """
    check_regular(path, os.stat(path))  # before it is opened, which moves some devices
    descriptor = os.open(path, _WITHOUT_WAITING)
    try:
        check_regular(path, os.fstat(descriptor))  # another one may have taken its place
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: str) -> BinaryIO:
    """`open_descriptor` as a stream."""
    return os.fdopen(open_descriptor(path), "rb")


def check_size(path: str, size: int, limit: int, what: str = "such a file") -> None:
    """Raises UnusableFile where a file has more bytes than `what` may have."""
    if size > limit:
        raise UnusableFile(f"{path}: {size} bytes, more than the {limit} that {what} may have: is it another file?")


def read(path: epath.PathLike, limit: int = SETTINGS_BYTES, what: str = "such a file") -> bytes:
    """All bytes of a file on a disk or in a bucket.

    Args:
      path: as a user wrote it.
      limit: bytes that it may have.
      what: what has that limit, for the message.

    Raises:
      UnusableFile: it is a pipe, a device or a socket, is larger than the limit, or did not answer in PATIENCE.
      DataError: an address that nothing is read from.
      OSError: it is missing, a folder, or cannot be read.
    """
    text = os.fspath(path)
    addresses.check(text)

    def whole() -> bytes:
        if "://" in text:
            remote = epath.Path(text)
            check_size(text, remote.stat().length, limit, what)
            return remote.read_bytes()
        with open_file(text) as file:
            check_size(text, os.fstat(file.fileno()).st_size, limit, what)
            content = file.read(limit + 1) or b""  # files of /proc have no size that is true
        check_size(text, len(content), limit, what)
        return content

    return within(whole, text)


def read_text(path: epath.PathLike, limit: int = SETTINGS_BYTES, what: str = "such a file") -> str:
    """The text of a UTF-8 file, a byte order mark left out. Raises as `read`, and DataError where it is not UTF-8."""
    try:
        return read(path, limit, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not UTF-8: {error}; save it as UTF-8") from error


def check_file(path: epath.PathLike) -> None:
    """For libraries that open a path themselves: raises as `read` where it is no regular file; reads nothing."""
    text = os.fspath(path)
    addresses.check(text)
    if "://" not in text:
        within(lambda: check_regular(text, os.stat(text)), text)


def lines(parts: Iterable[bytes], longest: int = LINE_BYTES) -> Iterator[bytes | None]:
    r"""The lines of a file that comes in parts, their `\n` included; None in place of one of more than `longest` bytes.

    No more than `longest` bytes and a part are held at a time.
    """
    pending: list[bytes] = []
    held, dropping = 0, False
    for part in parts:
        start = 0
        while (end := part.find(b"\n", start) + 1) or start < len(part):
            piece = part[start : end or len(part)]
            start = end or len(part)
            held += len(piece)
            dropping = dropping or held > longest
            pending = [] if dropping else [*pending, piece]
            if end:
                yield None if dropping else b"".join(pending)
                pending, held, dropping = [], 0, False
    if held:
        yield None if dropping else b"".join(pending)


def parts(path: str) -> Iterator[bytes]:
    """The bytes of a file on a disk, a part at a time. Raises as `open_file`, and UnusableFile after PATIENCE."""
    with within(lambda: open_file(path), path) as file:
        while part := file.read(_PART):
            yield part


def within(ask: Callable[[], _T], path: str, seconds: float | None = None) -> _T:
    """What `ask` returns or raises; NoAnswer after `seconds` (None: PATIENCE), though nothing ends `ask` then."""
    seconds = PATIENCE if seconds is None else seconds
    answer: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((ask(), None))
        except BaseException as error:  # raised again where it was asked
            answer.put((None, error))

    threading.Thread(target=run, name=f"asks {path}", daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswer(
            f"{path} did not answer for {seconds:.0f} s: is its mount or its store there? Try again, or copy it to a "
            "disk of this machine"
        ) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
