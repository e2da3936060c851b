"""The products of activations with kernels, and what their backward pass is made of."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LARGE = 1_000_000  # numbers of a kernel, from which on a transposed copy of its rows costs less than it gains


def dot_general(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any = None,
    precision: None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general` over the last axes of x and the first of the kernel (one of each if nothing is said), as Flax's
    DenseGeneral takes it.

    Value and gradients are those of `lax.dot_general`. On CPUs the backward pass is made of matrices: XLA for CPUs
    (jaxlib 0.10 to 0.12) otherwise transposes and copies the gradient of the result and the kernel in front of each
    product, on one core. On TPUs it would be the flattening that copies, where the tokens of a row do not fill tiles.
    """
    assert precision is None
    count = 1
    if dimension_numbers is not None:
        (x_axes, kernel_axes), batch_axes = dimension_numbers
        count = len(x_axes)
        assert tuple(x_axes) == tuple(range(x.ndim - count, x.ndim)) and not any(batch_axes), dimension_numbers
        assert tuple(kernel_axes) == tuple(range(count)), dimension_numbers
    return _product(count, preferred_element_type, x, kernel)


def _plain(count: int, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    return lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=dtype)


_product = jax.custom_vjp(_plain, nondiff_argnums=(0, 1))


def _forward(count: int, dtype: Any, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(count, dtype, x, kernel), (x, kernel)


def _backward(count: int, dtype: Any, kept: tuple[jax.Array, jax.Array], slopes: jax.Array) -> Any:
    def plain(x: jax.Array, kernel: jax.Array, slopes: jax.Array) -> Any:
        multiply = functools.partial(_plain, count, dtype)
        (dx,) = jax.linear_transpose(lambda x: multiply(x, kernel), x)(slopes)
        (dkernel,) = jax.linear_transpose(lambda kernel: multiply(x, kernel), kernel)(slopes)
        return dx, dkernel

    def of_matrices(x: jax.Array, kernel: jax.Array, slopes: jax.Array) -> Any:
        inputs = math.prod(kernel.shape[:count])
        rows, matrix = x.reshape(-1, inputs), kernel.reshape(inputs, -1)
        slopes = slopes.reshape(-1, matrix.shape[1])
        multiply = functools.partial(_plain, 1, dtype)
        (dx,) = jax.linear_transpose(lambda rows: multiply(rows, matrix), rows)(slopes)
        if matrix.size >= _LARGE and matrix.dtype == jnp.float32:
            # YNNPACK's product, which shares the work of two cores better than Eigen's, wants the rows it adds over to
            # be the last axis. Without the barrier XLA puts the transposition back into the product.
            turned = lax.optimization_barrier(rows.T)
            dkernel = lax.dot_general(turned, slopes, (((1,), (0,)), ((), ())))
        else:
            (dkernel,) = jax.linear_transpose(lambda matrix: multiply(rows, matrix), matrix)(slopes)
        return dx.reshape(x.shape), dkernel.reshape(kernel.shape)

    return lax.platform_dependent(*kept, slopes, cpu=of_matrices, default=plain)


_product.defvjp(_forward, _backward)
