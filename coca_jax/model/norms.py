"""Layer normalisation with a backward pass of its own.

Axes: d width; statistics are of one token each.
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

STATISTICS = "statistics"  # name of a token's mean and the inverse of its deviation: 8 bytes


class LayerNorm(nn.Module):
    """`(x - E[x]) / sqrt(Var[x] + epsilon) scale + bias` over the last axis (Ba et al. 2016, arXiv 1607.06450).

    Statistics are float32, with the variance as `E[(x - E[x])^2]` and not `E[x^2] - E[x]^2`, which cancels. Parameters:
    scale `[d]` and bias `[d]`, 1 and 0 at first, as those of Flax's LayerNorm, of which value and gradients are, too.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: of the parameters.
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


def _backward(epsilon: float, dtype: Any, kept: Any, slopes: Array) -> tuple[Array, Array, Array]:
    # With both of a token's sums next to each other they are one pass over x and its gradient, and the result is
    # another; autodiff's sum for the mean waits for that of the variance, and keeps float32 arrays of x's size.
    x, scale, bias, mean, inverse = kept
    # Of a token whose variance overflowed the result is the bias. No gradient of 0 may hide that from who looks for it.
    inverse = jnp.where(inverse > 0, inverse, jnp.nan)
    slopes = slopes.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    inner = slopes * _row(scale, x)
    along = jnp.mean(inner * normal, -1, keepdims=True)
    dx = (inner - jnp.mean(inner, -1, keepdims=True) - normal * along) * inverse
    tokens = tuple(range(x.ndim - 1))
    dscale, dbias = jnp.sum(slopes * normal, tokens), jnp.sum(slopes, tokens)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


def _row(parameter: Array, x: Array) -> Array:
    """A parameter, float32, in as many axes as x has."""
    return parameter.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + parameter.shape)


_norm.defvjp(_forward, _backward)
