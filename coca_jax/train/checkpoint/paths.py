"""Where a workdir keeps what, and the error of one that cannot be used."""

from __future__ import annotations

import os

from etils import epath

from coca_jax.data import addresses
from coca_jax.data.addresses import absolute
from coca_jax.data.records import DataError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or made. The message names the folder, the leaf and the fix."""


def reachable(workdir: epath.PathLike) -> epath.Path:
    """`absolute` of a path that was named by a user.

    Raises:
      CheckpointError: it is an address that is not read here, or needs a package that is not installed.
    """
    try:
        addresses.check(workdir)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return absolute(workdir)


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is of an object store, where nothing is renamed in one go."""
    return "://" in os.fspath(path)


def one_line(error: BaseException) -> str:
    """What an error says, on one line, not longer than a reader would follow."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
