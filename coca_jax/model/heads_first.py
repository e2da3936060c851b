"""Softmax attention in XLA with the head axis before positions, `[b, h, s, k]`, the order its products need.

`jax.nn.dot_product_attention` keeps positions first. XLA for CPUs then transposes an operand before and after most
products, and again for bias gradients (docs/log.md).

Axes: b batch, s query positions, m key positions, h heads, k head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from coca_jax.model.products import copied

# Score of masked keys. Finite, as in JAX: a query without keys gets uniform weights instead of NaN.
MASKED_SCORE = -0.7 * float(np.finfo(np.float32).max)


def attend(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Bool[Array, "*b #h #s m"] | None = None,
    *,
    is_causal: bool = False,
) -> Float[Array, "b s h k"]:
    """`softmax(query keys^T / sqrt(k)) values` per head, in float32 (Vaswani et al. 2017, section 3.2.1).

    The backward pass follows Dao et al. 2022 (FlashAttention, arXiv 2205.14135, appendix B.2) but stores the weights:
    the softmax correction of a row is the dot product of the output and its gradient.

    Args:
      query, keys, values: float32 arrays. Lower-precision products would need a separate rule for the backward pass.
      allowed: True where query s may attend to key m; None allows all.
      is_causal: Each query attends to its own and earlier positions; requires s = m.
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
    """`attend` for keys and values in the cache's layout; any dtype, not differentiable."""
    weights = _weights(query.swapaxes(1, 2), keys, allowed).astype(values.dtype)
    return _multiply(weights, values, 3, 2, values.dtype).swapaxes(1, 2)


def _multiply(x: Array, y: Array, x_axis: int, y_axis: int, dtype: Any = jnp.float32) -> Array:
    """Per-head matrix products, contracted over one axis of each operand."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _weights(
    query: Float[Array, "b h s k"], keys: Float[Array, "b h m k"], allowed: Bool[Array, "*b #h #s m"] | None
) -> Float[Array, "b h s m"]:
    scores = _multiply(query, keys, 3, 3) * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED_SCORE)
    return jax.nn.softmax(scores, axis=-1)


@jax.custom_vjp
def _attend(query: Array, keys: Array, values: Array, allowed: Array | None) -> Array:
    output, _ = _forward(query, keys, values, allowed)
    return output


def _forward(query: Array, keys: Array, values: Array, allowed: Array | None) -> tuple[Array, Any]:
    query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
    weights = _weights(query, keys, allowed)
    output = _multiply(weights, values, 3, 2).swapaxes(1, 2)
    return output, (query, keys, values, allowed, weights, output)


def _backward(residuals: Any, grad: Array) -> tuple[Array, Array, Array, None]:
    query, keys, values, allowed, weights, output = residuals
    correction = jnp.sum(output * grad, axis=-1).swapaxes(1, 2)[..., None]
    grad = grad.swapaxes(1, 2)
    d_scores = weights * (_multiply(grad, values, 3, 3) - correction) * query.shape[-1] ** -0.5
    if allowed is not None:
        d_scores = jnp.where(allowed, d_scores, 0)  # a query without keys has weights but no gradient
    grads = (
        _multiply(d_scores, keys, 3, 2),
        _multiply(copied(d_scores.swapaxes(2, 3)), query, 3, 2),
        _multiply(copied(weights.swapaxes(2, 3)), grad, 3, 2),
    )
    d_query, d_keys, d_values = (x.swapaxes(1, 2) for x in grads)
    return d_query, d_keys, d_values, None


_attend.defvjp(_forward, _backward)
