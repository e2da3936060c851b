"""Addresses in the place of paths: which are read and written, and what has to be installed for them."""

from __future__ import annotations

import importlib.util
import os

import fsspec
from etils import epath

from coca_jax.data.records import DataError

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # of this package, by scheme


def check(path: epath.PathLike) -> None:
    """Raises DataError for an address that epath does not know, or whose package is not installed. Asks no store."""
    text = os.fspath(path)
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
