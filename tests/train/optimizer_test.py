from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.sharding import path_of
from coca_jax.train import frozen, rounding, state
from coca_jax.train.optimizer import clipped, make_optimizer, matching, matrices, schedule
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


def _ones() -> dict:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), PARAMETERS)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
@pytest.mark.parametrize("mask", [config.Optimizer().decay_mask, r"(text_decoder/lm_head|.*mlp/up)/.*"])
def test_what_the_mask_names_decays(name: str, mask: str) -> None:
    c = config.Optimizer(name=name, peak_lr=0.5, schedule="constant", warmup=0.0, weight_decay=0.1, decay_mask=mask)
    encoder, decoder = PARAMETERS["image_encoder"], PARAMETERS["text_decoder"]
    some = {
        "image_encoder": {"blocks": {name: encoder["blocks"][name] for name in ("mlp", "mlp_norm")}},
        "text_decoder": {name: decoder[name] for name in ("lm_head", "token_embedding", "cls_norm")},
        "logit_scale": PARAMETERS["logit_scale"],
    }
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), some)
    tx = make_optimizer(c, 10, params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decaying = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        where = path_of(path)
        if re.fullmatch(mask, where):
            decaying.add(where)
        expected = -0.5 * 0.1 if where in decaying else 0.0  # decoupled: times the rate
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=where)
    # The groups that Muon has: matrices of the layers, and what it leaves to AdamW.
    assert {"text_decoder/lm_head/kernel", "image_encoder/blocks/mlp/up/kernel"} < decaying


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_do_not_move_and_have_no_moments(name: str) -> None:
    c = config.Optimizer(name=name, freeze=("image_encoder/.*",))
    tx = make_optimizer(c, 10, PARAMETERS)
    trained, fixed = frozen.split(_ones(), c.freeze)
    assert fixed.keys() == {"image_encoder"} and frozen.join(trained, fixed).keys() == _ones().keys()
    opt_state = tx.init(trained)
    assert not any("image_encoder" in path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(opt_state))
    updates, _ = jax.jit(tx.update)(trained, opt_state, trained)
    assert "image_encoder" not in updates
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates["text_decoder"]["lm_head"]))


def test_wrong_freeze_patterns_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'image_encodr/.\*' matches no parameter's whole path; near it: image_encoder/"
    ):
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


@pytest.mark.parametrize("norm", [0.5, 100.0])  # clipped, and not
def test_clipping_is_that_of_optax(norm: float) -> None:
    gradients = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([-2.0])}
    found, _ = clipped(norm).update(gradients, optax.EmptyState())
    wanted, _ = optax.clip_by_global_norm(norm).update(gradients, optax.EmptyState())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7 if norm < 1 else 0)  # two roundings instead of one and another


def test_gradients_are_clipped_to_the_global_norm() -> None:
    c = config.Optimizer(name="adamw", clip_norm=1.0, weight_decay=0.0)
    tx = make_optimizer(c, 10, PARAMETERS)
    params = _ones()
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


MOMENTUM = {"adafactor": "ema", "adamw": "mu", "muon": "mu"}


@pytest.mark.parametrize("name", MOMENTUM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_moments_are_stored_as_configured_and_all_else_in_float32(name: str, dtype: str, param_dtype: str) -> None:
    second = "float32" if name == "adafactor" else dtype
    c = config.Optimizer(name=name, state_dtype=dtype, second_moment_dtype=second)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), PARAMETERS)
    tx = make_optimizer(c, 10, shapes)
    opt_state = jax.eval_shape(tx.init, shapes)
    _, after = jax.eval_shape(lambda g, s, p: tx.update(g, s, p), shapes, opt_state, shapes)
    kinds = jax.tree_util.tree_map_with_path(lambda path, leaf: (path_of(path), leaf.shape, str(leaf.dtype)), opt_state)
    assert kinds == jax.tree_util.tree_map_with_path(
        lambda path, leaf: (path_of(path), leaf.shape, str(leaf.dtype)), after
    )
    momentum = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        parts = path_of(path).split("/")
        if MOMENTUM[name] in parts:
            momentum += leaf.size
            assert leaf.dtype == dtype, path_of(path)
        elif "nu" in parts:
            assert leaf.dtype == second, path_of(path)
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32, path_of(path)
    assert momentum == state.parameter_count(PARAMETERS)


def _descend(c: config.Optimizer, dtype: str, steps: int = 60) -> float:
    """Mean square distance of a matrix from its target after some steps on noisy gradients; it starts at 1."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(steps, 16, 24)), jnp.float32)
    params: Any = {"image_projection": {"kernel": jnp.zeros((16, 24), dtype)}}
    tx = make_optimizer(c, steps, params)

    def step(carry: Any, noise: Any) -> Any:
        params, opt_state = carry
        gradient = params["image_projection"]["kernel"].astype(jnp.float32) - target + 0.3 * noise
        updates, opt_state = tx.update({"image_projection": {"kernel": gradient}}, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), noise))()
    assert params["image_projection"]["kernel"].dtype == dtype
    return float(jnp.mean((params["image_projection"]["kernel"] - target) ** 2) / jnp.mean(target**2))


@pytest.mark.parametrize("name", MOMENTUM)
def test_bfloat16_momentum_and_parameters_descend_as_float32_does(name: str) -> None:
    rate = 0.4 if name == "muon" else 0.1  # Muon's updates have a root-mean-square of 0.2
    c = config.Optimizer(name=name, peak_lr=rate, warmup=0.0, weight_decay=0.0)
    full = _descend(c, "float32")
    assert full < 0.1
    half = tiny.replace(c, state_dtype="bfloat16")
    if name != "adafactor":
        half = tiny.replace(half, second_moment_dtype="bfloat16")
    assert _descend(half, "float32") < 1.1 * full + 0.002
    assert _descend(half, "bfloat16") < 1.2 * full + 0.005


def test_second_moments_in_bfloat16_move_as_far_as_in_float32() -> None:
    """They rise from 1 to 4 in 2,000 updates of a thousandth; rounded to the nearest they would stay at 1."""
    adam = optax.scale_by_adam(0.9, 0.999)
    gradients: Any = {"kernel": jnp.full((64, 64), 2.0)}

    def after(tx: optax.GradientTransformation, dtype: str) -> Any:
        start = optax.tree.zeros_like(gradients)
        nu = optax.tree.cast(optax.tree.ones_like(gradients), dtype)
        begun = tx.init(start)._replace(nu=nu)
        return jax.lax.scan(lambda s, _: (tx.update(gradients, s)[1], None), begun, None, 2000)[0].nu["kernel"]

    half = jax.jit(lambda: after(rounding.second_moments_in_bfloat16(adam), "bfloat16"))()
    assert half.dtype == jnp.bfloat16
    exact = 4 - 3 * 0.999**2000
    # One value's error is about 1e-2 of it (2^-9 a step, 700 of them remembered, over their weight of 1/700): the mean
    # of 4,096 is 64 times nearer.
    assert abs(float(half.astype(jnp.float32).mean()) / exact - 1) < 2e-3
    assert float(jnp.abs(half.astype(jnp.float32) / exact - 1).max()) < 0.1


def test_rounding_by_chance_keeps_the_mean_and_what_needs_no_rounding() -> None:
    x = jnp.asarray([1.0 + 2.0**-9, -3.0e38, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-40], jnp.float32)
    rows = jax.vmap(lambda key: rounding.stochastically_rounded(x, key))(jax.random.split(jax.random.key(0), 4096))
    values = np.asarray(rows.astype(jnp.float32))
    assert set(values[:, 0]) == {1.0, 1.0078125}
    assert (
        abs(values[:, 0].mean() - float(x[0])) < 4 * 2**-7 / 2 / 64
    )  # four standard errors of a coin with sides a 128th apart
    assert (values[:, 2] == 0).all() and np.isposinf(values[:, 3]).all() and np.isneginf(values[:, 4]).all()
    assert np.isnan(values[:, 5]).all() and (np.abs(values[:, 6]) < 1e-38).all()
    exact = jnp.asarray([1.5, -2.0, 0.0078125], jnp.float32)
    assert (rounding.stochastically_rounded(exact, jax.random.key(1)) == exact).all()


def test_lower_layers_learn_more_slowly() -> None:
    c = config.Optimizer(name="adamw", peak_lr=1.0, warmup=0.0, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    params = _ones()
    updates = {}
    for decay in (1.0, 0.5):
        tx = make_optimizer(tiny.replace(c, layer_decay=decay), 10, params)
        updates[decay] = jax.jit(tx.update)(params, tx.init(params), params)[0]
    ratio = jax.tree.map(lambda a, b: np.asarray(a / b), updates[0.5], updates[1.0])
    image, text = ratio["image_encoder"], ratio["text_decoder"]  # 2 layers; 2 + 2 layers
    kernel = image["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0, 0], [0.25, 0.5], rtol=1e-5)
    np.testing.assert_allclose(image["patch_embedding"]["kernel"], 0.125 * np.ones_like(kernel[0, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(text["unimodal"]["blocks"]["mlp"]["up"]["kernel"][:, 0, 0], [0.0625, 0.125], rtol=1e-5)
    np.testing.assert_allclose(text["multimodal"]["blocks"]["mlp"]["up"]["kernel"][:, 0, 0], [0.25, 0.5], rtol=1e-5)
    np.testing.assert_allclose(text["token_embedding"]["embedding"][0, 0], 0.03125, rtol=1e-5)
    for top in (text["lm_head"], ratio["image_projection"], ratio["generative_pooler"]):
        for leaf in jax.tree.leaves(top):
            np.testing.assert_allclose(leaf, 1.0 + 0 * leaf, rtol=1e-5)


def test_what_is_frozen_counts_as_a_level() -> None:
    """The rest learns at the rates that it has where nothing is frozen."""
    c = config.Optimizer(name="adamw", warmup=0.0, weight_decay=0.0, clip_norm=0.0, layer_decay=0.5)
    params = _ones()
    tx = make_optimizer(c, 10, params)
    whole = jax.jit(tx.update)(params, tx.init(params), params)[0]
    for freeze in ("text_decoder/multimodal/.*", "image_encoder/blocks/.*"):
        tx = make_optimizer(tiny.replace(c, freeze=(freeze,)), 10, params)
        trained, _ = frozen.split(params, (freeze,))
        updates = jax.jit(tx.update)(trained, tx.init(trained), trained)[0]
        jax.tree.map(np.testing.assert_array_equal, updates, frozen.split(whole, (freeze,))[0])
