from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coca_jax import config, sharding
from coca_jax.train import optimizer, state
from coca_jax.train.step import compile_step, train_step
from tests import tiny

# Skewed on purpose: a mean per device, or per row, would weigh the long captions less.
LENGTHS = [9, 9, 9, 9, 2, 2, 2, 3]
EVERY_AXIS = [(2, 2, 2)]
ONE_AXIS = [(8, 1, 1), (1, 8, 1)]
OTHER_MESHES = [(4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2)]  # with those, all of 8 devices; two heads split no further
# Half of the program, which compiles in half the time: where what is tested is what is made of gradients, of any loss.
CONTRASTIVE = tiny.replace(tiny.CONFIG, loss__lambda_cap=0.0)


def run_step(c: config.Config, mesh_shape: tuple[int, int, int], steps: int = 2) -> tuple[Any, Any, Any]:
    """Gradients of the first batch, and the parameters and metrics after some steps."""
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    places = sharding.batch_sharding(mesh)
    batches = [jax.device_put(tiny.batch(c.model, LENGTHS, seed), places) for seed in range(steps)]
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        first = None
        metrics = []
        for batch in batches:
            now, m = step(now, batch)
            if first is None:
                # The first moment after one step is (1 - b1) times the clipped gradient, of every parameter.
                moments = [s for s in jax.tree.leaves(now.opt_state, is_leaf=lambda x: hasattr(x, "mu"))]
                first = next(jax.tree.map(np.asarray, s.mu) for s in moments if hasattr(s, "mu"))
            metrics.append({k: float(v) for k, v in m.items()})
    gradients = jax.tree.map(lambda mu: mu / (1 - c.optimizer.b1), first)
    return gradients, jax.tree.map(np.asarray, now.params), metrics


def check_meshes(meshes: list[tuple[int, int, int]] = EVERY_AXIS) -> None:
    """Runs with 8 devices: each mesh against one device."""
    c = tiny.replace(tiny.CONFIG, optimizer__clip_norm=0.0)
    gradients, _, metrics = run_step(c, (1, 1, 1))
    assert optax.tree.norm(gradients) > 0.1
    for mesh in meshes:
        other_gradients, _, other_metrics = run_step(c, mesh)
        for one, other in zip(metrics, other_metrics, strict=True):
            assert one.keys() == other.keys()
            # Those of the second step are of the updated parameters. Of the update itself AdamW makes a sign where the
            # gradient is rounding noise: its norm is left out, and so are the parameters one by one.
            for name in one.keys() - {"update_norm"}:
                np.testing.assert_allclose(other[name], one[name], rtol=2e-5, atol=1e-6, err_msg=f"{mesh} {name}")
        # float32 sums over the batch in another order: an element's error is as large as its summands' rounding, and so
        # goes with the largest of its tensor and not with its own size. Measured: up to 3e-6 of values near 0.1.
        # A key's bias has no gradient at all (it moves all scores alike): what stands there is noise of 1e-7.
        for a, b in zip(jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-6, err_msg=str(mesh))


def check_one_axis() -> None:
    check_meshes(ONE_AXIS)


def check_other_meshes() -> None:
    check_meshes(OTHER_MESHES)


def test_eight_devices_equal_one(run_python) -> None:
    run_python(check_meshes, timeout=290)


@pytest.mark.slow
def test_eight_devices_equal_one_along_one_axis(run_python) -> None:
    run_python(check_one_axis, timeout=290)


@pytest.mark.soak
def test_eight_devices_equal_one_in_every_other_mesh(run_python) -> None:
    run_python(check_other_meshes, timeout=600)


def lowered(c: config.Config) -> tuple[str, Any, Any]:
    """The lowered program of a step with its names, its compiled FLOPs, and the parameters' paths."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        abstract = state.abstract(c, tx, mesh)
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(c.model, LENGTHS).items()}
        step: Any = compile_step(c, tx, mesh, abstract)
        program = step.lower(abstract, shapes)
    paths = {sharding.path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract.params)}
    return program.as_text(debug_info=True), program.cost_analysis()["flops"], paths


def test_a_loss_weight_of_zero_removes_that_half_from_the_program() -> None:
    both, both_flops, paths = lowered(tiny.CONFIG)
    generative = ("generative_pooler", "multimodal", "lm_head")
    contrastive = ("contrastive_pooler", "image_projection", "text_projection", "cls_norm")
    for name in generative + contrastive:
        assert name in both, f"{name}: the search would find nothing even where it is computed"
        assert any(name in path for path in paths)

    clip, clip_flops, paths = lowered(tiny.replace(tiny.CONFIG, loss__lambda_cap=0.0))
    captioner, captioner_flops, captioner_paths = lowered(tiny.replace(tiny.CONFIG, loss__lambda_con=0.0))
    for program, there, absent in ((clip, paths, generative), (captioner, captioner_paths, contrastive)):
        for name in absent:
            assert name not in program
            assert not any(name in path for path in there)
    assert clip_flops < 0.75 * both_flops
    assert captioner_flops < both_flops


def test_the_state_is_donated() -> None:
    c = CONTRASTIVE
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        before = state.real(c, tx, mesh)
        compile_step(c, tx, mesh, before)(before, tiny.batch(c.model, LENGTHS))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_logit_scale_stays_within_its_bounds() -> None:
    c = tiny.replace(CONTRASTIVE, model__temperature=0.0100001, optimizer__peak_lr=1.0, optimizer__warmup=0.0)
    _, params, metrics = run_step(c, (1, 1, 1), steps=6)
    assert 0.0 <= params["logit_scale"] <= np.log(100.0) + 1e-6
    assert all(1.0 <= m["logit_scale"] <= 100.01 for m in metrics)


@pytest.mark.slow
def test_moving_average_follows_the_parameters() -> None:
    c = tiny.replace(CONTRASTIVE, optimizer__ema_decay=0.5, optimizer__peak_lr=1e-2)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        expected = jax.tree.map(np.asarray, now.params)
        for at in range(3):
            now, _ = step(now, tiny.batch(c.model, LENGTHS, at))
            decay = min(0.5, (1 + at) / (10 + at))
            expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, now.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), now.ema, expected)


@pytest.mark.parametrize(
    ("name", "dtypes", "param_dtype"),
    [
        ("adamw", ("float32", "float32"), "float32"),
        pytest.param("adafactor", ("float32", "float32"), "float32", marks=pytest.mark.slow),
        pytest.param("muon", ("bfloat16", "bfloat16"), "float32", marks=pytest.mark.slow),
        pytest.param("adafactor", ("bfloat16", "float32"), "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_each_optimizer_lowers_the_loss(name: str, dtypes: tuple[str, str], param_dtype: str) -> None:
    changes = {"optimizer__state_dtype": dtypes[0], "optimizer__second_moment_dtype": dtypes[1]}
    changes["model__param_dtype"] = param_dtype
    c = tiny.replace(CONTRASTIVE, optimizer__name=name, steps=12, **changes)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        losses = []
        for _ in range(12):
            now, metrics = step(now, tiny.batch(c.model, LENGTHS))
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.85 * losses[0], losses


def test_a_step_keeps_shapes_and_dtypes() -> None:
    """Else the second step is compiled again, and a checkpoint of the first does not fit."""
    changes = {"optimizer__state_dtype": "bfloat16", "model__param_dtype": "bfloat16", "optimizer__ema_decay": 0.9}
    c = tiny.replace(tiny.CONFIG, microbatches=2, **changes)
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    before = jax.eval_shape(lambda: state.create(c, tx))
    after, metrics = jax.eval_shape(lambda s, b: train_step(c, tx, s, b), before, tiny.batch(c.model, LENGTHS))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
    assert all(jax.tree.leaves(same)), same
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(metrics)} == {"float32"}
    kernel = ("image_encoder", "blocks", "mlp", "up", "kernel")
    for tree, dtype in ((after.params, jnp.bfloat16), (after.ema, jnp.float32)):
        leaf = functools.reduce(lambda node, name: node[name], kernel, tree)
        assert leaf.dtype == dtype
