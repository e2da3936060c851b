"""What a checkpoint holds, as it lies on the disk: without the project's own reading, for tests."""

from __future__ import annotations

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


def arrays(workdir: str | os.PathLike[str], step: int) -> dict[str, np.ndarray]:
    """Every array of a step, by path."""
    folder = epath.Path(workdir) / "checkpoints" / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    restored = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }
