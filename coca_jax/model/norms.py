"""Layer normalization with a custom backward pass.

Axes: d width; statistics are computed per token.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

STATISTICS = "statistics"  # checkpoint name of a token's mean and inverse deviation: 8 bytes


class LayerNorm(nn.Module):
    """`(x - E[x]) / sqrt(Var[x] + epsilon) scale + bias` over the last axis (Ba et al. 2016, arXiv 1607.06450).

    Statistics are float32, with the variance as `E[(x - E[x])^2]`; `E[x^2] - E[x]^2` would cancel. Parameters `scale`
    and `bias`, `[d]`, start at 1 and 0. Parameters, value and gradients equal those of Flax's LayerNorm.

    Attributes:
      epsilon: Added to the variance.
      dtype: Dtype of the result.
      param_dtype: Dtype of the parameters.
    """

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*x d"]) -> Float[Array, "*x d"]:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], self.param_dtype)
        return _norm(self.epsilon, jnp.dtype(self.dtype), x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(epsilon: float, dtype: Any, x: Array, scale: Array, bias: Array) -> Array:
    return _forward(epsilon, dtype, x, scale, bias)[0]


def _forward(epsilon: float, dtype: Any, x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide - mean), -1, keepdims=True) + epsilon)
    mean, inverse = (checkpoint_name(value, STATISTICS) for value in (mean, inverse))
    y = (wide - mean) * (inverse * _row(scale, x)) + _row(bias, x)
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(epsilon: float, dtype: Any, residuals: Any, grad: Array) -> tuple[Array, Array, Array]:
    # Both sums of a token take one pass over x and its gradient, and the result takes another. Autodiff computes the
    # two sums one after the other and stores float32 arrays of x's size.
    x, scale, bias, mean, inverse = residuals
    # A token whose variance overflowed outputs the bias. Return NaN so that the overflow is detected, not masked by a
    # zero gradient.
    inverse = jnp.where(inverse > 0, inverse, jnp.nan)
    grad = grad.astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * inverse
    d_normalized = grad * _row(scale, x)
    projection = jnp.mean(d_normalized * normalized, -1, keepdims=True)
    dx = (d_normalized - jnp.mean(d_normalized, -1, keepdims=True) - normalized * projection) * inverse
    tokens = tuple(range(x.ndim - 1))
    dscale, dbias = jnp.sum(grad * normalized, tokens), jnp.sum(grad, tokens)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


def _row(parameter: Array, x: Array) -> Array:
    """The parameter in float32, broadcastable to x."""
    return parameter.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + parameter.shape)


_norm.defvjp(_forward, _backward)
