from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.sharding import path_of
from coca_jax.train import state
from coca_jax.train.optimizer import make_optimizer, matching, matrices, schedule
from tests import tiny


@pytest.mark.parametrize(
    ("kind", "middle", "end"),
    [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0), ("rsqrt", (10 / 55) ** 0.5, 0.1**0.5)],
)
def test_schedules_warm_up_and_decay(kind: str, middle: float, end: float) -> None:
    c = config.Optimizer(peak_lr=2.0, schedule=kind, warmup=0.1, end_lr=0.1)
    rate = schedule(c, 100)
    assert [float(rate(step)) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert float(rate(55)) == pytest.approx(2.0 * middle, rel=1e-3)
    assert float(rate(100)) == pytest.approx(2.0 * end, rel=1e-3)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert float(schedule(config.Optimizer(peak_lr=3.0, warmup=0.0, schedule="linear"), 10)(0)) == 3.0


PARAMETERS = state.abstract_parameters(tiny.CONFIG)


def _zeros() -> dict:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), PARAMETERS)


def test_only_matrices_decay() -> None:
    c = config.Optimizer(name="adamw", peak_lr=0.5, schedule="constant", warmup=0.0, weight_decay=0.1)
    tx = make_optimizer(c, 10, PARAMETERS)
    params = _zeros()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path_of(path)
        decays = name.rsplit("/", 1)[-1] in ("kernel", "embedding")
        expected = -0.5 * 0.1 if decays else 0.0  # decoupled: times the rate
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_frozen_parameters_do_not_move_and_have_no_moments() -> None:
    c = config.Optimizer(name="adamw", freeze=("image_encoder/.*",))
    tx = make_optimizer(c, 10, PARAMETERS)
    params = _zeros()
    opt_state = tx.init(params)
    assert not any("image_encoder" in path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(opt_state))
    updates, _ = tx.update(params, opt_state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["image_encoder"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates["text_decoder"]["lm_head"]))


def test_wrong_freeze_patterns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'image_encodr/.\*' matches no parameter"):
        make_optimizer(config.Optimizer(freeze=("image_encodr/.*",)), 10, PARAMETERS)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        make_optimizer(config.Optimizer(freeze=(".*",)), 10, PARAMETERS)


def test_adafactor_factors_attention_kernels() -> None:
    """optax factors the two largest axes if both have 128 elements: heads of 64 would never be."""
    c = tiny.replace(tiny.CONFIG, model__image__width=256, model__image__heads=4, optimizer__name="adafactor")
    shapes = state.abstract_parameters(c)
    opt_state = jax.eval_shape(make_optimizer(c.optimizer, 10, shapes).init, shapes)
    factored = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "v_row")) if hasattr(s, "v_row")]
    blocks = factored[0].v_row["image_encoder"]["blocks"]["attention"]
    assert blocks["query"]["kernel"].shape == (2, 256)
    assert factored[0].v["image_encoder"]["blocks"]["attention"]["query"]["kernel"].shape == (1,)


def test_adafactor_is_the_recipe() -> None:
    """Against the formulas of arXiv 1804.04235 on one matrix: decay min(b2, 1 - t^-0.8), unit RMS, momentum 0.9."""
    c = config.Optimizer(
        name="adafactor", peak_lr=1.0, schedule="constant", warmup=0.0, weight_decay=0.0, clip_norm=0.0, b2=0.6
    )
    params = {"image_projection": {"kernel": jnp.zeros((128, 160))}}
    tx = make_optimizer(c, 10, params)
    opt_state = tx.init(params)
    rng = np.random.default_rng(0)
    row, column, momentum = np.zeros(128), np.zeros(160), np.zeros((128, 160))
    for t in range(1, 5):
        gradient = rng.normal(size=(128, 160))
        decay = min(0.6, 1 - t**-0.8)
        square = gradient**2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(axis=1)
        column = decay * column + (1 - decay) * square.mean(axis=0)
        update = gradient / np.sqrt(row[:, None] * column[None] / row.mean())
        update /= max(1.0, np.sqrt((update**2).mean()))
        momentum = 0.9 * momentum + 0.1 * update
        gradients = {"image_projection": {"kernel": jnp.asarray(gradient, jnp.float32)}}
        got, opt_state = tx.update(gradients, opt_state, params)
        np.testing.assert_allclose(got["image_projection"]["kernel"], -momentum, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    c = config.Optimizer(name="adamw", clip_norm=1.0, weight_decay=0.0)
    tx = make_optimizer(c, 10, PARAMETERS)
    params = _zeros()
    huge = jax.tree.map(lambda x: 1e3 * x, params)
    state_after = tx.update(huge, tx.init(params), params)[1]
    moments = next(s for s in jax.tree.leaves(state_after, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")).mu
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1, rtol=1e-4)  # (1 - b1) * the clipped gradient


def test_muon_knows_the_matrices() -> None:
    numbers = matrices(PARAMETERS)
    attention = numbers["image_encoder"]["blocks"]["attention"]
    assert attention["query"]["kernel"] == ((1,), (2, 3)) and attention["out"]["kernel"] == ((1, 2), (3,))
    assert numbers["text_decoder"]["lm_head"]["kernel"] is None
    assert numbers["image_projection"]["kernel"] == ((0,), (1,))


def test_patterns_match_whole_paths() -> None:
    hits = matching(PARAMETERS, ["text_decoder/.*"])
    assert all(jax.tree.leaves(hits["text_decoder"])) and not any(jax.tree.leaves(hits["text_projection"]))
