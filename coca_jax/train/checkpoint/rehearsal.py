"""A small checkpoint before there is anything to lose: a workdir that can hold none is refused before training."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from coca_jax import config
from coca_jax.data.addresses import absolute, remedy
from coca_jax.distributed import gather, is_first
from coca_jax.train.checkpoint.folder import UNFINISHED
from coca_jax.train.checkpoint.paths import FOLDER, CheckpointError, one_line
from coca_jax.train.checkpoint.store import GIVE_UP, Checkpoints


class _Trial(Checkpoints):
    def save_zeros(self, mesh: Mesh) -> str:
        """Saves an array that is spread over all devices. Returns what went wrong; empty: it was read back."""
        zeros = np.zeros((mesh.size, 256), np.float32)
        spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        array = jax.make_array_from_callback(zeros.shape, spread, lambda index: zeros[index])
        self._write(0, {"trial": array}, {"position": 0})
        self._settle(GIVE_UP)
        if self._failure:
            return self._failure.problem
        return f"it is still being written after {GIVE_UP} s" if self._save else ""

    def _say_failure(self, wait: float) -> None:
        """It is said once, by who has called."""


_COMPRESSED = 0.8  # a checkpoint's bytes on a disk, as a share of its arrays' bytes, at the least


def rehearse(workdir: epath.PathLike, mesh: Mesh, size: int = 0) -> None:
    """Makes a small checkpoint in the way of all others, reads it back and removes it; compiles nothing.

    To be called by all processes, before anything is trained.

    Args:
      workdir: Folder or bucket of the run.
      mesh: Device mesh of the run.
      size: Bytes of the arrays in a checkpoint of the run, for which a disk must have room.

    Raises:
      CheckpointError: it could not be made, and so no other will be: says where, why, and what to do.
    """
    folder = absolute(workdir) / FOLDER / f"trial{UNFINISHED}"  # which the next start removes, after a kill
    problem = _by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    problem = problem or _by_first(lambda: _check_room(folder, size))
    if not problem:
        with _Trial(folder, config.Checkpoint()) as trial:
            problem = trial.save_zeros(mesh)
    left = _by_first(lambda: folder.rmtree(missing_ok=True))
    if problem := problem or left:
        raise CheckpointError(
            f"--workdir={os.fspath(workdir)} cannot hold checkpoints: a small one could not be saved and read back "
            f"({problem}): {remedy(problem)}, or use another --workdir"
        )


def _check_room(folder: epath.Path, size: int) -> None:
    """Raises OSError where a disk has no room for a checkpoint. A bucket has."""
    if "://" not in os.fspath(folder) and (free := shutil.disk_usage(folder).free) < _COMPRESSED * size:
        what = f"{os.strerror(errno.ENOSPC)}: a checkpoint has {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, what)


def _by_first(change: Callable[[], object]) -> str:
    """What goes wrong where the first process changes something, in all of them; empty: nothing."""
    problem = ""
    if is_first():
        try:
            change()
        except Exception as error:  # of buckets, of many kinds
            problem = one_line(error)
    return str(gather(problem)[0])
