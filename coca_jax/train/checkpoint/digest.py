"""Digests of arrays that do not depend on how the arrays are cut up and spread.

The digest of a leaf is a sum over its elements modulo 2^64 (multilinear hashing, e.g. Lemire and Kaser, "Strongly
universal string hashing is fast", 2014): the bits of the element at [i, j, ...], as an integer, times w_0(i) w_1(j)
..., where the weights are odd 64-bit numbers drawn from (axis, index). So each process adds up the shards that it
holds, and the sum of their sums is the leaf's, on any mesh. As the weights are odd, one flipped bit always changes the
sum; what else goes wrong by accident is missed about once in 2^32 times or less. It is no defence against malice.

8-byte elements count as two 4-byte ones on one more axis. Cost: docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from coca_jax.sharding import path_of

NAME = "multilinear-64"
_MASK = (1 << 64) - 1
_ROW = 1 << 16  # weights of trailing axes that are multiplied out beforehand, at most
Sums = dict[str, dict[int, int]]  # path -> replica -> sum of the shards of that replica


def of_array(array: np.ndarray, start: Sequence[int] = ()) -> int:
    """The sum over an array, or over a block of a larger one.

    Args:
      array: of any shape and of a type of 1, 2, 4 or 8 bytes.
      start: index of the block's first element; empty: all zeros.
    """
    words = np.ascontiguousarray(array).reshape(array.shape)  # the first makes a scalar `[1]`
    start = [*(start or [0] * array.ndim), 0]
    if array.dtype.itemsize == 8:
        words = words.reshape(*array.shape, 1).view(np.uint32)
    else:
        words = words.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    if not words.size:
        return 0
    weights = [_weights(axis, start[axis], words.shape[axis]) for axis in range(words.ndim)]
    row = np.ones(1, np.uint64)
    while weights and len(row) * len(weights[-1]) <= max(_ROW, (words.shape or (1,))[-1]):
        row = np.multiply.outer(weights.pop(), row).reshape(-1)
    head = np.ones(1, np.uint64)
    for weight in weights:
        head = np.multiply.outer(head, weight).reshape(-1)
    sums = np.einsum("rc,c->r", words.reshape(-1, len(row)), row, dtype=np.uint64, casting="safe")
    return int(np.sum(sums * head, dtype=np.uint64))


def of_process(tree: Any) -> Sums:
    """The sums over what this process holds of a tree of arrays.

    A block that lies on several devices of the process is read from the first of them, and counted for all replicas
    that they are: the sums of one replica over all processes are the leaf's, and those of all replicas must be equal.
    """
    paths = [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for _, leaf in paths:
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                shard.data.copy_to_host_async()
    # NumPy lets go of the interpreter while it adds.
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 4))) as pool:
        return dict(zip((path for path, _ in paths), pool.map(_of_leaf, (leaf for _, leaf in paths)), strict=True))


def _of_leaf(leaf: Any) -> dict[int, int]:
    if not isinstance(leaf, jax.Array):
        return {0: of_array(np.asarray(leaf))}
    blocks: dict[tuple[int, ...], list[Any]] = {}
    for shard in leaf.addressable_shards:
        blocks.setdefault(tuple(s.start or 0 for s in shard.index), []).append(shard)
    sums: dict[int, int] = {}
    for start, shards in blocks.items():
        first = min(shards, key=lambda shard: shard.replica_id)
        value = of_array(np.asarray(first.data), start)
        for shard in shards:
            sums[shard.replica_id] = (sums.get(shard.replica_id, 0) + value) & _MASK
    return sums


def combined(everyone: Iterable[Mapping[str, Mapping[Any, int]]]) -> Sums:
    """The sums of the whole from those of each process (whose keys JSON may have made into texts)."""
    total: Sums = {}
    for sums in everyone:
        for path, replicas in sums.items():
            mine = total.setdefault(path, {})
            for replica, value in replicas.items():
                mine[int(replica)] = (mine.get(int(replica), 0) + value) & _MASK
    return total


def text(value: int) -> str:
    return f"{value:016x}"


def of_whole(sums: Sums) -> str:
    """One text for a whole tree, of `combined` sums: other paths or values, another text; the mesh changes nothing."""
    leaves = {path: text(replicas[min(replicas)]) for path, replicas in sums.items()}
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def _weights(axis: int, start: int, size: int) -> np.ndarray:
    """Odd uint64 `[size]`: splitmix64 of (axis, index)."""
    x = np.arange(start, start + size, dtype=np.uint64) + np.uint64(((axis + 1) << 48) + 1)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
