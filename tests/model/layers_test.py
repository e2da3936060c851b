from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model import layers


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_and_its_derivative_equal_those_of_jax(approximate: bool) -> None:
    x = jnp.linspace(-12, 12, 24_001, dtype=jnp.float32)

    def both(function: object) -> tuple[jax.Array, jax.Array]:
        assert callable(function)
        y, back = jax.vjp(function, x)
        return y, back(jnp.ones_like(x))[0]

    found = both(lambda x: layers.gelu(x, approximate))
    wanted = both(lambda x: jax.nn.gelu(x, approximate=approximate))
    for a, b in zip(found, wanted, strict=True):
        # 1 + erf is rounded at 1 and then multiplied by x: an absolute error of half a unit in the last place each.
        np.testing.assert_allclose(a, b, rtol=3e-7, atol=3e-7 * float(jnp.abs(x).max()) / 2)


def test_gelu_of_bfloat16_is_computed_in_float32() -> None:
    x = jnp.linspace(-4, 4, 2_001).astype(jnp.bfloat16)
    found, exact = layers.gelu(x, False), jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32)[200:], np.asarray(exact.astype(jnp.bfloat16))[200:])
