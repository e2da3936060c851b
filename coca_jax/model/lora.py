"""Low-rank updates of kernels (Hu et al. 2021, arXiv 2106.09685): `kernel + alpha / rank * a @ b`.

The update of the kernel at PATH has its own parameters `lora/PATH/a` and `lora/PATH/b`. They are added to the kernel
before the model is applied, so the model needs no code for them. Only they have gradients and optimizer state; the
gradient of the full kernel is computed and dropped one layer stack at a time.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.sharding import low_rank_axes

Parameters = dict[str, Any]


def with_updates(c: config.Lora, params: Parameters, rng: Key[Array, ""]) -> Parameters:
    """Add low-rank updates for the kernels that `c.kernels` matches; they are zero until trained.

    Raises:
      ConfigError: A pattern matches no parameter, or one that is not a kernel.
    """
    if not c.rank:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = []
    for pattern in c.kernels:
        found = [path for path in flat if re.fullmatch(pattern, path)]
        others = [path for path in found if not path.endswith("/kernel")]
        if others or not found:
            what = f"matches {others[0]}, which is not a kernel" if others else "matches no parameter"
            example = ".*attention/(query|value)/kernel"
            raise ConfigError(f"config.lora.kernels: {pattern!r} {what}; example: {example!r}")
        chosen += found
    for number, path in enumerate(sorted(set(chosen))):
        kernel = flat[path]
        inputs, outputs = low_rank_axes(path)
        layers = kernel.ndim - len(inputs) - len(outputs)
        input_sizes = kernel.shape[layers : layers + len(inputs)]
        shape = (*kernel.shape[:layers], *input_sizes, c.rank)
        fan_in = 1
        for size in input_sizes:
            fan_in *= size
        initial = jax.random.normal(jax.random.fold_in(rng, number), shape, jnp.float32) * fan_in**-0.5
        flat[f"lora/{path}/a"] = initial
        flat[f"lora/{path}/b"] = jnp.zeros(
            (*kernel.shape[:layers], c.rank, *kernel.shape[layers + len(inputs) :]), jnp.float32
        )
    nested: Parameters = traverse_util.unflatten_dict(flat, sep="/")
    return nested


def merged(c: config.Lora, params: Parameters) -> Parameters:
    """The model's parameters with the low-rank updates added to their kernels and removed from the tree."""
    if not c.rank:
        return params
    flat = traverse_util.flatten_dict(params["lora"], sep="/")
    kernels = {path: leaf for path, leaf in traverse_util.flatten_dict(params, sep="/").items() if path[:5] != "lora/"}
    for path in sorted({name[:-2] for name in flat}):
        inputs, outputs = low_rank_axes(path)
        layers = "l" * (kernels[path].ndim - len(inputs) - len(outputs))
        i, o = "ijk"[: len(inputs)], "xyz"[: len(outputs)]
        update = jnp.einsum(f"{layers}{i}r,{layers}r{o}->{layers}{i}{o}", flat[f"{path}/a"], flat[f"{path}/b"])
        kernels[path] = kernels[path] + (c.alpha / c.rank * update).astype(kernels[path].dtype)
    nested: Parameters = traverse_util.unflatten_dict(kernels, sep="/")
    return nested
