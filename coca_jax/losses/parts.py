"""Split a large computation: into slices that run in sequence, and into each device's shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.sharding import RULES, spec

Axes = tuple[str | None, ...]


def scan_in_slices(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, size: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over slices of `size` rows; the last step takes the remaining rows.

    Args:
      body: `(carry, rows of xs) -> (carry, rows of ys)`; compiled for two row counts if `size` does not divide the
        rows.
      carry: Initial carry.
      xs: Arrays with equal first axis.
      size: Rows per slice, 1 or more.
    """
    rows = len(jax.tree.leaves(xs)[0])
    if rows <= size:
        return body(carry, xs)
    whole = rows // size * size
    slices = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), xs)
    carry, ys = jax.lax.scan(body, carry, slices)
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if whole < rows:
        carry, rest = body(carry, jax.tree.map(lambda a: a[whole:], xs))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
    return carry, ys


def mesh_axes(axis: str) -> tuple[tuple[str, ...], int]:
    """Mesh axes that split a logical axis, and the number of shards; () and 1 if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), 1
    return RULES[axis], math.prod(mesh.shape[name] for name in RULES[axis])


def per_device(function: Callable[..., Any], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., Any]:
    """Turn a function of each device's shards into one of global arrays; collectives inside may name mesh axes.

    For hand-written forward and backward passes: the result is not differentiable.

    Args:
      function: Takes arrays and returns a tuple of arrays or trees of arrays.
      inputs, outputs: Logical axes of each array; () means replicated.
    """
    in_specs, out_specs = (tuple(spec(*axes) for axes in arrays) for arrays in (inputs, outputs))
    # check_vma only matters for automatic differentiation.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
