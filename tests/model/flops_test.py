from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from coca_jax import config
from coca_jax.interop import open_clip
from coca_jax.model import flops
from coca_jax.model.coca import CoCa
from tests import tiny

BATCH = 4


def products(jaxpr: Any) -> float:
    """Operations of a program's matrix products, counting a loop's body once per iteration.

    A product has twice as many operations as the product of all its axes, each counted once. Dead code is removed, as a
    compiler does; all branches of a choice by platform must have equal counts.
    """
    jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = 0.0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while", equation
        if equation.primitive.name == "cond":
            (counted,) = {products(branch.jaxpr) for branch in equation.params["branches"]}
            total += counted
            continue
        if equation.primitive.name == "dot_general":
            a, b = (v.aval.shape for v in equation.invars)
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            shared = np.prod([a[i] for i in (*contracted, *batch)])
            total += 2 * np.prod(a, dtype=float) * np.prod(b, dtype=float) / shared
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                total += times * products(inner) if hasattr(inner, "eqns") else 0.0
    return total


def forward(model: config.Model, params: Any, images: Any, tokens: Any, contrastive: bool, captioning: bool) -> Any:
    """The forward pass and the products of both objectives, written naively."""
    parts: Any = {"contrastive": contrastive, "captioning": captioning}
    output: Any = CoCa(model).apply({"params": params}, images, tokens, method="forward", **parts)
    total = jnp.zeros(())
    if contrastive:
        total += jnp.sum(jnp.square(output.image_features @ output.text_features.T))
    if captioning:
        head: Any = CoCa(model).apply({"params": params}, method="head")
        total += jnp.sum(jnp.square(output.hidden @ head))
    return total


def arguments(model: config.Model) -> tuple[Any, Any, Any]:
    images, tokens = tiny.images(model, BATCH), tiny.tokens(model, [model.text.length] * BATCH)
    params = jax.eval_shape(lambda: CoCa(model).init(jax.random.key(0), images, tokens))["params"]
    return params, images, tokens


# All sizes differ, so that mixing up two of them is detected.
ODD = tiny.replace(
    tiny.MODEL,
    embed_dim=6,
    image=config.ImageEncoder(size=16, patch=4, width=24, depth=3, heads=2, mlp_dim=20),
    text=config.TextDecoder(vocab_size=40, length=11, width=16, heads=2, mlp_dim=28, n_uni=1, n_multi=2),
    pooler__queries=5,
)


@pytest.mark.parametrize("kind", ["parallel", "cascade", "single"])
@pytest.mark.parametrize(("contrastive", "captioning"), [(True, True), (True, False), (False, True)])
def test_forward_equals_the_products_of_the_traced_model(kind: str, contrastive: bool, captioning: bool) -> None:
    model = tiny.replace(ODD, pooler__kind=kind, text__cross_mlp=kind == "single", image__class_token=kind == "cascade")
    jaxpr = jax.make_jaxpr(lambda p, i, t: forward(model, p, i, t, contrastive, captioning))(*arguments(model))
    counted = flops.forward(model, batch_size=BATCH, contrastive=contrastive, captioning=captioning)
    assert BATCH * counted.total == products(jaxpr.jaxpr)


def test_training_costs_three_forward_passes_except_for_the_pixels_gradient() -> None:
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, i, t: forward(ODD, p, i, t, True, True)))(*arguments(ODD))
    counted = flops.forward(ODD, batch_size=BATCH).total
    # No pixel gradient is computed, and the pooler's queries do not depend on images: the first product has one
    # backward product, not two.
    patches = 2 * 4 * 4 * (4 * 4 * 3) * 24
    assert BATCH * (3 * counted - patches) == products(jaxpr.jaxpr)


def test_xla_counts_the_same_except_for_elementwise_operations() -> None:
    # One layer each, because XLA counts a loop's body once; wide, because XLA also counts norms and softmax.
    image = config.ImageEncoder(size=32, patch=4, width=256, depth=1, heads=2, mlp_dim=1024)
    text = config.TextDecoder(vocab_size=4096, length=32, width=256, heads=2, mlp_dim=1024, n_uni=1, n_multi=1)
    model = tiny.replace(tiny.MODEL, embed_dim=256, image=image, text=text, pooler__queries=16)
    program = jax.jit(lambda p, i, t: forward(model, p, i, t, True, True)).lower(*arguments(model))
    ours = BATCH * flops.forward(model, batch_size=BATCH).total
    assert 1.0 < program.cost_analysis()["flops"] / ours < 1.03


# open_clip's docs/model_profile.csv (fvcore's count of one image and one text, a multiply-add as two), in GFLOP.
@pytest.mark.parametrize(
    ("name", "total", "image", "text"),
    [("coca_ViT-B-32", 33.34, 9.19, 5.96), ("coca_ViT-L-14", 214.52, 163.64, 13.3)],
)
def test_counts_equal_the_published_ones_of_open_clip(name: str, total: float, image: float, text: float) -> None:
    counted = flops.forward(open_clip.model_config(name), batch_size=0)
    # Equal to the last printed digit; the projection of one feature is smaller than that.
    assert counted.total / 1e9 == pytest.approx(total, abs=0.006)
    assert (counted.image_encoder + counted.poolers) / 1e9 == pytest.approx(image, abs=0.006)
    assert counted.unimodal / 1e9 == pytest.approx(text, abs=0.006)


def test_a_step_counts_the_global_batch_and_the_trained_parts() -> None:
    c = tiny.CONFIG
    one = flops.forward(c.model, batch_size=c.batch_size)
    assert flops.train_step_flops(c) == 3 * c.batch_size * one.total
    assert flops.train_step_flops(
        tiny.replace(c, microbatches=4, model__image__remat="everything")
    ) == flops.train_step_flops(c)
    captioner = flops.train_step_flops(tiny.replace(c, loss__lambda_con=0.0))
    assert captioner < flops.train_step_flops(c) - 3 * c.batch_size * one.contrastive
    clip = flops.train_step_flops(tiny.replace(c, loss__lambda_cap=0.0))
    assert clip < flops.train_step_flops(c) - 3 * c.batch_size * (one.multimodal + one.softmax)
