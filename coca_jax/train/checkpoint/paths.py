"""Where a workdir keeps what, and the error of one that cannot be used."""

from __future__ import annotations

import os

from etils import epath

from coca_jax.config import printing
from coca_jax.data import addresses
from coca_jax.data.addresses import absolute
from coca_jax.data.records import DataError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or made. The message names the folder, the leaf and the fix."""


def reachable(path: epath.PathLike) -> epath.Path:
    """`absolute` of a path that was named by a user.

    Raises:
      CheckpointError: it is an address that is not read here, or needs a package that is not installed.
    """
    try:
        addresses.check(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return absolute(path)


def workdir_at(path: epath.PathLike) -> epath.Path:
    """`reachable` of a workdir, where checkpoints can be read and written.

    Raises:
      CheckpointError: as `reachable`; or the libraries for checkpoints would take it for another path, write there, and
        find nothing where it is; or the system cannot look into it (no permission, a circle of links, a name that is
        too long), or it leads through a link to what is not there.
    """
    found = reachable(path)
    if is_bucket(found):
        return found
    name = printing.escaped(os.fspath(found))
    if odd := _mistaken(os.fspath(found)):
        raise CheckpointError(
            f"the workdir {name} has {odd}, which TensorStore and Orbax take "
            "for another path: rename it, or use another --workdir"
        )
    try:
        with os.scandir(found / FOLDER):
            return found
    except (FileNotFoundError, NotADirectoryError):  # a new one, or no folder: who makes it says that
        if link := next((one for one in (found, *found.parents) if os.path.lexists(one) and not one.exists()), None):
            where = printing.escaped(os.readlink(link))
            raise CheckpointError(
                f"the workdir {name} leads through a link, {printing.escaped(os.fspath(link))}, to {where}, which is "
                "not there (not mounted?): make it, or use another --workdir"
            ) from None
        return found
    except OSError as error:
        raise CheckpointError(
            f"the workdir {name} cannot be read ({one_line(error)}): mend that, or use another --workdir"
        ) from error


def _mistaken(path: str) -> str:
    """What there is in a path that TensorStore or Orbax changes; empty where they take it as it is."""
    if not path.isascii() and any("\ud800" <= char <= "\udfff" for char in path):
        return "a name that is not UTF-8"
    return next((f"{odd} in it" for odd in ("\\", "gs:/") if odd in path + "/"), "")


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is of an object store, where nothing is renamed in one go."""
    return "://" in os.fspath(path)


def one_line(error: BaseException) -> str:
    """What an error says, on one line, not longer than a reader would follow; what the system has said ends it."""
    text = printing.one_line(error)
    text = text.partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
    return text if len(text) <= 300 else f"{text[:147]}...{text[-150:]}"
