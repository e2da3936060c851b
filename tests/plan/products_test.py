from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from coca_jax.model import attention, flops
from coca_jax.plan import products
from coca_jax.train.step import loss_function
from tests import tiny

# The type of the fixture in tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def count(function: Any, *shapes: tuple[int, ...]) -> products.Count:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return products.flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_loops_count_per_iteration_and_branches_as_the_most_expensive() -> None:
    one = 2 * 3 * 4 * 4
    assert count(lambda x, w: x @ w, (3, 4), (4, 4)) == (one, {})
    assert count(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], (3, 4), (5, 4, 4)) == (5 * one, {})
    branches = (lambda x, w: x, lambda x, w: x @ w @ w)
    assert count(lambda x, w: jax.lax.cond(x[0, 0] > 0, *branches, x, w), (3, 4), (4, 4)) == (2 * one, {})
    batched = count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (7, 3, 4), (7, 4, 5))
    assert batched.flops == 7 * 2 * 3 * 4 * 5


def test_uncountable_loops_are_named() -> None:
    def until_small(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ w, x)

    assert count(until_small, (3, 4), (4, 4)) == (2 * 3 * 4 * 4, {"while": 1})


@pytest.mark.parametrize(("s", "m", "is_causal"), [(256, 256, False), (256, 640, False), (512, 512, True)])
def test_the_products_inside_a_kernel_are_counted(s: int, m: int, is_causal: bool) -> None:
    """By the flash kernel's own cost estimate, whose backward pass recomputes the scores."""
    b, h, k = 3, 2, 64
    shapes = ((b, s, h, k), (b, m, h, k), (b, m, h, k))

    def total(*arrays: Any, implementation: str) -> Any:
        return attention.attend(*arrays, is_causal=is_causal, implementation=implementation).astype(jnp.float32).sum()

    one = 2 * b * h * s * m * k
    assert count(functools.partial(total, implementation="flash"), *shapes) == (2 * one, {})
    found = count(jax.grad(functools.partial(total, implementation="flash"), (0, 1, 2)), *shapes)
    assert found == (5 * one, {})  # the sum needs no result of the forward pass
    assert count(jax.grad(functools.partial(total, implementation="xla"), (0, 1, 2)), *shapes) == ((2 + 4) * one, {})


def sharded() -> None:
    """Runs with 4 devices."""
    from jax.sharding import PartitionSpec as P

    from coca_jax import sharding

    mesh = sharding.make_mesh((1, 4, 1))
    function = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    found = count(function, (8, 4), (4, 4))
    assert found == (2 * 8 * 4 * 4, {}), found


def test_products_inside_shard_map_count_for_all_devices(run_python: RunPython) -> None:
    run_python(sharded, devices=4)


@pytest.mark.parametrize("remat", ["none", "dots", "everything"])
def test_operations_beyond_the_models_are_recomputation(remat: str) -> None:
    c = tiny.replace(tiny.CONFIG, model__image__remat=remat, model__text__remat=remat, loss__caption_chunk=0)
    c = tiny.replace(c, loss__contrastive_tile=0)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(c.model, [9] * c.batch_size).items()}
    params = jax.eval_shape(lambda: tiny.parameters(c.model))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: loss_function(c, p, b)[0]))(params, batch)
    beyond = products.flops(jaxpr.jaxpr).flops - flops.train_step_flops(c)
    one = flops.forward(c.model, batch_size=c.batch_size)
    patches = c.batch_size * 2 * 16 * (4 * 4 * 3) * 16  # no pixel gradient
    layers = c.batch_size * (one.image_encoder + one.unimodal + one.multimodal) - patches
    share = (beyond + patches) / layers
    # Recomputed products: those whose results a layer's gradient needs, i.e. all but the last, and none if everything
    # is saved.
    low, high = {"none": (0.0, 0.0), "everything": (0.6, 1.0)}.get(remat, (0.05, 0.95))
    assert low <= share <= high, share
