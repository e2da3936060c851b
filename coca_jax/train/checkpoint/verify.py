"""Reads a step back, and says what of it is not what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from coca_jax.sharding import path_of
from coca_jax.train.checkpoint import digest, manifest
from coca_jax.train.checkpoint.manifest import Damaged, Leaf
from coca_jax.train.checkpoint.paths import one_line

_AT_A_TIME = 1 << 28  # bytes of leaves that are held


def saved_leaves(folder: epath.Path) -> tuple[Any, dict[str, Any]]:
    """The tree of a saved state, and its leaves by path: Orbax's metadata, with shape and dtype."""
    # The handler and not a Checkpointer, which warns that a part of a checkpoint has no description of its own.
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / manifest.STATE).tree
    return tree, {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_step(folder: epath.Path, progress: Callable[[int], Any] = lambda _: None) -> list[str]:
    """Reads all of a step. What is wrong with it, one line each; nothing: it is what was saved.

    Args:
      folder: of the step; it must have a manifest.
      progress: called with the bytes that were read, as it goes.

    Raises:
      Damaged: it has no manifest, or a damaged one.
      OSError: the storage does not answer.
    """
    written = manifest.read(folder)
    wrong = list(manifest.check_files(folder, written, whole=True))
    return wrong + list(check_leaves(folder, written.leaves, progress))


def check_leaves(
    folder: epath.Path, leaves: Mapping[str, Leaf], progress: Callable[[int], Any] = lambda _: None
) -> Iterator[str]:
    """Reads leaves, all there are or some, and compares their digests; yields a line for each that differs."""
    try:
        tree, saved = saved_leaves(folder)
    except Exception as error:  # of many kinds: files, JSON, zarr
        yield f"{folder / manifest.STATE} cannot be read: {one_line(error)}"
        return
    yield from (f"leaf {path} is missing" for path in leaves if path not in saved)
    group: list[str] = []
    held = 0
    for path in (present := [path for path in leaves if path in saved]):
        group.append(path)
        held += _size(leaves[path])
        if held >= _AT_A_TIME or path == present[-1]:
            yield from _check_group(folder, tree, group, leaves)
            progress(held)
            group, held = [], 0


def _check_group(folder: epath.Path, tree: Any, paths: list[str], leaves: Mapping[str, Leaf]) -> Iterator[str]:
    try:
        read = _read(folder, tree, paths)
    except Exception as error:  # tensorstore's are ValueErrors
        if len(paths) == 1:
            yield f"leaf {paths[0]} cannot be read: {one_line(error)}"
            return
        for path in paths:
            yield from _check_group(folder, tree, [path], leaves)
        return
    for path in paths:
        found = digest.text(digest.of_array(read[path]))
        yield from compare(path, leaves[path], read[path].shape, found)


def compare(path: str, leaf: Leaf, shape: tuple[int, ...], found: str) -> Iterator[str]:
    """A line where a leaf's shape or digest is another."""
    if tuple(shape) != leaf.shape:
        yield f"leaf {path} is {tuple(shape)} and was {leaf.shape}"
    elif leaf.digest is not None and found != leaf.digest:
        yield f"leaf {path} is not what was saved: its digest is {found} and was {leaf.digest}"


def _read(folder: epath.Path, tree: Any, paths: list[str]) -> dict[str, np.ndarray]:
    """Some leaves as host arrays, in the type they were saved in; no other process is waited for."""
    wanted = set(paths)
    marked = jax.tree_util.tree_map_with_path(lambda path, _: 0 if path_of(path) in wanted else ocp.PLACEHOLDER, tree)
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = ocp.PyTreeCheckpointHandler().restore(
        folder / manifest.STATE, args=ocp.args.PyTreeRestore(item=marked, restore_args=plain)
    )
    found = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(read)}
    return {path: np.asarray(found[path]) for path in paths}


def _size(leaf: Leaf) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * jax.numpy.dtype(leaf.dtype).itemsize


def state_of(folder: epath.Path) -> tuple[str, int]:
    """In a word what a step is, `verified` excluded, and its bytes: `manifest`, `unverified` (older) or `damaged`."""
    size = sum(path.stat().length for _, path in manifest.files_of(folder))
    try:
        manifest.read(folder)
        return "manifest", size
    except Damaged:
        return ("damaged" if is_of_format(folder) else "unverified"), size


def is_of_format(folder: epath.Path) -> bool:
    """Whether a step was written with a manifest, or says that it was."""
    if (folder / manifest.FILE).exists():
        return True
    try:
        return int(json.loads((folder / "data" / "metadata").read_text()).get("format", 1)) >= manifest.FORMAT
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False
