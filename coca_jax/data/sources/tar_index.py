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
import tempfile
from collections.abc import Iterator

import msgpack
import numpy as np

from coca_jax import cache
from coca_jax.data import opening
from coca_jax.data.records import DataError
from coca_jax.data.sources import files, patience, tar_samples, tar_walk
from coca_jax.data.sources.base import one_line
from coca_jax.data.sources.files import File
from coca_jax.data.sources.tar_samples import ROW, Counts, Samples
from coca_jax.data.sources.tar_walk import DamagedTar

SUFFIX = ".coca_jax_index"
# Raise it with every change of what is kept: an index of another version is made again.
_VERSION = 4
_MAGIC = b"CoCaTAR\n"
_HEAD = 4096  # bytes before the rows
_STREAM = 8 << 20  # bytes that a store is asked for at once while its headers are read

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
      counts: see tar_samples.remarks.
    """

    file: File
    index: str
    count: int
    problem: str
    whole: int
    counts: Counts = dataclasses.field(default_factory=dict, hash=False)


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
    rows, problem, whole, counts = _rows(file)
    head = {
        "version": _VERSION,
        "name": file.name,
        "size": file.size,
        "changed": file.version,
        "count": len(rows),
        "problem": problem,
        "whole": whole,
        "counts": counts,
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
        counts = {str(what): (int(count), str(name)) for what, (count, name) in found["counts"].items()}
        shard = Shard(file, path, int(found["count"]), str(found["problem"]), int(found["whole"]), counts)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, msgpack.UnpackException):
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


def _rows(file: File) -> tuple[np.ndarray, str, int, Counts]:
    """The rows of all samples, what is wrong with the file, how many samples are whole, and what else was found."""
    samples, problem, ends = Samples(file.size), "", False
    if not file.size:
        raise DataError(f"{file.path} has no bytes: download it again, or leave it out")
    try:
        with _reader(file) as read:
            start = read(0, 8)
            if packed := next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), ""):
                raise DataError(
                    f"{file.path} is packed with {packed}, and has to be read from its beginning: unpack it"
                )
            try:
                for member in tar_walk.walk(read, file.size, passed=samples.pass_over):
                    samples.add(member)
                ends = not read(max(0, file.size - tar_walk.BLOCK), tar_walk.BLOCK).strip(b"\0")
            except DamagedTar as error:
                problem = str(error)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {one_line(error)}") from error
    rows = samples.finish()
    if not rows and (problem.startswith("there is no tar header at byte 0") or file.size < tar_walk.BLOCK):
        raise DataError(f"{file.path} is no tar file: leave it out")
    lost = tar_samples.lost(rows) if rows and not ends else False
    if lost and not problem:
        problem = "it ends without the mark of its end"
    return tar_samples.array(rows), problem, len(rows) - lost, samples.counts
