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

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def count(function: Any, *shapes: tuple[int, ...]) -> products.Count:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return products.flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_loops_count_as_often_as_they_run_and_branches_as_the_dearest() -> None:
    one = 2 * 3 * 4 * 4
    assert count(lambda x, w: x @ w, (3, 4), (4, 4)) == (one, {})
    assert count(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], (3, 4), (5, 4, 4)) == (5 * one, {})
    branches = (lambda x, w: x, lambda x, w: x @ w @ w)
    assert count(lambda x, w: jax.lax.cond(x[0, 0] > 0, *branches, x, w), (3, 4), (4, 4)) == (2 * one, {})
    batched = count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (7, 3, 4), (7, 4, 5))
    assert batched.flops == 7 * 2 * 3 * 4 * 5


def test_what_cannot_be_counted_is_named() -> None:
    def until_small(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ w, x)

    assert count(until_small, (3, 4), (4, 4)) == (2 * 3 * 4 * 4, {"while": 1})


@pytest.mark.parametrize(("s", "m", "is_causal"), [(256, 256, False), (256, 640, False), (512, 512, True)])
def test_the_products_inside_a_kernel_count(s: int, m: int, is_causal: bool) -> None:
    """Those of the flash kernel, as it says itself: its backward pass makes the scores again."""
    b, h, k = 3, 2, 64
    shapes = ((b, s, h, k), (b, m, h, k), (b, m, h, k))

    def total(*arrays: Any, how: str) -> Any:
        return attention.attend(*arrays, is_causal=is_causal, implementation=how).astype(jnp.float32).sum()

    one = 2 * b * h * s * m * k
    assert count(functools.partial(total, how="flash"), *shapes) == (2 * one, {})
    found = count(jax.grad(functools.partial(total, how="flash"), (0, 1, 2)), *shapes)
    assert found == (5 * one, {})  # the sum needs nothing of the forward pass
    assert count(jax.grad(functools.partial(total, how="xla"), (0, 1, 2)), *shapes) == ((2 + 4) * one, {})


def sharded() -> None:
    """Runs with 4 devices."""
    from jax.sharding import PartitionSpec as P

    from coca_jax import sharding

    mesh = sharding.make_mesh((1, 4, 1))
    function = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    found = count(function, (8, 4), (4, 4))
    assert found == (2 * 8 * 4 * 4, {}), found


def test_a_part_that_is_written_for_one_device_counts_for_all(run_python: RunPython) -> None:
    run_python(sharded, devices=4)


@pytest.mark.parametrize("remat", ["none", "dots", "everything"])
def test_recomputation_is_what_is_beyond_the_model(remat: str) -> None:
    c = tiny.replace(tiny.CONFIG, model__image__remat=remat, model__text__remat=remat, loss__caption_chunk=0)
    c = tiny.replace(c, loss__contrastive_tile=0)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(c.model, [9] * c.batch_size).items()}
    params = jax.eval_shape(lambda: tiny.parameters(c.model))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: loss_function(c, p, b)[0]))(params, batch)
    beyond = products.flops(jaxpr.jaxpr).flops - flops.of_step(c)
    one = flops.forward(c.model, batch_size=c.batch_size)
    patches = c.batch_size * 2 * 16 * (4 * 4 * 3) * 16  # the pixels' gradient is not asked for
    layers = c.batch_size * (one.image_encoder + one.unimodal + one.multimodal) - patches
    share = (beyond + patches) / layers
    # The products of a layer whose results its gradient needs: all but the last, and none where everything is kept.
    low, high = {"none": (0.0, 0.0), "everything": (0.6, 1.0)}.get(remat, (0.05, 0.95))
    assert low <= share <= high, share
