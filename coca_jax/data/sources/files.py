"""Files by pattern and by range, on a disk or in a bucket.

Buckets are read through fsspec: gs:// needs `pip install 'coca_jax[gcs]'`, s3:// `pip install 'coca_jax[s3]'`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import glob
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import fsspec
import tqdm

from coca_jax.data import opening
from coca_jax.data.opening import UnusableFile
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import wildcards
from coca_jax.data.sources.base import MAX_BYTES, one_line
from coca_jax.data.sources.patience import Patient

_THREADS = 32  # that ask a store for sizes: each mostly waits
_MAX_EXPANDED = 10_000_000
_PART = 8 << 20  # bytes that a store is asked for at once
# What tells one version of an object in a store from the next, best first; stores differ in what they say.
_VERSIONS = ("generation", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclasses.dataclass(frozen=True)
class File:
    """A file as it was when it was looked at.

    Attributes:
      path: on a disk, or with the store's protocol (gs://bucket/file).
      size: bytes.
      version: nanoseconds of the last change on a disk; generation, ETag or time in a store; empty where it says none.
    """

    path: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]


def short_names(found: Sequence[File]) -> list[str]:
    """What each of several files is called in the keys of its records, as text.

    Its name; where two have the same, of all the path from the folder that they have in common.
    """
    names = [file.name for file in found]
    if len(set(names)) < len(names):
        parts = [file.path.split("/") for file in found]
        common = next(n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1)
        names = ["/".join(of_one[common:]) for of_one in parts]
    return [name.encode(errors="surrogateescape").decode(errors="replace") for name in names]


def is_remote(path: str) -> bool:
    """Whether fsspec reads it and not the operating system."""
    return "://" in path


def store(path: str) -> tuple[Any, str]:
    """The fsspec file system of a remote path, which is asked `patiently` (but for streams), and the path in it."""
    try:
        system, inside = fsspec.core.url_to_fs(path)
        return Patient(system, path), inside
    except ImportError as error:
        raise DataError(f"{path}: {one_line(error)}; pip install 'coca_jax[gcs]' or 'coca_jax[s3]'") from error
    except ValueError as error:
        raise DataError(f"{path}: {one_line(error)}; write gs://, s3:// or a path on a disk") from error


def look(path: str) -> File:
    """The file as it is now. Raises FileNotFoundError or another OSError."""
    if not is_remote(path):
        found = os.stat(path)
        opening.check_regular(path, found)
        return File(path, found.st_size, str(found.st_mtime_ns))
    system, inside = store(path)
    return _described(path, system.info(inside))


def _described(path: str, info: dict[str, Any]) -> File:
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{path} is a folder, and a file is wanted")
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(version, datetime.datetime):  # some stores list the seconds and tell the date of a single object
        version = version.timestamp()
    return File(path, int(info["size"]), str(version))


def forget_listings(path: str) -> None:
    """What a store listed before may have changed: asks it anew."""
    if is_remote(path):
        store(path)[0].invalidate_cache()


def braces(pattern: str) -> Iterator[str]:
    """Expands {00000..00099} and {a,b}, as a shell does; other braces stay as they are."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        yield pattern
        return
    first, last, names = found.groups()
    if names is not None:
        middles: Iterable[str] = names.split(",")
    else:
        if abs(int(last) - int(first)) >= _MAX_EXPANDED:
            raise DataError(f"{pattern}: {found[0]} are more than {_MAX_EXPANDED} files; is a digit too many?")
        # As in a shell, zeros in front make all numbers as wide.
        padded = any(len(n) > 1 and n.startswith("0") for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        middles = (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))
    rests = list(braces(pattern[found.end() :]))
    for middle, rest in itertools.product(middles, rests):
        yield pattern[: found.start()] + middle + rest


def patterns(location: str) -> list[str]:
    """A comma list of patterns, taken apart at the commas outside of braces, with their braces expanded."""
    parts = re.findall(r"(?:\{[^{}]*\}|[^,])+", location)
    return [name for part in parts for name in braces(part.strip()) if name]


def expand(location: str, where: str, skip: Callable[[str], bool] = lambda name: False) -> list[File]:
    """The files that a location names: a comma list of paths with {0..9} and {a,b} expanded, and wildcards * ? [ ],
    where ** stands for any folders, or none.

    Args:
      location: those of a wildcard come in the order of their names, all else in the order in which it is written.
      where: the source's name, for messages.
      skip: names of files that a wildcard finds and that are not meant.

    Raises:
      DataError: a pattern that no file matches, or a named file that is missing, or is there twice.
    """
    wanted = patterns(location)
    for protocol in {pattern.partition("://")[0] + "://" for pattern in wanted if is_remote(pattern)}:
        forget_listings(next(pattern for pattern in wanted if pattern.startswith(protocol)))
    if not wanted:
        raise DataError(f"{where}: no file is named; name files that exist")
    found: list[File] = []
    plain = [pattern for pattern in wanted if not glob.has_magic(pattern) or _exists(pattern)]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_THREADS))
        named = dict(zip(plain, pool.map(_look_or_none, plain), strict=True))
    for pattern in wanted:
        file = named.get(pattern)
        matches = [] if pattern in named else [match for match in _matches(pattern, where) if not skip(match.name)]
        if not file and not matches:
            which = "" if pattern == location else f" {pattern}"
            folder = not is_remote(pattern) and os.path.isdir(pattern)
            fix = f"it is a folder: write {pattern.rstrip('/')}/*" if folder else "name files that exist"
            raise DataError(f"{where}: no file matches{which}; {fix}")
        found += [file] if file else matches
    twice = [path for path, count in collections.Counter(file.path for file in found).items() if count > 1]
    if twice:
        raise DataError(
            f"{where}: {twice[0]} is there {'twice' if len(twice) == 1 else 'more than once'}: name it once"
        )
    return found


def _exists(pattern: str) -> bool:
    return not is_remote(pattern) and os.path.isfile(pattern)  # a real file may have a [ in its name


def _look_or_none(path: str) -> File | None:
    try:
        return look(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except DataError:
        raise
    except Exception as error:  # whatever a store's library raises, e.g. for want of a permission
        raise DataError(f"{path} cannot be looked at: {one_line(error)}") from error


def _matches(pattern: str, where: str) -> list[File]:
    try:
        if is_remote(pattern):
            system, inside = store(pattern)
            infos = system.glob(inside, detail=True)
            if len(infos) > wildcards.MATCHES:
                raise DataError(f"{where}: {pattern} matches {len(infos):,} files: write more of the path")
            files = {system.unstrip_protocol(path): info for path, info in infos.items()}
            return [_described(path, info) for path, info in sorted(files.items()) if info.get("type") != "directory"]
        return [look(path) for path in wildcards.matching_files(pattern)]
    except DataError:
        raise
    except Exception as error:  # whatever a store's library raises, e.g. for want of a permission
        raise DataError(f"{where}: {pattern} cannot be listed: {one_line(error)}") from error


def read(path: str, limit: int = MAX_BYTES, what: str = "one image") -> bytes:
    """All bytes of a file on a disk or in a bucket. Raises OSError; UnusableFile where it is larger than the limit.

    No time is kept on a disk, as millions are read; see `opening.read`.
    """
    if not is_remote(path):
        with opening.open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            opening.check_size(path, size, limit, what)
            return file.read(size)
    opening.check_size(path, look(path).size, limit, what)
    system, inside = store(path)
    return system.cat_file(inside)


def lines(path: str, longest: int = opening.LINE_BYTES) -> Iterator[bytes | None]:
    r"""The lines of what `parts` gives, their `\n` included; None for one of more than `longest` bytes."""
    return opening.lines(parts(path), longest)


def parts(path: str) -> Iterator[bytes]:
    """The bytes of a file on a disk or in a bucket, a part at a time. Raises OSError, or UnusableFile, which is one."""
    return _remote_parts(path) if is_remote(path) else opening.parts(path)


def _remote_parts(path: str) -> Iterator[bytes]:
    size = look(path).size
    system, inside = store(path)
    for start in range(0, size, _PART):
        yield system.cat_file(inside, start=start, end=min(size, start + _PART))


def read_settings(path: str, where: str) -> str:
    """The text of a file that an option names. Raises DataError."""
    try:
        if not is_remote(path):
            return opening.read_text(path)
        return read(path, opening.SETTINGS_BYTES, "such a file").decode("utf-8-sig")
    except UnusableFile as error:
        raise DataError(f"{where}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {path} is not UTF-8: {one_line(error)}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read: {one_line(error)}") from error


# How JPEG, PNG, GIF, WebP and data URLs begin as texts.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "data:image/")


def inside(root: str, relative: str, where: str, *, links: bool = True) -> str:
    """The path of a file under a folder, which names that came with data must not leave.

    Args:
      root: folder on a disk or in a store.
      relative: the path as the data give it.
      where: file and line that it comes from.
      links: follow symbolic links to see where they lead, which asks the disk.

    Raises:
      DataError: it is absolute, has `..` in it, or a symbolic link leads out of the folder.
    """
    parts = re.split(r"[/\\]" if os.sep == "\\" else "/", relative)
    if "://" in relative:
        raise DataError(
            f"{where}: {relative[:200]!r} is an address: download the pictures first, e.g. with img2dataset"
        )
    if len(relative) > 200 and relative.startswith(_BASE64):
        raise DataError(f"{where}: {relative[:20]!r}... is an image in base64, which is not read: write its bytes")
    if relative.startswith(("/", "~")) or os.path.isabs(relative) or ".." in parts or "\0" in relative:
        raise DataError(f"{where}: {relative[:200]!r} leaves the folder {root}: write paths relative to it, without ..")
    path = f"{root.rstrip('/')}/{relative}" if root != "/" else f"/{relative}"
    if links and not is_remote(path):
        real, top = os.path.realpath(path), os.path.realpath(root)
        if os.path.commonpath([real, top]) != top:
            raise DataError(
                f"{where}: {relative[:200]!r} is a link that leaves the folder {root}: copy the file into it"
            )
    return path


def picture(root: str, relative: str, where: str) -> bytes:
    """All bytes of a small file under a folder, by a name that came with data.

    On a disk it costs four system calls where the name is no link and its folder was looked at before: following the
    links of a whole path costs half as much as the decoding of a small picture.

    Raises:
      DataError: the name leaves the folder (see `inside`).
      BadExample: there is no such file, it cannot be read, or it is larger than one picture may be.
    """
    path = inside(root, relative, where, links=False)
    try:
        if is_remote(path) or not (_FILE_ITSELF and _stays(root, os.path.dirname(path))):
            return read(inside(root, relative, where))
        try:
            descriptor = os.open(path, _FILE_ITSELF)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK):  # it is a link: Linux and macOS say ELOOP, BSD EMLINK
                raise
            return read(inside(root, relative, where))
        with open(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            opening.check_regular(path, found)
            opening.check_size(path, found.st_size, MAX_BYTES, "one image")
            return file.read(found.st_size)
    except UnusableFile as error:
        raise BadExample("unreadable", f"{where}: {one_line(error)}") from error
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadExample("unreadable", f"{where}: {path} cannot be read: {one_line(error)}") from error


# Opens a file and not what a link leads to, without waiting for the other end of a pipe; 0 where a system cannot.
_FILE_ITSELF = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if hasattr(os, "O_NOFOLLOW") else 0


@functools.lru_cache(maxsize=100_000)
def _stays(root: str, folder: str) -> bool:
    """Whether a folder, whatever links lead to it, lies under another one, as it was when it was first asked."""
    top = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(folder), top]) == top


class _Handle:
    """A descriptor that is closed when nobody holds it any more: threads may still read what the cache let go."""

    def __init__(self, path: str):
        self.descriptor = opening.open_descriptor(path)
        self.found = os.fstat(self.descriptor)

    # `close` is bound here: at the end of a process the module `os` may be gone before the last descriptor.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class Handles:
    """The local files opened last, for reading at any place from several threads.

    Args:
      size: files kept open.
    """

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[str, _Handle] = collections.OrderedDict()

    def read(self, path: str, start: int, length: int, unchanged: tuple[int, str] | None = None) -> bytes:
        """Up to `length` bytes from `start` on.

        Args:
          path: on a disk.
          start: of the first byte.
          length: fewer come back where the file ends before.
          unchanged: the size and version (see File) that the file must still have.

        Raises:
          OSError: the file cannot be read.
          DataError: it is not `unchanged`.
        """
        now = os.stat(path)
        with self._lock:
            handle = self._open.get(path)
            if handle is None or not os.path.samestat(handle.found, now):  # another file was moved over it
                handle = self._open[path] = _Handle(path)
                now = handle.found
                if len(self._open) > self._size:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
        if unchanged is not None and (now.st_size, str(now.st_mtime_ns)) != unchanged:
            raise DataError(overwritten(path))
        parts = []
        while length and (part := os.pread(handle.descriptor, length, start)):  # it returns less than asked past 2 GiB
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


# Of all sources of a process: many systems let it open 1,024 files.
HANDLES = Handles(256)


def overwritten(path: str) -> str:
    """What is said of a file that is no longer what it was when the source was opened."""
    return f"{path} was overwritten after it was opened: start the run again, with files that stay as they are"


def each(function: Callable[[Any], Any], items: Sequence[Any], what: str, unit: str) -> list[Any]:
    """The function of every item, in threads that mostly wait, with a progress bar where there are many."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(function, items)
        return list(tqdm.tqdm(results, what, len(items), unit=f" {unit}", disable=len(items) < 100, leave=False))
