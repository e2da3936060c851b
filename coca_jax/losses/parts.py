"""How a large computation is done in parts: in slices one after the other, and each device its own shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.sharding import RULES, spec

Axes = tuple[str | None, ...]


def scan_in_slices(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, size: int) -> tuple[Any, Any]:
    """`jax.lax.scan` whose steps take `size` rows of xs and return as many; the last step takes what is left.

    Args:
      body: `(carry, rows of xs) -> (carry, rows of ys)`; called with two numbers of rows where size does not divide.
      carry: initial.
      xs: arrays with the same first axis.
      size: 1 or more.
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
    """Axes of the mesh that is set which split a logical axis, and how many shards that makes; () and 1 without."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), 1
    return RULES[axis], math.prod(mesh.shape[name] for name in RULES[axis])


def per_device(function: Callable[..., Any], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., Any]:
    """A function of each device's shards, as one of global arrays; inside, collectives may name the mesh's axes.

    It is for forward and backward passes that are both written out: nothing differentiates through it.

    Args:
      function: of arrays, returns a tuple of arrays or trees of them.
      inputs, outputs: logical axes of each; () is whole on every device.
    """
    in_specs, out_specs = (tuple(spec(*axes) for axes in arrays) for arrays in (inputs, outputs))
    # check_vma guards automatic differentiation, and there is none.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
