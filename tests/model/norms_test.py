from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model import layers
from coca_jax.model.norms import LayerNorm
from tests import tiny


def inputs(dtype: str, shape: tuple[int, ...] = (3, 5, 32)) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters of both modules, tokens far from zero as in a residual stream, and an output gradient."""
    rng = np.random.default_rng(0)
    drawn = {"scale": 1 + 0.3 * rng.normal(size=shape[-1]), "bias": rng.normal(size=shape[-1])}
    params = {key: jnp.asarray(value, jnp.float32) for key, value in drawn.items()}
    x = 4 * rng.normal(size=shape) + 10 * rng.normal(size=(*shape[:-1], 1))
    return params, jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=shape), dtype)


def flax_norm(dtype: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.dtype(dtype), use_fast_variance=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_values_equal_those_of_flax(dtype: str) -> None:
    params, x, _ = inputs(dtype)
    ours, theirs = LayerNorm(1e-5, jnp.dtype(dtype)), flax_norm(dtype)
    fresh, expected = (jax.jit(norm.init)(jax.random.key(0), x) for norm in (ours, theirs))
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), fresh, expected)
    y, expected = (jax.jit(norm.apply)({"params": params}, x) for norm in (ours, theirs))
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("shape", [(7, 32), (3, 5, 32), (2, 3, 5, 32)])
def test_gradients_are_as_exact_as_those_of_autodiff(shape: tuple[int, ...]) -> None:
    """Compared with float64, our float32 rounding error is at most twice that of autodiff."""
    params, x, grad = inputs("float32", shape)

    def gradients(norm: nn.Module, params: Any, x: Any, grad: Any) -> Any:
        return jax.jit(lambda p, x: jax.vjp(lambda p, x: norm.apply({"params": p}, x), p, x)[1](grad))(params, x)

    with jax.enable_x64():
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, grad))
        exact = gradients(nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, param_dtype=jnp.float64), *wide)
        exact = jax.tree.map(np.asarray, exact)
    ours, autodiff = (gradients(norm, params, x, grad) for norm in (LayerNorm(1e-5), flax_norm("float32")))
    for found, theirs, wanted in zip(*map(jax.tree.leaves, (ours, autodiff, exact)), strict=True):
        scale = np.abs(wanted).max()
        error, theirs_error = (np.abs(np.asarray(a, np.float64) - wanted).max() / scale for a in (found, theirs))
        assert error < max(2 * theirs_error, 1e-6) < 1e-4  # 1e-6: a few float32 rounding errors


def test_gradients_in_bfloat16_are_rounded_once() -> None:
    """Intermediate values are float32; only inputs and result are bfloat16, with 8 significant bits."""
    params, x, grad = inputs("bfloat16")

    def gradients(dtype: str, x: Any, grad: Any) -> Any:
        norm = LayerNorm(1e-5, jnp.dtype(dtype))
        return jax.vjp(lambda p, x: norm.apply({"params": p}, x), params, x)[1](grad)

    (dparams, dx), wide = (
        gradients("bfloat16", x, grad),
        gradients("float32", x.astype(jnp.float32), grad.astype(jnp.float32)),
    )
    assert dx.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(dparams)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(np.asarray(dx, np.float32), np.asarray(wide[1].astype(jnp.bfloat16), np.float32))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), dparams, wide[0])


def test_the_backward_pass_saves_only_the_input_and_two_numbers_per_token() -> None:
    norm, x = layers.layer_norm(tiny.MODEL), jnp.ones((4, 6, 16))
    params = norm.init(jax.random.key(0), x)
    _, backward = jax.vjp(norm.apply, params, x)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(backward) if leaf.size > 16)
    assert sizes == [24, 24, x.size]


def test_an_overflowing_variance_gives_nan_gradients() -> None:
    norm, x = LayerNorm(1e-5), jnp.asarray([[1.0, 2.0, 4.0], [1e30, 2e30, 4e30]])
    params = norm.init(jax.random.key(0), x)
    dparams, dx = jax.grad(lambda params, x: norm.apply(params, x).sum(), argnums=(0, 1))(params, x)
    assert np.isfinite(dx[0]).all() and np.isnan(dx[1]).all() and np.isnan(dparams["params"]["scale"]).all()
