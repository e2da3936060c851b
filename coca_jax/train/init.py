"""A fresh state with some of its parameters given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from coca_jax.train.state import Parameters, TrainState


def with_parameters(state: TrainState, given: Parameters) -> TrainState:
    """The state with some parameters given, in the moving average too; the optimiser's state is as it was.

    Args:
      state: real. With several processes, all of them call it with the same.
      given: nested dict of arrays, some of the state's parameters; each device takes its shards of them, in the
        state's dtype. Arrays of JAX lie where the state's do, and are used up: the step may take their buffers.

    Raises:
      ValueError: a parameter is given that the state does not have, or of another shape.
    """
    flat = traverse_util.flatten_dict(given, sep="/")

    def put(tree: Parameters, *, copy: bool = False) -> Parameters:
        leaves = traverse_util.flatten_dict(tree, sep="/")
        for path, value in flat.items():
            if path not in leaves or leaves[path].shape != np.shape(value):
                here = f"of shape {leaves[path].shape} here" if path in leaves else "not a parameter here"
                raise ValueError(f"{path} is given with shape {np.shape(value)} and is {here}")
            placed = _shards(value, leaves[path])
            leaves[path] = jnp.copy(placed) if copy else placed
        nested: Parameters = traverse_util.unflatten_dict(leaves, sep="/")
        return nested

    changed: TrainState = state.replace(  # type: ignore[attr-defined]
        # Copied: the step gives each buffer away once.
        params=put(state.params),
        ema=None if state.ema is None else put(state.ema, copy=True),
    )
    return changed


def _shards(value: Any, like: jax.Array) -> jax.Array:
    if isinstance(value, jax.Array) and value.sharding == like.sharding:
        return value.astype(like.dtype)
    array = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])
