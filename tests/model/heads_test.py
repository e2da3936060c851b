"""Classifiers: what they read, which parameters exist, and independence of meshes and microbatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import config, losses, sharding
from coca_jax.model import flops
from coca_jax.model.coca import CoCa
from coca_jax.model.heads import last_text_token
from coca_jax.train import frozen, state
from coca_jax.train.step import gradients_of
from tests import tiny

LENGTHS = [9, 2, 9, 2, 9, 2, 9, 3]


def task(reads: str, frames: int = 1, **changes: Any) -> config.Config:
    c = tiny.replace(tiny.CONFIG, loss__lambda_con=0.0, loss__lambda_cap=0.0, loss__lambda_cls=1.0)
    c = tiny.replace(c, model__image__depth=1, model__text__n_uni=1, model__text__n_multi=1)
    return tiny.replace(c, model__head=config.Head(reads, 5, frames), loss__label_smoothing=0.1, **changes)


def batch(c: config.Config, seed: int = 0) -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(seed), len(LENGTHS)
    shape = (rows, *state.frames_of(c), c.model.image.size, c.model.image.size, 3)
    labels = rng.integers(0, 5, rows).astype(np.int32)
    return tiny.batch(c.model, LENGTHS, seed) | {"images": rng.integers(0, 256, shape, np.uint8), "labels": labels}


def parameters(c: config.Config, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(rng.normal(size=leaf.shape) * 0.2, np.float32), state.abstract_parameters(c)
    )


@pytest.mark.parametrize(
    ("reads", "present", "absent"),
    [
        ("pooler", {"classifier", "image_encoder"}, {"text_decoder", "contrastive_pooler", "generative_pooler"}),
        (
            "contrastive",
            {"classifier", "contrastive_pooler"},
            {"text_decoder", "generative_pooler", "image_projection"},
        ),
        ("decoder", {"classifier", "text_decoder", "generative_pooler"}, {"contrastive_pooler", "text_projection"}),
    ],
)
def test_a_task_has_no_parameters_that_it_does_not_read(reads: str, present: set[str], absent: set[str]) -> None:
    shapes = state.abstract_parameters(task(reads))
    assert present <= shapes.keys() and not absent & shapes.keys()
    assert "lm_head" not in shapes.get("text_decoder", {})
    assert shapes["classifier"]["linear"]["kernel"].shape == (16, 5)


@pytest.mark.parametrize("kind", ["cascade", "single"])
def test_the_classifiers_pooler_needs_no_other_pooler_of_any_kind(kind: str) -> None:
    c = task("pooler", model__pooler__kind=kind)
    assert state.abstract_parameters(c).keys() == {"classifier", "image_encoder", "logit_scale"}
    assert flops.forward(c.model, batch_size=8, contrastive=False, captioning=False, classes=True).poolers == 0


def test_an_answer_depends_on_the_last_token_and_not_on_padding() -> None:
    c = task("decoder")
    params, b = parameters(c), batch(c)
    model = CoCa(c.model)
    images = jnp.asarray(b["images"], jnp.float32) / 255
    classify = jax.jit(lambda p, i, t: model.apply({"params": p}, i, t, method="classify"))
    logits = classify(params, images, b["tokens"])
    assert logits.shape == (8, 5) and logits.dtype == jnp.float32
    short = b["tokens"].copy()
    short[:, LENGTHS[1] - 1] = np.where(np.array(LENGTHS) == 2, 7, short[:, 1])
    changed = np.abs(np.asarray(classify(params, images, short) - logits)).max(axis=1) > 1e-6
    assert (changed == (b["tokens"][:, 1] != short[:, 1])).all() and changed.any()
    # Less padding gives the same answers.
    rows = np.array(LENGTHS) <= 3
    np.testing.assert_allclose(classify(params, images[rows], b["tokens"][rows][:, :4]), logits[rows], atol=1e-5)


def test_frame_embeddings_make_the_order_of_frames_matter() -> None:
    c = task("pooler", 3)
    params, b = parameters(c), batch(c)
    images = jnp.asarray(b["images"], jnp.float32) / 255
    classify = jax.jit(lambda p, i: CoCa(c.model).apply({"params": p}, i, b["tokens"], method="classify"))
    forward, backward = classify(params, images), classify(params, images[:, ::-1])
    assert np.abs(forward - backward).max() > 1e-3
    params["classifier"]["frame_embedding"][:] = 0  # the initial value: the paper's pooler
    np.testing.assert_allclose(classify(params, images), classify(params, images[:, ::-1]), atol=1e-5)


@pytest.mark.parametrize("frames", [(), (1,), (3,), (4,)], ids=str)
def test_clips_with_another_number_of_frames_are_rejected(frames: tuple[int, ...]) -> None:
    """Two frames of another size could have as many tokens, so the number of tokens does not reveal the mistake."""
    c = task("pooler", 2)
    images = jax.ShapeDtypeStruct((1, *frames, 16, 16, 3), jnp.float32)
    classify = lambda p, i: CoCa(c.model).apply({"params": p}, i, batch(c)["tokens"][:1], method="classify")  # noqa: E731
    with pytest.raises(ValueError, match=r"clips of 2 frames.*\[b, 2, size, size, 3\]"):
        jax.eval_shape(classify, parameters(c), images)


def test_the_loss_is_cross_entropy_with_smoothed_targets() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 2, 3, 0, 1])
    loss, metrics = losses.classification(jnp.asarray(logits), jnp.asarray(labels), smoothing=0.2)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = 0.8 * np.eye(4)[labels] + 0.05
    np.testing.assert_allclose(loss, -(target * log_probs).sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(axis=1) == labels).mean())


def compute(c: config.Config, params: Any, b: Any) -> tuple[Any, dict[str, float]]:
    gradients, metrics = jax.jit(lambda p, x: gradients_of(c, p, x))(params, b)
    return jax.tree.map(np.asarray, gradients), {name: float(value) for name, value in metrics.items()}


def same(found: tuple[Any, dict[str, float]], wanted: tuple[Any, dict[str, float]]) -> None:
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for path, b in jax.tree_util.tree_leaves_with_path(wanted[0]):
        a = found[0]
        for key in path:
            a = a[key.key]
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6, err_msg=sharding.path_of(path))


def check_devices() -> None:
    """Runs with 8 devices: clips in microbatches on a mesh, and questions on a mesh, equal one device."""
    for c, count in ((task("pooler", 2), 2), (task("decoder"), 1)):
        params, b = parameters(c), {k: np.concatenate([v] * 2) for k, v in batch(c).items()}
        wanted = compute(c, params, b)
        assert wanted[1]["loss"] == wanted[1]["loss/classification"] > 0.5
        mesh = sharding.make_mesh((2, 2, 2))
        with jax.set_mesh(mesh):
            put = jax.device_put(params, sharding.tree_shardings(params, params, mesh))
            rows = jax.device_put(b, sharding.batch_sharding(mesh))
            same(compute(tiny.replace(c, microbatches=count), put, rows), wanted)


@pytest.mark.slow
def test_eight_devices_equal_one(run_python) -> None:
    run_python(check_devices, timeout=290)


def test_flops_count_only_trained_parts_three_times() -> None:
    c = task("pooler", 2)
    parts = flops.forward(c.model, batch_size=8, contrastive=False, captioning=False, classes=True)
    assert parts.unimodal == parts.multimodal == parts.softmax == parts.poolers == parts.contrastive == 0
    one = flops.forward(task("pooler").model, batch_size=8, contrastive=False, captioning=False, classes=True)
    assert parts.image_encoder == 2 * one.image_encoder
    assert flops.train_step_flops(c) == pytest.approx(3 * 8 * parts.total)
    locked = tiny.replace(c, optimizer__freeze=("(?!classifier/).*",))
    assert flops.train_step_flops(locked) == pytest.approx(8 * (parts.image_encoder + 2 * parts.classifier))
    assert frozen.patterns(locked) == locked.optimizer.freeze


def test_the_last_token_is_found_after_one_with_the_padding_id() -> None:
    """CLIP's vocabulary pads with the id of the "!" in "!("."""
    tokens = np.array([[2, 0, 5, 1, 0, 0], [2, 7, 8, 9, 0, 1], [2, 0, 0, 0, 0, 0], [0] * 6], np.int32)
    hidden = np.broadcast_to(np.arange(6.0)[None, :, None], (4, 6, 1))
    np.testing.assert_array_equal(last_text_token(hidden, tokens, 0)[:, 0], [3, 5, 0, 0])
