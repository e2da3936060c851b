"""Rematerialization: equal gradients with less memory and more computation, as config.REMAT says."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import config
from coca_jax.model import layers
from coca_jax.model.coca import CoCa
from tests import tiny

POLICIES = list(config.REMAT)


@functools.cache
def compiled(remat: str, depth: int = 12, scan_unroll: int = 1) -> tuple[Any, Any]:
    """The compiled gradient of a stack of layers with cross-attention, and its arguments.

    Deep enough that what all layers save outweighs what one of them needs at a time.
    """
    options: dict[str, Any] = {"depth": depth, "remat": remat, "scan_unroll": scan_unroll}
    stack = layers.stack(tiny.MODEL, **options, width=16, heads=2, mlp_dim=64, causal=True, cross=True)
    rng = np.random.default_rng(0)
    x, image_tokens = (rng.normal(size=(8, length, 16)).astype(np.float32) for length in (64, 48))
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, None, image_tokens, None, None))
    params = jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32), shapes)

    def loss(params: Any, x: Any, image_tokens: Any) -> jax.Array:
        return jnp.mean(stack.apply(params, x, None, image_tokens, None, None)[0] ** 2)

    args = params, x, image_tokens
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile(), args


def temporaries(remat: str) -> int:
    return compiled(remat)[0].memory_analysis().temp_size_in_bytes


def executed_flops(remat: str, **stack: int) -> float:
    return compiled(remat, **stack)[0].cost_analysis()["flops"]


def test_each_policy_saves_less_than_the_previous_one_and_computes_more() -> None:
    assert POLICIES[0] == "none" and POLICIES[-1] == "everything"
    memory, operations = [temporaries(policy) for policy in POLICIES], [executed_flops(policy) for policy in POLICIES]
    assert all(b < 0.97 * a for a, b in itertools.pairwise(memory)), memory
    assert all(b > 1.005 * a for a, b in itertools.pairwise(operations)), operations


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_every_policy_gives_the_gradients_of_saving_everything(policy: str) -> None:
    expected, found = (run(*args) for run, args in (compiled("none"), compiled(policy)))
    # Recomputation is fused differently, so compare on the scale of a tensor's largest element. A key's bias has no
    # gradient (it shifts all scores equally); its values are rounding errors.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7)


def test_an_unrolled_stack_is_recomputed_too() -> None:
    # Without a loop the compiler could reuse the forward pass's values: 1.17 without a barrier, 1.26 with it.
    unrolled = {"depth": 2, "scan_unroll": 0}
    assert executed_flops("everything", **unrolled) > 1.22 * executed_flops("none", **unrolled)


@pytest.mark.parametrize("tower", ["image", "pooler", "text"])
def test_each_tower_has_its_own_policy(tower: str) -> None:
    params = jax.eval_shape(lambda: tiny.parameters(tiny.MODEL))
    method, x = ("encode_text", tiny.tokens(tiny.MODEL, [9])) if tower == "text" else ("encode_image", None)
    x = tiny.images(tiny.MODEL, 1) if x is None else x

    def checkpointed_layers(model: config.Model) -> int:
        def loss(params: Any) -> jax.Array:
            output = CoCa(model).apply({"params": params}, x, method=method)
            return jnp.stack([jnp.sum(part) for part in jax.tree.leaves(output)]).sum()

        return str(jax.make_jaxpr(loss)(params)).count("prevent_cse=")

    always = checkpointed_layers(tiny.MODEL)  # checkpoints of norms and activations
    changed = checkpointed_layers(tiny.replace(tiny.MODEL, **{f"{tower}__remat": "everything"})) - always
    assert changed == (2 if tower == "pooler" else 1)  # two poolers; a stack is one layer in a loop
