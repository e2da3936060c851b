from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import config, losses, sharding
from coca_jax.model.coca import Output
from coca_jax.train import optimizer, state
from coca_jax.train.step import compile_step
from tests import tiny

SIGLIP = tiny.replace(tiny.CONFIG, loss__contrastive="sigmoid", model__logit_bias=-10.0, model__temperature=0.1)


def test_total_weights_the_parts_and_skips_those_of_weight_zero() -> None:
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((3, 10, 8), (8, 13)))
    tokens = rng.integers(1, 13, (3, 10)).astype(np.int32)
    features = jnp.eye(3, 5)
    output = Output(image_features=features, text_features=features, hidden=hidden, logit_scale=jnp.float32(2))

    def total(con: float, cap: float) -> tuple[Any, Any]:
        return losses.total(output, head, tokens, config.Loss(lambda_con=con, lambda_cap=cap), pad_id=0)

    value, parts = total(1.0, 2.0)
    np.testing.assert_allclose(value, parts["loss/contrastive"] + 2 * parts["loss/captioning"], rtol=1e-6)
    assert "loss/captioning" not in total(1.0, 0.0)[1]
    assert "loss/contrastive" not in total(0.0, 1.0)[1]
    np.testing.assert_allclose(total(0.0, 3.0)[0], 3 * parts["loss/captioning"], rtol=1e-6)


def test_the_configuration_selects_the_loss_and_the_tile_size() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 6, 4)).astype(np.float32)
    scale, bias = jnp.float32(2), jnp.float32(-1)
    output = Output(image_features=image, text_features=text, logit_scale=scale, logit_bias=bias)

    def program(loss: config.Loss) -> tuple[float, str]:
        def value(output: Output) -> Any:
            return losses.total(output, None, jnp.zeros((6, 3), jnp.int32), loss, pad_id=0)[0]

        return float(value(output)), str(jax.make_jaxpr(value)(output))

    softmax, sigmoid = (
        config.Loss(lambda_cap=0.0, contrastive=kind, contrastive_tile=0) for kind in ("softmax", "sigmoid")
    )
    for loss, kind in ((softmax, "softmax"), (sigmoid, "sigmoid")):
        expected = losses.contrastive(image, text, scale, bias, kind=kind)[0]
        for tile, scans in ((0, False), (4, True), (6, False)):  # a batch that fits in one tile needs no scan
            value, jaxpr = program(tiny.replace(loss, contrastive_tile=tile))
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            assert ("scan[" in jaxpr or "custom_vjp_call[" in jaxpr) == scans
    assert abs(program(softmax)[0] - program(sigmoid)[0]) > 0.1


def test_the_bias_is_a_parameter_only_with_the_sigmoid_loss() -> None:
    assert "logit_bias" not in state.abstract_parameters(tiny.CONFIG)
    assert state.abstract_parameters(SIGLIP)["logit_bias"].shape == sharding.parameter_axes("logit_bias", 0) == ()


def test_a_sigmoid_model_learns_its_bias_and_lowers_its_loss() -> None:
    c = tiny.replace(SIGLIP, loss__lambda_cap=0.0, loss__contrastive_tile=3, steps=10)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    batch = tiny.batch(c.model, [9, 8, 7, 6, 5, 4, 3, 2])
    metrics = []
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        for _ in range(10):
            now, m = step(now, batch)
            metrics.append({k: float(v) for k, v in m.items()})
    assert metrics[0]["logit_bias"] == -10.0
    np.testing.assert_allclose(metrics[0]["logit_scale"], 10.0, rtol=1e-6)
    assert metrics[-1]["logit_bias"] != -10.0 and "accuracy/image_to_text" in metrics[0]
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"], metrics
