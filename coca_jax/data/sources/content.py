"""Digests of a bounded part of what a source reads, by which a run notices that its data were changed between starts.

Times do not count: a copy of a data set has other ones. A change of a few bytes in the middle of a large file may be
missed; another order of its records, or another file of the same size, is not.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence

from coca_jax.data.records import DataError
from coca_jax.data.sources import files
from coca_jax.data.sources.base import Source, one_line
from coca_jax.data.sources.files import File

LIST = "the list of its files"  # names, sizes, counts
MISSING = "missing"
# On a disk, and in a store, where each piece is a request: files looked into, bytes of a piece, bytes in all.
_LOCAL = (128, 16 << 10, 8 << 20)
_REMOTE = (16, 64 << 10, 3 << 20)


_known: weakref.WeakKeyDictionary[Source, dict[str, str]] = weakref.WeakKeyDictionary()


def of_source(source: Source) -> dict[str, str]:
    """`source.contents()`, read once while the source is open. Raises DataError."""
    if source not in _known:
        _known[source] = dict(source.contents())
    return _known[source]


def of_files(found: Sequence[File]) -> dict[str, str]:
    """Digests of up to 128 of the files (16 in a store), by their names: of pieces evenly over each, its ends included.

    Raises:
      DataError: one cannot be read.
    """
    if not found:
        return {}
    found = list(dict.fromkeys(found))  # several parts of one file are read of it
    most, piece, total = _REMOTE if files.is_remote(found[0].path) else _LOCAL
    names = files.short_names(found)
    chosen = spread(len(found), most)

    def digest(number: int) -> str:
        try:
            return _of_file(found[number], piece, total // len(chosen))
        except DataError:
            raise
        except Exception as error:  # whatever a store's library raises
            raise DataError(f"{found[number].path} cannot be read: {one_line(error)}") from error

    return {names[n]: value for n, value in zip(chosen, files.each(digest, chosen, "comparing", "files"), strict=True)}


def of_named(root: str, names: Sequence[str]) -> dict[str, str]:
    """The same of files under a folder that data name; one that is not there is MISSING."""
    most, piece, total = _REMOTE if files.is_remote(root) else _LOCAL
    chosen = [names[n] for n in spread(len(names), most)]

    def digest(name: str) -> str:
        try:
            return _of_file(files.look(f"{root.rstrip('/')}/{name}"), piece, total // len(chosen))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return MISSING  # a bad example, at every start
        except DataError:
            raise
        except Exception as error:  # whatever a store's library raises
            raise DataError(f"{root}: {name[:200]!r} cannot be read: {one_line(error)}") from error

    return dict(zip(chosen, files.each(digest, chosen, "comparing", "files"), strict=True))


def spread(count: int, most: int) -> list[int]:
    """Up to `most` numbers below `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [number * (count - 1) // (most - 1) for number in range(most)]


def _of_file(file: File, piece: int, budget: int) -> str:
    found = hashlib.sha256(f"{file.size}\n".encode())
    for start, length in _pieces(file.size, piece, budget):
        if files.is_remote(file.path):
            system, inside = files.store(file.path)
            found.update(system.cat_file(inside, start=start, end=start + length))
        else:
            found.update(files.HANDLES.read(file.path, start, length))
    return found.hexdigest()[:16]


def _pieces(size: int, piece: int, budget: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read of a file."""
    if size <= max(budget, 2 * piece):
        yield from [(0, size)] if size else []
        return
    count = max(2, budget // piece)
    for number in range(count):
        yield number * (size - piece) // (count - 1), piece
