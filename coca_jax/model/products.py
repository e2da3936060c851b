"""The products of activations with kernels, and what their backward pass is made of."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_WIDE = 128  # rows and columns of a kernel, from which on copies for its gradient gain more than they cost


class Dense(nn.Module):
    """`x kernel + bias` over the last axes of x; the kernel is Glorot-uniform as a matrix, the bias 0 at first.

    Parameters: kernel `[*inputs, *outputs]` and bias `[*outputs]`, as those of Flax's DenseGeneral.

    Attributes:
      outputs: the axes that take the place of x's last ones.
      inputs: how many axes of x are summed up over.
      use_bias: there is a bias.
      dtype: of the product and the result.
      param_dtype: of the parameters.
    """

    outputs: tuple[int, ...]
    inputs: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, "*y"]:
        shape = (*x.shape[-self.inputs :], *self.outputs)
        matrix = math.prod(shape[: self.inputs]), math.prod(self.outputs)

        def glorot(rng: Array) -> Array:
            return nn.initializers.glorot_uniform()(rng, matrix, self.param_dtype).reshape(shape)

        kernel = self.param("kernel", glorot).astype(self.dtype)
        if not self.use_bias:
            return dot(x.astype(self.dtype), kernel, self.inputs)
        bias = self.param("bias", nn.initializers.zeros_init(), self.outputs, self.param_dtype)
        return dot(x.astype(self.dtype), kernel, self.inputs, bias=bias.astype(self.dtype))


def dot(
    x: Float[Array, "*x"],
    kernel: Float[Array, "*inputs_outputs"],
    inputs: int = 1,
    *,
    bias: Float[Array, "*outputs"] | None = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*y"]:
    """`lax.dot_general` over the last `inputs` axes of x and the first of the kernel, and a bias.

    Value and gradients are those of `lax.dot_general` and a sum. On CPUs the backward pass is made of matrices: XLA for
    CPUs (jaxlib 0.10 to 0.12) otherwise transposes and copies the gradient of the result and the kernel in front of
    each product, and once more for the bias, on one core. On TPUs it would be the flattening that copies, where the
    tokens of a row do not fill tiles.
    """
    return _dot(inputs, preferred_element_type, x, kernel, bias)


def _product(inputs: int, dtype: Any, x: Array, kernel: Array) -> Array:
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=dtype)


def _value(inputs: int, dtype: Any, x: Array, kernel: Array, bias: Array | None) -> Array:
    y = _product(inputs, dtype, x, kernel)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


_dot = jax.custom_vjp(_value, nondiff_argnums=(0, 1))


def _forward(inputs: int, dtype: Any, x: Array, kernel: Array, bias: Array | None) -> tuple[Array, Any]:
    # Not `_dot`: within it what remat asks for, the result of a product, could not be seen.
    return _value(inputs, dtype, x, kernel, bias), (x, kernel, bias)


def _backward(inputs: int, dtype: Any, kept: Any, slopes: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = kept

    def plain(x: Array, kernel: Array, slopes: Array) -> tuple[Array, Array, Array]:
        multiply = functools.partial(_product, inputs, dtype)
        (dx,) = jax.linear_transpose(lambda x: multiply(x, kernel), x)(slopes)
        (dkernel,) = jax.linear_transpose(lambda kernel: multiply(x, kernel), kernel)(slopes)
        return dx, dkernel, jnp.sum(slopes, tuple(range(x.ndim - inputs)))

    def of_matrices(x: Array, kernel: Array, slopes: Array) -> tuple[Array, Array, Array]:
        size = math.prod(kernel.shape[:inputs])
        rows, matrix = x.reshape(-1, size), kernel.reshape(size, -1)
        slopes = slopes.reshape(-1, matrix.shape[1])
        multiply = functools.partial(_product, 1, dtype)
        (dx,) = jax.linear_transpose(lambda rows: multiply(rows, matrix), rows)(slopes)
        if min(matrix.shape) < _WIDE or matrix.dtype != jnp.float32:
            (dkernel,) = jax.linear_transpose(lambda matrix: multiply(rows, matrix), matrix)(slopes)
        elif size <= matrix.shape[1]:  # the copy is of the narrower operand
            dkernel = _product(1, None, copied(rows.T), slopes)
        else:
            dkernel = copied(_product(1, None, copied(slopes.T), rows)).T
        return dx.reshape(x.shape), dkernel.reshape(kernel.shape), jnp.sum(slopes, 0).reshape(kernel.shape[inputs:])

    dx, dkernel, dbias = lax.platform_dependent(x, kernel, slopes, cpu=of_matrices, default=plain)
    return dx, dkernel, None if bias is None else dbias.astype(bias.dtype)


def copied(x: Array) -> Array:
    """x, which XLA for CPUs may not fold into the product that reads it.

    YNNPACK's product, which is quicker than Eigen's and shares its work better between two cores, wants the rows that
    it adds over to be the last axis: of a transposed operand, made for it. XLA would put the transposition back into
    the product, and give that to Eigen. Kernels of the same x share the copy.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


_dot.defvjp(_forward, _backward)
