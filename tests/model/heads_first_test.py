"""Attention with heads in front of positions is JAX's own function, to rounding, and turns less around on CPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model import heads_first

B, H, K = 3, 5, 8
CASES = {
    "all": (7, 13, False),
    "causal": (9, 9, True),
    "masked": (7, 13, False),
    "a query without keys": (7, 13, False),
}


def arrays(s: int, m: int) -> list[jax.Array]:
    rng = np.random.default_rng(s)
    return [jnp.asarray(rng.normal(size=(B, n, H, K)), jnp.float32) for n in (s, m, m, s)]


def allowed(case: str) -> jax.Array | None:
    s, m, _ = CASES[case]
    if case not in ("masked", "a query without keys"):
        return None
    found = np.random.default_rng(1).random((B, 1, s, m)) < 0.6
    found[:, :, :, 0] = True
    found[1, :, 2] &= case == "masked"
    return jnp.asarray(found)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_jax(case: str) -> None:
    s, m, is_causal = CASES[case]
    *inputs, slopes = arrays(s, m)
    mask = allowed(case)

    def both(function: Any) -> Any:
        mixed, back = jax.vjp(function, *inputs)
        return mixed, *back(slopes)

    def ours(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return heads_first.attend(query, keys, values, mask, is_causal=is_causal)

    def of_jax(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, keys, values, mask=mask, is_causal=is_causal)

    found, wanted = jax.jit(lambda: both(ours))(), jax.jit(lambda: both(of_jax))()
    for a, b in zip(found, wanted, strict=True):
        # Sums of at most thirteen float32 products in another order: some units in the last place of the largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


def on_one_core() -> list[str]:
    """Products of the gradient's program for CPUs whose first operand is not as YNNPACK takes it."""
    jax.clear_caches()
    *inputs, slopes = arrays(64, 96)
    program = jax.jit(lambda *x: jax.vjp(heads_first.attend, *x[:3])[1](x[3])).lower(*inputs, slopes).compile()
    products = [line for line in str(program.as_text()).splitlines() if " dot(" in line]
    assert len(products) >= 6  # two of the forward pass, four of the backward pass
    return [line for line in products if "lhs_contracting_dims={3}" not in line]


def test_all_products_add_over_the_last_axis_of_their_first_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_one_core()
    monkeypatch.setattr(heads_first, "copied", lambda x: x)  # XLA puts the transposition back into the product
    assert on_one_core()


@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_is_read_as_it_stands(masked: bool) -> None:
    """The same function of keys and values with heads before positions, which XLA for CPUs does not turn around."""
    s, m = 2, 13
    query, keys, values, _ = arrays(s, m)
    mask = (jnp.arange(m)[None, :] <= 4 + jnp.arange(s)[:, None])[None, None] if masked else None
    held = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    there, here = jax.jit(jax.nn.dot_product_attention), jax.jit(heads_first.attend_cached)
    wanted = there(query, keys, values, mask=mask)
    # The same sums of eight and thirteen float32 products in another order.
    np.testing.assert_allclose(here(query, *held, mask), wanted, rtol=1e-5, atol=1e-6)
    turned = f"f32[{B},{H},{K},{m}]"
    assert turned in str(there.lower(query, keys, values, mask=mask).compile().as_text())  # the search can find it
    assert turned not in str(here.lower(query, *held, mask).compile().as_text())
