"""A fresh state with some of its parameters given."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from coca_jax.train.state import Parameters, TrainState


def with_parameters(state: TrainState, given: Parameters) -> TrainState:
    """The state with some parameters given, in the moving average too; the optimiser's state is as it was.

    Args:
      state: real. With several processes, all of them call it with the same.
      given: nested dict of numpy arrays, some of the state's parameters; each device takes its shards of them, in the
        state's dtype.

    Raises:
      ValueError: a parameter is given that the state does not have, or of another shape.
    """
    flat = traverse_util.flatten_dict(given, sep="/")

    def put(tree: Parameters) -> Parameters:
        leaves = traverse_util.flatten_dict(tree, sep="/")
        for path, value in flat.items():
            if path not in leaves or leaves[path].shape != np.shape(value):
                here = f"of shape {leaves[path].shape} here" if path in leaves else "not a parameter here"
                raise ValueError(f"{path} is given with shape {np.shape(value)} and is {here}")
            leaves[path] = _shards(value, leaves[path])
        nested: Parameters = traverse_util.unflatten_dict(leaves, sep="/")
        return nested

    changed: TrainState = state.replace(  # type: ignore[attr-defined]
        params=put(state.params), ema=None if state.ema is None else put(state.ema)
    )
    return changed


def _shards(value: Any, like: jax.Array) -> jax.Array:
    array = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])
