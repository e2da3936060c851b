"""Attention with heads before positions equals JAX's own up to rounding, and transposes less on CPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax.model import heads_first

B, H, K = 3, 5, 8
CASES = {
    "no mask": (7, 13, False),
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
def test_value_and_gradients_equal_those_of_jax(case: str) -> None:
    s, m, is_causal = CASES[case]
    *inputs, grad = arrays(s, m)
    mask = allowed(case)

    def both(function: Any) -> Any:
        output, back = jax.vjp(function, *inputs)
        return output, *back(grad)

    def ours(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return heads_first.attend(query, keys, values, mask, is_causal=is_causal)

    def reference(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, keys, values, mask=mask, is_causal=is_causal)

    found, wanted = jax.jit(lambda: both(ours))(), jax.jit(lambda: both(reference))()
    for a, b in zip(found, wanted, strict=True):
        # Sums of at most thirteen float32 products in another order: some units in the last place of the largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


def products_in_the_wrong_layout() -> list[str]:
    """Products of the gradient's CPU program whose first operand is not in the layout YNNPACK needs."""
    jax.clear_caches()
    *inputs, grad = arrays(64, 96)
    program = jax.jit(lambda *x: jax.vjp(heads_first.attend, *x[:3])[1](x[3])).lower(*inputs, grad).compile()
    products = [line for line in str(program.as_text()).splitlines() if " dot(" in line]
    assert len(products) >= 6  # two in the forward pass, four in the backward pass
    return [line for line in products if "lhs_contracting_dims={3}" not in line]


def test_all_products_contract_the_last_axis_of_their_first_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not products_in_the_wrong_layout()
    monkeypatch.setattr(heads_first, "copied", lambda x: x)  # XLA folds the transposition back into the product
    assert products_in_the_wrong_layout()


@pytest.mark.parametrize("masked", [False, True])
def test_cached_attention_does_not_transpose_the_cache(masked: bool) -> None:
    """Equals JAX's attention, for keys and values with heads first, which XLA for CPUs need not transpose."""
    s, m = 2, 13
    query, keys, values, _ = arrays(s, m)
    mask = (jnp.arange(m)[None, :] <= 4 + jnp.arange(s)[:, None])[None, None] if masked else None
    cache = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    reference, ours = jax.jit(jax.nn.dot_product_attention), jax.jit(heads_first.attend_cached)
    wanted = reference(query, keys, values, mask=mask)
    # Sums of eight and thirteen float32 products in another order.
    np.testing.assert_allclose(ours(query, *cache, mask), wanted, rtol=1e-5, atol=1e-6)
    transposed = f"f32[{B},{H},{K},{m}]"
    assert transposed in str(
        reference.lower(query, keys, values, mask=mask).compile().as_text()
    )  # the search can find it
    assert transposed not in str(ours.lower(query, *cache, mask).compile().as_text())
