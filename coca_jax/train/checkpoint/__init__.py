"""Checkpoints: parameters, optimiser, step, PRNG key and data position together, checked leaf by leaf.

paths.py     where things are, and CheckpointError
store.py     Checkpoints: save, restore, fall back, keep
rehearsal.py a small checkpoint before training begins
digest.py    digests of arrays that do not depend on the mesh
manifest.py  what is in a step, and whether it still is
verify.py    reads a step back
tree.py      the tree that is saved
workdir.py   config.json, and what was saved beside the arrays
lock.py      one run in a workdir
"""

from coca_jax.train.checkpoint.lock import Lock, Locked
from coca_jax.train.checkpoint.paths import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    CheckpointError,
    absolute,
    reachable,
    workdir_at,
)
from coca_jax.train.checkpoint.rehearsal import rehearse
from coca_jax.train.checkpoint.store import Checkpoints
from coca_jax.train.checkpoint.workdir import check_config, keep_config, read_config, saved_place

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILE",
    "CheckpointError",
    "Checkpoints",
    "Lock",
    "Locked",
    "absolute",
    "check_config",
    "keep_config",
    "reachable",
    "read_config",
    "rehearse",
    "saved_place",
    "workdir_at",
]
