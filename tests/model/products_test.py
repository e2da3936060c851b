from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from coca_jax.model import products


def arrays(inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, *inputs), (*inputs, *outputs), (2, 5, *outputs)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("wide", [1, 512])  # kernels this wide are copied: all of these, or none
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulated", [None, jnp.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [((7,), (11,)), ((7,), (3, 4)), ((3, 4), (7,)), ((2, 2, 3), (7,))])
def test_value_and_gradients_equal_those_of_lax(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    accumulated: Any,
    dtype: str,
    wide: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_WIDE", wide)
    x, kernel, grad = arrays(inputs, outputs, jnp.dtype(dtype))
    bias = kernel.sum(tuple(range(len(inputs))))
    count = len(inputs)
    dimensions: Any = ((tuple(range(2, 2 + count)), tuple(range(count))), ((), ()))

    def both(function: Any) -> Any:
        y, back = jax.vjp(function, x, kernel, bias)
        return y, *back(grad.astype(y.dtype))

    def ours(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return products.dot(x, kernel, count, bias=bias, preferred_element_type=accumulated)

    def reference(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        y = lax.dot_general(x, kernel, dimensions, preferred_element_type=accumulated)
        return y + jnp.broadcast_to(bias, y.shape)

    found, wanted = jax.jit(lambda: both(ours))(), jax.jit(lambda: both(reference))()
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        # The same products summed in another order: a few units in the last place of the largest.
        bound = 4 * float(jnp.finfo(a.dtype).eps) * float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=bound)


def count_copies(function: Any) -> int:
    """Number of arrays that the gradient's CPU program copies into another order."""
    x, kernel, grad = arrays((64,), (96,), jnp.float32)
    program = jax.jit(lambda x, kernel, grad: jax.vjp(function, x, kernel)[1](grad))
    text = program.lower(x, kernel, grad).compile().as_text()
    assert text is not None
    return text.count(" transpose(") + text.count(" copy(")


def test_the_backward_pass_makes_no_copies_on_cpus() -> None:
    assert count_copies(lambda x, kernel: products.dot(x, kernel)) == 0
    assert count_copies(lambda x, kernel: jnp.einsum("bsd,df->bsf", x, kernel)) > 0  # the count can find copies


def test_only_cpus_flatten_to_matrices() -> None:
    x, kernel, grad = arrays((7,), (3, 4), jnp.float32)
    program = jax.jit(lambda x, kernel, grad: jax.vjp(products.dot, x, kernel)[1](grad))
    traced = program.trace(x, kernel, grad)
    assert "tensor<10x7xf32>" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "tensor<10x7xf32>" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_wide_kernels_of_one_input_share_its_copy() -> None:
    x, *kernels = (jnp.ones(shape) for shape in ((2, 5, 512), *[(512, 512)] * 3))

    def loss(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
        return sum((jnp.sum(jnp.sin(products.dot(x, kernel))) for kernel in kernels), jnp.zeros(()))

    program = str(jax.jit(jax.grad(loss)).lower(kernels, x).compile().as_text())
    copies = [line for line in program.splitlines() if "f32[512,10]{1,0} fusion(" in line]
    assert len(copies) == 1, copies
