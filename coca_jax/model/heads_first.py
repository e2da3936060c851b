"""Softmax attention by XLA with heads in front of positions, `[b, h, s, k]`, as its products read them.

`jax.nn.dot_product_attention` keeps positions in front. XLA for CPUs then turns an operand around before most of its
products, there and back, and once more for the gradients of biases (docs/log.md).

Axes: b batch, s queries of an attention (tokens), m its keys, h heads, k head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from coca_jax.model.products import copied

# The score of what is not allowed. Not infinity: a query that sees no key has equal weights and not NaN, as in JAX's.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)


def attend(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Bool[Array, "*b #h #s m"] | None = None,
    *,
    is_causal: bool = False,
) -> Float[Array, "b s h k"]:
    """`softmax(query keys^T / sqrt(k)) values` for each head, of float32 (Vaswani et al. 2017, section 3.2.1).

    Its backward pass is that of Dao et al. 2022 (FlashAttention, arXiv 2205.14135, appendix B.2) with the weights kept:
    what the softmax takes off a row of gradients is the product of the result and its gradient.

    Args:
      query, keys, values: float32. With products of lower precision the backward pass would need a choice of its own.
      allowed: True where query s may see key m; None: everywhere.
      is_causal: a query sees its own position and those before; s = m.
    """
    if is_causal:
        causal = jnp.tril(jnp.ones((1, 1, query.shape[1], keys.shape[1]), bool))
        allowed = causal if allowed is None else allowed & causal
    return _attend(query, keys, values, allowed)


def attend_cached(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b h m k"],
    values: Float[Array, "b h m k"],
    allowed: Bool[Array, "*b #h #s m"] | None = None,
) -> Float[Array, "b s h k"]:
    """What `attend` computes, of keys and values that lie as a cache holds them; any dtype, never differentiated."""
    shares = _shares(query.swapaxes(1, 2), keys, allowed).astype(values.dtype)
    return _multiply(shares, values, 3, 2, values.dtype).swapaxes(1, 2)


def _multiply(x: Array, y: Array, x_axis: int, y_axis: int, dtype: Any = jnp.float32) -> Array:
    """Products of the matrices of each head, summed up over one axis of each."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _shares(
    query: Float[Array, "b h s k"], keys: Float[Array, "b h m k"], allowed: Bool[Array, "*b #h #s m"] | None
) -> Float[Array, "b h s m"]:
    scores = _multiply(query, keys, 3, 3) * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = jnp.where(allowed, scores, HIDDEN)
    return jax.nn.softmax(scores, axis=-1)


@jax.custom_vjp
def _attend(query: Array, keys: Array, values: Array, allowed: Array | None) -> Array:
    mixed, _ = _forward(query, keys, values, allowed)
    return mixed


def _forward(query: Array, keys: Array, values: Array, allowed: Array | None) -> tuple[Array, Any]:
    query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
    shares = _shares(query, keys, allowed)
    mixed = _multiply(shares, values, 3, 2).swapaxes(1, 2)
    return mixed, (query, keys, values, allowed, shares, mixed)


def _backward(kept: Any, slopes: Array) -> tuple[Array, Array, Array, None]:
    query, keys, values, allowed, shares, mixed = kept
    taken = jnp.sum(mixed * slopes, axis=-1).swapaxes(1, 2)[..., None]
    slopes = slopes.swapaxes(1, 2)
    of_scores = shares * (_multiply(slopes, values, 3, 3) - taken) * query.shape[-1] ** -0.5
    if allowed is not None:
        of_scores = jnp.where(allowed, of_scores, 0)  # a query that sees no key has weights, and no gradient
    found = (
        _multiply(of_scores, keys, 3, 2),
        _multiply(copied(of_scores.swapaxes(2, 3)), query, 3, 2),
        _multiply(copied(shares.swapaxes(2, 3)), slopes, 3, 2),
    )
    d_query, d_keys, d_values = (x.swapaxes(1, 2) for x in found)
    return d_query, d_keys, d_values, None


_attend.defvjp(_forward, _backward)
