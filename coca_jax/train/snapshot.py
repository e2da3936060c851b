"""A copy of the state, so that a checkpoint is written from it while the device makes the next step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from coca_jax.distributed import gather
from coca_jax.train import guard as guards
from coca_jax.train.state import TrainState

_MARGIN = 1.2  # of the copy's size must be free: memory is in pieces


class Snapshot(NamedTuple):
    """A state that is to be saved.

    Attributes:
      state: the copy, or the state itself.
      finite: whether all its parameters, moments and averages are finite.
      copied: whether it is a copy, which the next step leaves alone.
    """

    state: TrainState
    finite: Bool[Array, ""]
    copied: bool

    def drop(self) -> None:
        """Gives the copy's memory back now; what has references to it keeps it."""
        if self.copied:
            for leaf in jax.tree.leaves(self.state):
                leaf.delete()


class Snapshots:
    """Takes copies where the devices have room for one beside the step's memory, and is the state itself where not.

    All processes call the same methods at the same steps.
    """

    def __init__(self, abstract: TrainState) -> None:
        """
        Args:
          abstract: shapes, dtypes and shardings of the state.
        """
        self._abstract = abstract
        self._copy: Any = jax.jit(_copied, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None))
        self._room: bool | None = None

    def prepare(self) -> None:
        """Compiles the copy; to be called when one step is done, while the device is busy with the next."""
        if self._has_room():
            self._copy = self._copy.lower(self._abstract).compile()

    def take(self, state: TrainState) -> Snapshot:
        """Dispatches the copy of a state, which is there when the steps before it are made."""
        if self._room is None:
            jax.block_until_ready(state)
        if self._has_room():
            copy, finite = self._copy(state)
            return Snapshot(copy, finite, copied=True)
        return Snapshot(state, guards.finite(_numbers(state)), copied=False)

    def _has_room(self) -> bool:
        """Asked once, after a step, whose memory is counted then."""
        if self._room is None:
            size = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(_numbers(self._abstract)))
            self._room = all(gather(free_bytes() > _MARGIN * size))
        return self._room


def free_bytes() -> float:
    """What is left at the peak of each of this process's devices, the least of them; infinite where nobody can tell.

    CPU devices share what their host has available (Linux says), of which Orbax takes a copy too.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = [float(one["bytes_limit"] - one["peak_bytes_in_use"]) for one in stats if "bytes_limit" in one]
    memory = Path("/proc/meminfo")
    if not free and memory.exists():
        available = next(line for line in memory.read_text().splitlines() if line.startswith("MemAvailable:"))
        free.append(1024 * int(available.split()[1]) / 2 / len(stats))
    return min(free, default=math.inf)


def _copied(state: TrainState) -> tuple[TrainState, Bool[Array, ""]]:
    return jax.tree.map(jnp.copy, state), guards.finite(_numbers(state))


def _numbers(state: TrainState) -> Any:
    return state.params, state.opt_state, state.ema


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
