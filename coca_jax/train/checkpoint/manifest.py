"""manifest.json of a step: a digest of every leaf, of every file, and of itself.

It is written after everything else of the step, and before the rename (or the marker, in a bucket) by which the step
appears: a step of this format without one is damaged. The leaves' digests are of the arrays that were to be saved.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from coca_jax.data import addresses
from coca_jax.train.checkpoint import digest
from coca_jax.train.checkpoint.paths import is_bucket

FORMAT = 2  # of a step; 1 had no manifest, and `data` does not say so
FILE = "manifest.json"
MARKER = "commit_success.txt"  # Orbax's, written when all else is
STATE = "state"
# Written after the manifest: they must be there, and are not in it.
_LATER = (MARKER, "_CHECKPOINT_METADATA")
SMALL = 1 << 20  # bytes; in a bucket only files up to this are read again for their digest


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a leaf was when it was saved. `digest` is None where its copies were not equal."""

    shape: tuple[int, ...]
    dtype: str
    digest: str | None


@dataclasses.dataclass(frozen=True)
class File:
    """A file's size, and its SHA-256 unless it is a large one in a bucket."""

    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    step: int
    leaves: Mapping[str, Leaf]
    files: Mapping[str, File]


class Damaged(Exception):
    """A step is not what was saved. The message says what of it."""


def write(folder: epath.Path, step: int, leaves: Mapping[str, Leaf]) -> None:
    """Writes the manifest of a step whose other files are all there."""
    whole = not is_bucket(folder)
    files = {}
    for name, path in files_of(folder):
        if name != FILE and name not in _LATER:
            size = path.stat().length
            files[name] = File(size, sha256(path) if whole or size <= SMALL else None)
    content = {
        "format": FORMAT,
        "step": step,
        "digest": digest.NAME,
        "leaves": {path: dataclasses.asdict(leaf) for path, leaf in leaves.items()},
        "files": {name: dataclasses.asdict(file) for name, file in files.items()},
    }
    (folder / FILE).write_text(json.dumps(content | {"sha256": _own(content)}, indent=1))


def read(folder: epath.Path) -> Manifest:
    """Raises Damaged where it is missing, cut or changed; OSError where the storage does not answer."""
    path = folder / FILE
    try:
        content = json.loads(_read(path))
        own = content.pop("sha256")
        if own != _own(content):
            raise Damaged(f"{path} has changed since it was written")
        return Manifest(
            step=content["step"],
            leaves={
                name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["digest"])
                for name, leaf in content["leaves"].items()
            },
            files={name: File(**file) for name, file in content["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__})") from error


def check_files(folder: epath.Path, manifest: Manifest, *, whole: bool) -> Iterator[str]:
    """What is wrong with the files, one line each.

    Args:
      folder: of the step.
      manifest: of the step.
      whole: read all files that have a digest; else sizes, and digests of files up to SMALL.

    Raises:
      OSError: the storage does not answer.
    """
    for name in _LATER:
        if not (folder / name).exists():
            yield f"{folder / name} is missing"
    for name, file in manifest.files.items():
        path = addresses.path(folder) / name
        try:
            size = path.stat().length
            if size != file.bytes:
                yield f"{path} has {size} bytes and had {file.bytes}"
            elif file.sha256 and (whole or size <= SMALL) and sha256(path) != file.sha256:
                yield f"{path} has changed since it was written"
        except OSError as error:
            yield lost(path, error)


def lost(path: epath.Path, error: OSError) -> str:
    """What an error in reading a file says of the file; raises it where it speaks of the storage as a whole."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return f"{path} is missing"
    if error.errno == errno.EIO:
        return f"{path} cannot be read: {error.strerror}"
    raise error


def files_of(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    """Every file under a folder: its path from there, with slashes, and its path."""
    for path in sorted(addresses.path(folder).iterdir()):
        if path.is_dir():
            yield from files_of(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def sha256(path: epath.Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def _own(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: epath.Path) -> str:
    try:
        return str(path.read_text())
    except OSError as error:
        raise Damaged(lost(path, error)) from error
