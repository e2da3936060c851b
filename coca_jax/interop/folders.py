"""A folder that is whole or not there, and what is read from one: JSON and tensors, with errors that name the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from coca_jax.data import addresses, opening
from coca_jax.data.records import DataError
from coca_jax.interop.weights import ConversionError


@contextlib.contextmanager
def new_folder(folder: epath.PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A local folder to write into, which takes its name when the block ends, and is gone if it fails.

    Args:
      folder: that is to be; a bucket works, to which the files are then copied.
      overwrite: whether a folder of that name may be replaced; an empty one always may.

    Raises:
      ConversionError: there is something, or it cannot be written.
    """
    target = named(folder)
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file: name a folder that is to be made")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ConversionError(f"{target} is not empty: name another folder, or pass --overwrite to replace all of it")
    remote = "://" in os.fspath(folder) or os.fspath(target).startswith(("gs:", "s3:"))
    try:
        if remote:
            with tempfile.TemporaryDirectory() as scratch:
                yield pathlib.Path(scratch)
                _upload(pathlib.Path(scratch), target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            whole, before = pathlib.Path(scratch) / "new", pathlib.Path(scratch) / "old"
            whole.mkdir()
            yield whole
            try:
                if target.exists():
                    os.rename(target, before)
                os.rename(whole, target)
            except BaseException:  # Ctrl-C too: what was there would go with the scratch folder
                if before.exists() and not target.exists():
                    os.rename(before, target)
                raise
    except OSError as error:
        raise ConversionError(f"{target} cannot be written: {error}") from error


def named(path: epath.PathLike) -> epath.Path:
    """A path that was named by a user. Raises ConversionError for an address that cannot be read or written here."""
    try:
        addresses.check(path)
    except DataError as error:
        raise ConversionError(str(error)) from error
    return addresses.path(path)


def check_file(path: epath.PathLike) -> None:
    """Raises ConversionError where a path is no regular file; nothing is read, and no pipe is waited for."""
    try:
        if "://" not in os.fspath(path):
            opening.check_file(path)
        elif not addresses.path(path).is_file():
            raise FileNotFoundError
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (OSError, DataError) as error:
        raise ConversionError(str(error)) from error


def _upload(folder: pathlib.Path, target: epath.Path) -> None:
    if target.exists():
        target.rmtree()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            to = target / file.relative_to(folder).as_posix()
            to.parent.mkdir(parents=True, exist_ok=True)
            addresses.path(file).copy(to, overwrite=True)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """An object of a JSON file. Raises ConversionError where it is missing or damaged."""
    check_file(path)
    try:
        values = json.loads(opening.read(path, what="a configuration"))
    except opening.UnusableFile as error:
        raise ConversionError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is damaged ({error}): write or copy it again") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} is a JSON {type(values).__name__}, not an object")
    return values


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of their dtypes (bfloat16 too), by name.

    Raises:
      ConversionError: it is missing, cut off or no safetensors.
    """
    check_file(path)
    try:
        with local_copy(addresses.path(path)) as file:
            return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConversionError(f"{path} is cut off or no safetensors ({error}): copy it again") from error


def write_tensors(path: pathlib.Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes arrays, of numpy or JAX, as a safetensors file."""
    # np.array with an order, not ascontiguousarray, which gives a scalar an axis.
    arrays = {name: np.array(tensor, order="C", copy=None) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what the user's umask says; safetensors makes a file that nobody else can read
    safetensors.numpy.save_file(arrays, path, metadata)
    path.chmod(mode)


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[pathlib.Path]:
    """The file itself where it is local; else a copy, for libraries that read none but local files."""
    if isinstance(path, pathlib.Path) and path.exists():
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / path.name
        path.copy(file)
        yield file


def sha256(path: epath.PathLike) -> str:
    """Of a file's content, in hexadecimal digits."""
    check_file(path)
    with addresses.path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
