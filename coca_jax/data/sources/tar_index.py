"""Where the samples of a tar shard lie: an index that is made once and kept in a file of its own.

A row of 64 bytes tells the places of a sample's members. Rows are read one at a time and keys not at all (the headers
have them), so that a set of any size opens in the time that it takes to look at its shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import msgpack
import numpy as np

from coca_jax import cache
from coca_jax.data import opening
from coca_jax.data.records import DataError
from coca_jax.data.sources import files, patience, tar_walk
from coca_jax.data.sources.base import IMAGE_EXTENSIONS, MAX_BYTES, one_line
from coca_jax.data.sources.files import File
from coca_jax.data.sources.tar_walk import DamagedTar, Member

SUFFIX = ".coca_jax_index"
# Raise it with every change of what is kept: an index of another version is made again.
_VERSION = 3
_MAGIC = b"CoCaTAR\n"
_HEAD = 4096  # bytes before the rows
_STREAM = 8 << 20  # bytes that a store is asked for at once while its headers are read

# The members of a sample. Of each: offset of its bytes, their number, and how many bytes of header precede them.
IMAGE, TEXT, JSON, CLASS = range(4)
_MEMBERS = {extension: IMAGE for extension in IMAGE_EXTENSIONS} | {"txt": TEXT, "json": JSON, "cls": CLASS}
ROW = np.dtype([("offset", "<u8", 4), ("size", "<u4", 4), ("header", "<u4", 4)])
# In place of a header's size: the member is not there; it is there and cut off, or too large.
ABSENT, CUT, LARGE = 0, 1, 2

_Row = tuple[list[int], list[int], list[int]]

# WebDataset's rule: a key is the path up to the first dot of the last part, and what follows says what the file is.
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
# What files begin with that look like a tar and are packed once more.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tar file and its index.

    Attributes:
      file: the tar file.
      index: path of the index on a disk.
      count: samples.
      problem: what is wrong with the tar file; empty where it is whole.
      whole: samples before the one that the problem cuts off.
    """

    file: File
    index: str
    count: int
    problem: str
    whole: int


def split_name(name: str) -> tuple[str, str]:
    """Key and extension (in lower case) of a member's name; both empty where it is not part of a sample."""
    found = _KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def kind_of(extension: str) -> int | None:
    """IMAGE, TEXT, JSON or CLASS; None where the extension is of another kind."""
    return _MEMBERS.get(extension)


def find(file: File) -> Shard | None:
    """The shard, if an index of it as it is now is there. Raises nothing: an index that is damaged is not there."""
    for path in _places(file):
        with contextlib.suppress(OSError):
            if (shard := _opened(path, file)) is not None:
                return shard
    if files.is_remote(file.path):  # another host may have left it beside the shard
        with contextlib.suppress(OSError):
            system, inside = files.store(file.path + SUFFIX)
            if content := system.cat_file(inside):
                path = _places(file)[0]
                _write(path, content)
                return _opened(path, file)
    return None


def build(file: File) -> Shard:
    """The shard, whose index is made where it is not there yet.

    Raises:
      DataError: it cannot be read, is no tar file, or the index can be written nowhere.
    """
    if (shard := find(file)) is not None:  # another process was quicker
        return shard
    rows, problem, whole = _rows(file)
    head = {
        "version": _VERSION,
        "name": file.name,
        "size": file.size,
        "changed": file.version,
        "count": len(rows),
        "problem": problem,
        "whole": whole,
    }
    packed = msgpack.packb(head, unicode_errors="surrogateescape")
    content = (_MAGIC + len(packed).to_bytes(4, "little") + packed).ljust(_HEAD, b"\0") + rows.tobytes()
    if files.is_remote(file.path):
        with contextlib.suppress(Exception):  # beside it for other hosts, where the store lets us: each fails otherwise
            system, inside = files.store(file.path + SUFFIX)
            system.pipe_file(inside, content)
    errors = []
    for path in _places(file):
        try:
            _write(path, content)
        except OSError as error:
            errors.append(one_line(error))
        else:
            if (shard := _opened(path, file)) is not None:
                return shard
    raise DataError(
        f"{file.path}: its index can be written nowhere ({'; '.join(errors)}): set COCA_JAX_CACHE to a folder"
    )


def row(shard: Shard, number: int) -> np.ndarray:
    """The row of a sample, a ROW. Raises DataError where the index is gone or damaged."""
    try:
        data = files.HANDLES.read(shard.index, _HEAD + number * ROW.itemsize, ROW.itemsize)
    except OSError as error:
        raise DataError(f"{shard.index}, the index of {shard.file.path}, is gone: start the run again") from error
    if len(data) != ROW.itemsize:
        raise DataError(f"{shard.index}, the index of {shard.file.path}, is cut off: remove it and start the run again")
    return np.frombuffer(data, ROW)[0]


# ---------------------------------------------------------------------------------------------------------------------


def _places(file: File) -> list[str]:
    """Where an index may lie on a disk: beside the shard, and in the cache folder."""
    path = file.path if files.is_remote(file.path) else os.path.abspath(file.path)
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    cached = os.fspath(cache.folder() / "tar_index" / name[:2] / f"{name[2:34]}{SUFFIX}")
    return [cached] if files.is_remote(file.path) else [path + SUFFIX, cached]


def _opened(path: str, file: File) -> Shard | None:
    with opening.open_file(path) as index:
        head = index.read(_HEAD)
        size = os.fstat(index.fileno()).st_size
    try:
        length = int.from_bytes(head[8:12], "little")
        if head[:8] != _MAGIC or length > _HEAD - 12:
            return None
        found = msgpack.unpackb(head[12 : 12 + length], unicode_errors="surrogateescape")
        wanted = (_VERSION, file.name, file.size, file.version)
        if tuple(found[key] for key in ("version", "name", "size", "changed")) != wanted:
            return None
        shard = Shard(file, path, int(found["count"]), str(found["problem"]), int(found["whole"]))
    except (ValueError, KeyError, TypeError, OverflowError, msgpack.UnpackException):
        return None
    return shard if size == _HEAD + shard.count * ROW.itemsize else None


def _write(path: str, content: bytes) -> None:
    folder = pathlib.Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    # Under another name first: an index that is half written must not be found.
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=SUFFIX, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        os.chmod(temporary, 0o644)  # temporary files are their owner's alone; shards are shared
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _reader(file: File) -> Iterator[tar_walk.Read]:
    if not files.is_remote(file.path):
        with opening.open_file(file.path) as opened:
            descriptor = opened.fileno()
            yield lambda start, length: os.pread(descriptor, length, start)
        return
    system, inside = files.store(file.path)
    # As one stream: pictures are smaller than what a request for each header would cost.
    stream = patience.patiently(
        lambda: system.open(inside, "rb", block_size=_STREAM, cache_type="readahead"), file.path
    )
    with stream as remote:

        def read(start: int, length: int) -> bytes:
            remote.seek(start)
            return remote.read(length)

        yield lambda start, length: patience.patiently(lambda: read(start, length), file.path)


def _rows(file: File) -> tuple[np.ndarray, str, int]:
    """The rows of all samples, what is wrong with the file, and how many samples are whole."""
    rows: list[_Row] = []
    last_key, problem = None, ""
    extensions = set[str]()  # of the last sample
    try:
        with _reader(file) as read:
            start = read(0, 8)
            if packed := next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), ""):
                raise DataError(
                    f"{file.path} is packed with {packed}, and has to be read from its beginning: unpack it"
                )
            try:
                for member in tar_walk.walk(read, file.size):
                    key, extension = split_name(member.name)
                    which = kind_of(extension) if key else None
                    if which is None:
                        continue
                    # A name that comes again begins another sample: shards that were joined may repeat their keys.
                    if key != last_key or extension in extensions:
                        rows.append(([0] * 4, [0] * 4, [ABSENT] * 4))
                        last_key, extensions = key, set()
                    extensions.add(extension)
                    if rows[-1][2][which] == ABSENT:  # the first of several pictures is the sample's
                        _place(rows[-1], which, member, file.size)
                if not read(file.size - tar_walk.BLOCK, tar_walk.BLOCK).strip(b"\0"):
                    return _array(rows), "", len(rows)
            except DamagedTar as error:
                problem = str(error)
                if not rows and problem.startswith("there is no tar header at byte 0"):
                    raise DataError(f"{file.path} is no tar file: leave it out") from None
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {one_line(error)}") from error
    lost = _lost(rows) if rows else False
    if lost and not problem:
        problem = "it ends without the mark of its end"
    return _array(rows), problem, len(rows) - lost


def _array(rows: list[_Row]) -> np.ndarray:
    return np.array(rows, ROW) if rows else np.zeros(0, ROW)


def _lost(rows: list[_Row]) -> bool:
    """Whether the last sample of a file that has no end lacks what the one before has; marks that as cut off."""
    headers = rows[-1][2]
    usual = [which for which in range(4) if rows[-2][2][which] != ABSENT] if len(rows) > 1 else [IMAGE, TEXT]
    for which in usual:
        if headers[which] == ABSENT:
            headers[which] = CUT
    return CUT in headers


def _place(row: _Row, which: int, member: Member, size: int) -> None:
    offsets, sizes, headers = row
    if member.offset + member.size > size:
        headers[which] = CUT
    elif member.size > MAX_BYTES:
        headers[which] = LARGE
    else:
        offsets[which], sizes[which] = member.offset, member.size
        headers[which] = member.offset - member.header
