"""Products of activations with kernels, with a backward pass that suits XLA for CPUs."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_WIDE = 128  # rows and columns from which copies for the kernel's gradient pay off


class Dense(nn.Module):
    """`x kernel + bias` over the last axes of x; the kernel is Glorot-uniform as a matrix, the bias zero.

    Parameters: kernel `[*inputs, *outputs]` and bias `[*outputs]`, as in Flax's DenseGeneral.

    Attributes:
      outputs: Sizes of the axes that replace x's last ones.
      inputs: Number of axes of x to contract.
      use_bias: Whether there is a bias.
      dtype: Dtype of the product and the result.
      param_dtype: Dtype of the parameters.
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
    """`lax.dot_general` over the last `inputs` axes of x and the first axes of the kernel, plus a bias.

    Value and gradients equal those of `lax.dot_general` and a sum. On CPUs the backward pass flattens to matrices: XLA
    for CPUs (jaxlib 0.10 to 0.12) otherwise transposes and copies the output gradient and the kernel before each
    product, and again for the bias, on one core. On TPUs flattening would itself copy wherever a row's tokens do not
    fill whole tiles.
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
    # Not `_dot`: inside it remat policies could not see the result of the product.
    return _value(inputs, dtype, x, kernel, bias), (x, kernel, bias)


def _backward(inputs: int, dtype: Any, residuals: Any, grad: Array) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals

    def plain(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array, Array]:
        multiply = functools.partial(_product, inputs, dtype)
        (dx,) = jax.linear_transpose(lambda x: multiply(x, kernel), x)(grad)
        (dkernel,) = jax.linear_transpose(lambda kernel: multiply(x, kernel), kernel)(grad)
        return dx, dkernel, jnp.sum(grad, tuple(range(x.ndim - inputs)))

    def flattened(x: Array, kernel: Array, grad: Array) -> tuple[Array, Array, Array]:
        size = math.prod(kernel.shape[:inputs])
        rows, matrix = x.reshape(-1, size), kernel.reshape(size, -1)
        grad = grad.reshape(-1, matrix.shape[1])
        multiply = functools.partial(_product, 1, dtype)
        (dx,) = jax.linear_transpose(lambda rows: multiply(rows, matrix), rows)(grad)
        if min(matrix.shape) < _WIDE or matrix.dtype != jnp.float32:
            (dkernel,) = jax.linear_transpose(lambda matrix: multiply(rows, matrix), matrix)(grad)
        elif size <= matrix.shape[1]:  # copy the narrower operand
            dkernel = _product(1, None, copied(rows.T), grad)
        else:
            dkernel = copied(_product(1, None, copied(grad.T), rows)).T
        return dx.reshape(x.shape), dkernel.reshape(kernel.shape), jnp.sum(grad, 0).reshape(kernel.shape[inputs:])

    dx, dkernel, dbias = lax.platform_dependent(x, kernel, grad, cpu=flattened, default=plain)
    return dx, dkernel, None if bias is None else dbias.astype(bias.dtype)


def copied(x: Array) -> Array:
    """x, materialized so that XLA for CPUs cannot fold it into the product that reads it.

    YNNPACK's matrix product is faster than Eigen's and splits better over two cores, but needs the contracted axis last
    in memory. XLA would fold the transposition into the product and use Eigen. Kernels that share x share the copy.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


_dot.defvjp(_forward, _backward)
