from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coca_jax import sharding
from coca_jax.train import adam, step
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from tests import tiny


def trees(steps: int) -> tuple[Any, list[Any]]:
    keys = jax.random.split(jax.random.key(0), steps + 1)
    made = [{"a": jax.random.normal(key, (5, 7)), "b": {"c": jax.random.normal(key, (3,))}} for key in keys]
    return made[0], made[1:]


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_every_bit_is_that_of_optax(mu_dtype: str) -> None:
    parameters, gradients = trees(4)
    ours = adam.scale_by_adam(0.9, 0.999, 1e-8, jnp.dtype(mu_dtype))
    theirs = optax.scale_by_adam(0.9, 0.999, 1e-8, mu_dtype=jnp.dtype(mu_dtype))
    mine, other = ours.init(parameters), theirs.init(parameters)
    for gradient in gradients:
        found, mine = ours.update(gradient, mine)
        wanted, other = theirs.update(gradient, other)
        assert mine._fields == other._fields
        for a, b in zip(jax.tree.leaves((found, mine)), jax.tree.leaves((wanted, other)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def test_a_step_that_is_not_accepted_changes_no_bit() -> None:
    parameters, (gradient, bad) = trees(2)
    tx = adam.scale_by_adam(0.9, 0.999, 1e-8, jnp.float32)
    state = tx.update(gradient, tx.init(parameters), accepted=jnp.array(True))[1]
    after = tx.update(jax.tree.map(lambda x: x * jnp.nan, bad), state, accepted=jnp.array(False))[1]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def test_the_compiled_step_copies_no_parameter_and_no_moment() -> None:
    """On CPUs; what is read of the donated state after it was overwritten would have to be copied first."""
    c = tiny.replace(tiny.CONFIG, optimizer__name="adamw", optimizer__ema_decay=0.0)
    optimizer = optimizers.of_run(c, states.abstract_parameters(c))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state: Any = states.abstract(c, optimizer, mesh)
        batch: Any = {
            "images": jax.ShapeDtypeStruct((c.batch_size, *(c.model.image.size,) * 2, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((c.batch_size, c.model.text.length), jnp.int32),
        }
        compiled: Any = step.compile_step(c, optimizer, mesh, state)
        text = compiled.lower(state, batch).compile().as_text()
    entry = text[text.index("ENTRY") :]
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(%state_(?:params|opt_state)", entry)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in copied]
    assert all(size == 1 for size in sizes), sizes  # counts of steps
