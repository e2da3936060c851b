"""Paths and addresses that a user gives: which are read and written, and what has to be installed for them."""

from __future__ import annotations

import errno
import glob
import importlib.util
import os
import stat
from collections.abc import Iterator
from typing import Any, Self

import fsspec
from etils import epath
from etils.epath import gpath, stat_utils

from coca_jax.data.records import DataError

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # of this package, by scheme


class LocalPath(gpath.PosixGPath):
    """A path on a disk whose name is never a pattern, and whose owner needs no name.

    etils looks up the names of a file's owner and group in `stat`, which fails where the system knows none (containers,
    network folders), takes a folder's own name as a part of the pattern in `glob`, and leaves out names that end in ~
    in `iterdir`, and takes /gs/... for gs://... `epath.Path` hands this class on as it is, and so do Orbax and TFDS.
    """

    _uri_scheme = None

    def stat(self) -> stat_utils.StatResult:
        found = os.stat(self)
        mode = found.st_mode
        return stat_utils.StatResult(stat.S_ISDIR(mode), found.st_size, int(found.st_mtime), mode=mode)

    def glob(self, pattern: str) -> Iterator[Self]:
        for name in glob.iglob(pattern, root_dir=os.fspath(self)):
            yield self / name

    def iterdir(self) -> Iterator[Self]:
        for name in os.listdir(self):
            yield self / name


def path(named: epath.PathLike) -> Any:
    """The path of what a user has named: a LocalPath, or an epath.Path of an address."""
    text = os.fspath(named)
    return epath.Path(text) if "://" in text else LocalPath(text)


def absolute(named: epath.PathLike) -> Any:
    """`path`, from the root of a file system, with the home folder for a ~ at its beginning; or a bucket's."""
    text = os.fspath(named)
    return path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def check(path: epath.PathLike) -> None:
    """Raises DataError for an address that epath does not know, or whose package is not installed. Asks no store."""
    text = os.fspath(path)
    if "\0" in text:
        raise DataError(f"{text!r} has a zero byte in it, which no file's name can have")
    scheme, separator, _ = text.partition("://")
    if not separator:
        return
    try:
        epath.Path(text)
        if importlib.util.find_spec("tensorflow") is None:  # through which epath goes where it is installed
            fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = f'; pip install "coca_jax[{_EXTRAS[scheme]}]"' if scheme in _EXTRAS else ""
        raise DataError(f"{text}: {' '.join(str(error).split())}{extra}") from error
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{text}: nothing is read from {scheme}:// or written to it: name a path on a disk, gs:// or s3://"
        ) from error


def remedy(problem: str) -> str:
    """What helps where a file could not be written, by what the system has said of it."""
    if any(os.strerror(code) in problem for code in (errno.ENOSPC, errno.EDQUOT)):
        return "make room"
    if any(os.strerror(code) in problem for code in (errno.EACCES, errno.EPERM, errno.EROFS)):
        return "make it writable"
    return "put that right"
