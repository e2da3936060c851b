from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest

from coca_jax import config, sharding
from coca_jax.train import state
from coca_jax.train.accumulate import join, split
from coca_jax.train.step import gradients_of
from tests import tiny

# Skewed: microbatch 0 of 2 predicts 32 tokens, microbatch 1 only 5. A mean of their means would be far off.
LENGTHS = [9, 2, 9, 2, 9, 2, 9, 3]


def weighted(con: float, cap: float, kind: str = "softmax", **changes: Any) -> config.Config:
    c = tiny.replace(tiny.CONFIG, loss__lambda_con=con, loss__lambda_cap=cap, loss__contrastive=kind, **changes)
    return tiny.replace(c, model__logit_bias=-2.0) if kind == "sigmoid" else c


def compute(c: config.Config, params: Any, batch: Any) -> tuple[Any, dict[str, float]]:
    """Gradients, and the metrics with the gradients' norm."""
    gradients, metrics = jax.jit(lambda p, b: gradients_of(c, p, b))(params, batch)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return jax.tree.map(np.asarray, gradients), {name: float(value) for name, value in metrics.items()}


def assert_equal(found: tuple[Any, dict[str, float]], wanted: tuple[Any, dict[str, float]]) -> None:
    """float32 sums over the batch in another order: an element's error goes with its tensor's largest, not its own."""
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    pairs = zip(jax.tree_util.tree_leaves_with_path(wanted[0]), jax.tree.leaves(found[0]), strict=True)
    for (path, b), a in pairs:
        assert a.dtype == np.float32
        # The bias of a key has no gradient (it moves all scores alike): what stands there is noise of 1e-7.
        atol = 1e-4 * np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=sharding.path_of(path))


def check_equal(c: config.Config, count: int) -> None:
    params, batch = tiny.parameters(c.model), tiny.batch(c.model, LENGTHS)
    wanted = compute(c, params, batch)
    assert wanted[1]["gradient_norm"] > 0.1
    assert_equal(compute(tiny.replace(c, microbatches=count), params, batch), wanted)


CASES = {
    "both halves in 2": (weighted(1.0, 2.0), 2),
    "sigmoid alone": (weighted(1.0, 0.0, "sigmoid"), 2),
    "captions alone": (weighted(0.0, 2.0), 2),
    "both halves in 4": (weighted(1.0, 2.0), 4),
    "both halves, one example each": (weighted(1.0, 2.0), 8),
    "both halves, sigmoid in tiles": (weighted(1.0, 2.0, "sigmoid", loss__contrastive_tile=3), 4),
    "softmax alone": (weighted(1.0, 0.0), 4),
    "captions alone in 4, unchunked": (weighted(0.0, 2.0, loss__caption_chunk=0), 4),
    "one pooler, tied embeddings": (
        weighted(1.0, 2.0, model__pooler__kind="single", model__text__tie_embeddings=True),
        2,
    ),
}


# The first one is the main suite's; each takes some 15 seconds.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(CASES)]
)
def test_gradients_and_metrics_are_those_of_the_whole_batch(name: str) -> None:
    check_equal(*CASES[name])


def test_a_microbatch_has_as_many_rows_of_every_device() -> None:
    rows = np.arange(24)
    parts = split(rows, 3)
    assert parts.shape == (8, 3)
    for device in range(4):  # each holds 6 rows that follow one another
        own = set(range(6 * device, 6 * device + 6))
        for at in range(3):
            assert len(own & set(np.asarray(parts[:, at]).tolist())) == 2
    np.testing.assert_array_equal(join(parts.swapaxes(0, 1)), rows)


def scopes(con: float, cap: float) -> tuple[str, str]:
    """The names of the computations of the first pass, and of the second."""
    c = weighted(con, cap, microbatches=2)
    params, batch = tiny.parameters(c.model), tiny.batch(c.model, LENGTHS)
    program = jax.jit(lambda p, b: gradients_of(c, p, b)).lower(params, batch).as_text(debug_info=True)
    names = re.findall(r'"([^"\n]*)"', program)
    first, second = (
        "\n".join(n for n in names if scope in n) for scope in ("microbatch_embed", "microbatch_gradients")
    )
    return first, second


def test_the_first_pass_has_no_captioning_half_and_goes_with_the_contrastive_loss() -> None:
    generative = ("generative_pooler", "multimodal", "final_norm")
    contrastive = ("image_encoder", "contrastive_pooler", "image_projection", "unimodal", "text_projection")
    first, second = scopes(1.0, 2.0)
    for name in contrastive:
        assert name in first and name in second, name
    for name in generative:
        assert name in second, f"{name}: the search would find nothing even where it is computed"
        assert name not in first

    first, second = scopes(1.0, 0.0)
    assert "contrastive_pooler" in first and not [name for name in generative if name in second]
    first, second = scopes(0.0, 2.0)
    assert not first and "multimodal" in second and "contrastive_pooler" not in second


def memory(batch_size: int, count: int) -> int:
    """Bytes of temporaries where activations outweigh parameters."""
    c = weighted(1.0, 2.0, microbatches=count, model__image__size=32)
    params = state.abstract_parameters(c)
    batch = tiny.batch(c.model, LENGTHS * (batch_size // 8))
    compiled = jax.jit(lambda p, b: gradients_of(c, p, b)).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_peak_memory_is_that_of_one_microbatch() -> None:
    rows, count = 8, 8
    one, many = memory(rows, 1), memory(rows * count, count)
    # Of all rows there are, beside what one microbatch takes: the features of both towers, stacked and in order, and as
    # much for their gradients; pixels and ids, split. The sum of the gradients is as large as the parameters.
    features = 8 * 4 * rows * count * tiny.MODEL.embed_dim
    inputs = rows * count * (32 * 32 * 3 + 4 * tiny.TEXT.length)
    parameters = 4 * state.parameter_count(state.abstract_parameters(weighted(1.0, 2.0, model__image__size=32)))
    assert features + inputs + parameters < one / 8, "too small a model to tell"
    assert many < 1.1 * one + features + inputs + parameters


def check_mesh(c: config.Config, mesh_shape: tuple[int, int, int]) -> None:
    """Runs with 8 devices: in 4 microbatches over the mesh, against one device at once."""
    params, batch = tiny.parameters(c.model), tiny.batch(c.model, LENGTHS * 4)
    wanted = compute(c, params, batch)
    mesh = sharding.make_mesh(mesh_shape)
    places = sharding.tree_shardings(params, params, mesh)
    split_up = tiny.replace(c, microbatches=4)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, places), jax.device_put(batch, sharding.batch_sharding(mesh))
        compiled = jax.jit(lambda p, b: gradients_of(split_up, p, b)).lower(*put).compile()
        gradients, metrics = compiled(*put)
    # Without out_shardings: what they were summed in.
    same = jax.tree.map(lambda g, place: g.sharding.is_equivalent_to(place, g.ndim), gradients, places)
    assert all(jax.tree.leaves(same)), same
    # Examples stay on their devices, but for ids: the devices of a replica look up each other's, of one microbatch.
    pattern = r"= (\w+)\[([\d,]*)\][^=]* (all-\w+|collective-permute|reduce-scatter)(?:-start)?\("
    moved = re.findall(pattern, compiled.as_text())
    length = batch["tokens"].shape[1]
    ids = (f"{len(batch['tokens']) // split_up.microbatches // mesh.shape['replica']},{length}", "all-gather")
    assert moved and not [m for m in moved if m[0] in ("u8", "s32", "s8", "u32") and m[1:] != ids], moved
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    assert_equal((jax.tree.map(np.asarray, gradients), {k: float(v) for k, v in metrics.items()}), wanted)


def check_replica_fsdp_tensor() -> None:
    check_mesh(weighted(1.0, 2.0, loss__contrastive_tile=4), (2, 2, 2))


def check_replica() -> None:
    check_mesh(weighted(1.0, 2.0), (8, 1, 1))


def check_fsdp_with_the_sigmoid() -> None:
    check_mesh(weighted(1.0, 2.0, "sigmoid"), (1, 8, 1))


def check_all_axes_with_the_sigmoid() -> None:
    check_mesh(weighted(1.0, 2.0, "sigmoid", loss__contrastive_tile=4), (2, 2, 2))


@pytest.mark.slow
def test_eight_devices_in_microbatches_equal_one_at_once(run_python) -> None:
    run_python(check_replica_fsdp_tensor, timeout=290)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check_replica, check_fsdp_with_the_sigmoid, check_all_axes_with_the_sigmoid], ids=lambda f: f.__name__
)
def test_eight_devices_in_microbatches_equal_one_at_once_in_every_form(run_python, check) -> None:
    run_python(check, timeout=290)
