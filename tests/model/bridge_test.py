"""The query transformer: attention masks, outputs, cost, and negatives of the matching objective."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config
from coca_jax.losses import total
from coca_jax.model import bridge, flops
from coca_jax.model.coca import CoCa
from coca_jax.train import state
from coca_jax.train.frozen import patterns
from tests import tiny
from tests.model.flops_test import products

SIZES = config.Bridge(stage=1, queries=3, width=12, depth=4, heads=2, mlp_dim=20)
ONE = tiny.replace(
    tiny.CONFIG,
    model__bridge=SIZES,
    loss=config.Loss(lambda_con=1.0, lambda_cap=1.0, lambda_match=1.0, caption_chunk=4),
    optimizer__freeze=("image_encoder/.*",),
)
LENGTHS = [9, 5, 2, 7]
PAD = ONE.model.text.pad_id


def parameters(c: config.Config) -> Any:
    """Random parameters, including biases and norms, so that a missing one is detected."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: np.asarray(rng.normal(size=leaf.shape) * 0.3, np.float32)  # noqa: E731
    return jax.tree.map(draw, state.abstract_parameters(c)) | {"logit_scale": np.float32(1.5)}


PARAMS = parameters(ONE)
IMAGE = np.random.default_rng(1).normal(size=(4, 16, 16)).astype(np.float32)  # 4 images, 16 tokens of width 16
TOKENS = tiny.tokens(ONE.model, LENGTHS)


@jax.jit
def read(image: Any, tokens: Any) -> Any:
    """Queries, [CLS] and hidden states of one pass over both texts."""
    both = {"contrastive": True, "captioning": True}
    output: Any = bridge.Bridge(ONE.model).apply({"params": PARAMS["bridge"]}, image, tokens, method="read", **both)
    return output


@jax.jit
def alone(image: Any, tokens: Any) -> Any:
    """Queries without text, text without queries, and matching logits."""
    apply: Any = bridge.Bridge(ONE.model).apply
    output = {"params": PARAMS["bridge"]}
    queries, text = apply(output, image, method="queries"), apply(output, tokens, method="text")
    return queries, text, apply(output, image, tokens, method="match")


def naive(x: np.ndarray, weights: Any, queries: int, image: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The stack for one example in NumPy float64, independent of the model's code."""

    def norm(x: np.ndarray, p: Any) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + ONE.model.norm_eps) * p["scale"] + p["bias"]

    def attention(x: np.ndarray, kv: np.ndarray, p: Any, allowed: np.ndarray) -> np.ndarray:
        total = np.zeros_like(x)
        for head in range(2):
            q, k, v = (
                y @ p[name]["kernel"][:, head] + p[name]["bias"][head]
                for y, name in ((x, "query"), (kv, "key"), (kv, "value"))
            )
            scores = np.where(allowed, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
            probs = np.exp(scores - scores.max(1, keepdims=True))
            total += probs / probs.sum(1, keepdims=True) @ v @ p["out"]["kernel"][head]
        return total + p["out"]["bias"]

    def mlp(x: np.ndarray, p: Any) -> np.ndarray:
        x = x @ p["up"]["kernel"] + p["up"]["bias"]
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x @ p["down"]["kernel"] + p["down"]["bias"]

    x = x.astype(np.float64)
    everything = np.ones((queries, len(image)), bool)
    for pair in range(SIZES.depth // 2):
        for name in ("reading", "thinking"):
            p = jax.tree.map(lambda leaf, at=pair: np.asarray(leaf[at], np.float64), weights["blocks"][name])
            own = norm(x, p["attention_norm"])
            x = x + attention(own, own, p["attention"], allowed)
            q, t = x[:queries], x[queries:]
            if name == "reading":
                q = q + attention(norm(q, p["cross_norm"]), image, p["cross_attention"], everything)
            q = q + mlp(norm(q, p["query_mlp_norm"]), p["query_mlp"])
            x = np.concatenate([q, t + mlp(norm(t, p["text_mlp_norm"]), p["text_mlp"])])
    q, t = norm(x[:queries], weights["out_norm"]), norm(x[queries:], weights["text_norm"])
    return np.concatenate([q, t])


def test_all_three_masks_match_a_naive_reference() -> None:
    """Figure 2 written out, one objective at a time; the model computes two of them in one pass."""
    p = PARAMS["bridge"]
    queries, cls, hidden = read(IMAGE, TOKENS)
    match = alone(IMAGE, TOKENS)[2]
    q, t = SIZES.queries, TOKENS.shape[1]
    for row, length in enumerate(LENGTHS):
        image = IMAGE[row].astype(np.float64)
        image = image - image.mean(-1, keepdims=True)
        image /= np.sqrt((image**2).mean(-1, keepdims=True) + ONE.model.norm_eps)
        image = image * p["token_norm"]["scale"] + p["token_norm"]["bias"]
        text = p["token_embedding"]["embedding"][TOKENS[row]] + p["position_embedding"]
        with_cls = np.concatenate([(p["cls_embedding"] + p["position_embedding"][0])[None], text[1:]])
        is_query, real = np.arange(q + t) < q, np.arange(q + t) < q + length
        for name, inputs in (("contrastive", with_cls), ("generation", text), ("matching", with_cls)):
            allowed = np.empty((q + t, q + t), bool)
            for s, m in np.ndindex(allowed.shape):
                same = is_query[s] == is_query[m]
                seen = {"contrastive": same, "generation": m <= s if not is_query[s] else same, "matching": True}
                allowed[s, m] = seen[name] and real[m]
            wanted = naive(np.concatenate([p["query_tokens"], inputs]), p, q, image, allowed)
            if name == "contrastive":
                np.testing.assert_allclose(queries[row], wanted[:q], atol=2e-5)
                np.testing.assert_allclose(cls[row], wanted[q], atol=2e-5)
            elif name == "generation":
                np.testing.assert_allclose(hidden[row, :length], wanted[q : q + length], atol=2e-5)
            else:
                logits = wanted[:q] @ p["matching"]["kernel"] + p["matching"]["bias"]
                np.testing.assert_allclose(match[row], logits.mean(axis=0), atol=2e-5)


def test_masks_block_exactly_the_forbidden_influences() -> None:
    queries, cls, hidden = read(IMAGE, TOKENS)
    # One combined pass equals separate passes of queries and text.
    for found, wanted in zip((queries, cls), alone(IMAGE, TOKENS)[:2], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    # No future token changes an earlier output; the queries ignore text; [CLS] attends to all of it.
    other = TOKENS.copy()
    other[0, 5] = other[0, 5] % 30 + 4
    changed = read(IMAGE, other)
    np.testing.assert_array_equal(changed[0], queries)
    np.testing.assert_array_equal(changed[2][0, :5], hidden[0, :5])
    assert not np.allclose(changed[2][0, 5], hidden[0, 5]) and not np.allclose(changed[1][0], cls[0])
    # The contrastive text ignores the image; the caption does not.
    changed = read(IMAGE + 1.0 * (np.arange(16) % 3), TOKENS)
    np.testing.assert_array_equal(changed[1], cls)
    assert not np.allclose(changed[2], hidden) and not np.allclose(changed[0], queries)
    # More padding does not change the result.
    shorter = read(IMAGE[1:2], TOKENS[1:2, :7])
    np.testing.assert_allclose(shorter[1], cls[1:2], atol=1e-5)
    np.testing.assert_allclose(shorter[2][:, :5], hidden[1:2, :5], atol=1e-5)


def test_hard_pairs_are_wrong_and_more_likely_when_similar() -> None:
    tokens = np.stack([TOKENS[0], TOKENS[0], TOKENS[1], TOKENS[2]])  # the first two texts are equal
    logits = np.log(np.array([[9, 9, 3, 1], [9, 9, 1, 3], [1, 1, 9, 2], [2, 2, 2, 9]], np.float32))
    draw = jax.jit(jax.vmap(lambda key: bridge.hard_pairs(logits, tokens, key)))
    images, texts, matches = (np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), 2000)))
    assert (images[:, :8] == [*range(4)] * 2).all() and (texts[:, :4] == range(4)).all()
    assert (texts[:, 8:] == range(4)).all() and (matches == ([1] * 4 + [0] * 8)).all()
    # Softmax over the wrong texts: 3 to 1; over the images of a column: 3 to 1 to 2. Six standard deviations.
    assert abs(np.mean(texts[:, 4] == 2) - 0.75) < 6 * np.sqrt(0.75 * 0.25 / 2000)
    assert abs(np.mean(images[:, 10] == 0) - 0.5) < 6 * np.sqrt(0.25 / 2000)
    # If all texts are equal, drawn pairs are labeled as matching.
    assert bridge.hard_pairs(logits, tokens[:1].repeat(4, axis=0), jax.random.key(0))[2].all()


def test_losses_use_the_nearest_query_and_the_drawn_pairs() -> None:
    model: Any = CoCa(ONE.model)
    images, key = tiny.images(ONE.model, 4), jax.random.key(3)
    parts = {"contrastive": True, "captioning": True, "matching": True, "key": key}
    forward = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method="forward", **parts))
    output = forward(PARAMS, images, TOKENS)
    image, text = np.asarray(output.image_features, np.float64), np.asarray(output.text_features, np.float64)
    similarities = np.array([[max(query @ row for query in queries) for row in text] for queries in image])
    logits = similarities * float(output.logit_scale)

    def cross_entropy(scores: np.ndarray, right: np.ndarray) -> float:
        return float(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(scores)), right]))

    own = np.arange(4)
    contrastive = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    head = np.asarray(PARAMS["bridge"]["token_embedding"]["embedding"].T, np.float64)
    caption_logits = np.concatenate(
        [(np.asarray(output.hidden[row], np.float64) @ head)[: length - 1] for row, length in enumerate(LENGTHS)]
    )
    next_tokens = np.concatenate([TOKENS[row, 1:length] for row, length in enumerate(LENGTHS)])
    captioning = cross_entropy(caption_logits, next_tokens)
    rows, texts, matches = (np.asarray(x) for x in bridge.hard_pairs(np.float32(logits), TOKENS, key))
    encode = jax.jit(lambda params: model.apply({"params": params}, images, method=lambda m, x: m.image_encoder(x)))
    patch_tokens = np.asarray(encode(PARAMS))
    matching = cross_entropy(np.asarray(alone(patch_tokens[rows], TOKENS[texts])[2], np.float64), matches)
    losses = jax.jit(lambda output, head, tokens: total(output, head, tokens, ONE.loss, pad_id=PAD))
    value, metrics = losses(output, head.astype(np.float32), TOKENS)
    found = [metrics[f"loss/{name}"] for name in ("contrastive", "captioning", "matching")]
    np.testing.assert_allclose(found, [contrastive, captioning, matching], rtol=1e-5)
    np.testing.assert_allclose(value, contrastive + captioning + matching, rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_equal_the_products_of_the_traced_model(stage: int) -> None:
    weights: dict[str, Any] = {"loss__lambda_con": 0.0, "loss__lambda_match": 0.0} if stage == 2 else {}
    c = tiny.replace(ONE, model__bridge__stage=stage, **weights)
    wanted: Any = {"contrastive": stage == 1, "captioning": True}
    more: Any = {"matching": True, "key": jax.random.key(0)} if stage == 1 else {}

    def forward(params: Any, images: Any, tokens: Any) -> Any:
        model: Any = CoCa(c.model)
        output = model.apply({"params": params}, images, tokens, method="forward", **wanted, **more)
        return output, output.hidden @ model.apply({"params": params}, method="head")

    jaxpr = jax.make_jaxpr(forward)(state.abstract_parameters(c), tiny.images(c.model, 4), TOKENS)
    counted = flops.forward(c.model, batch_size=4, matching=stage == 1, **wanted)
    assert 4 * counted.total == products(jaxpr.jaxpr)


def on_meshes() -> None:
    """Runs with 8 devices: losses and negatives equal those of one device, and only the bridge's parts are trained."""
    from tests.train.step_test import run_step

    # Captions do not depend on other examples and are tested separately; leaving them out compiles less.
    c = tiny.replace(ONE, optimizer__clip_norm=0.0, optimizer__freeze=patterns(ONE), loss__lambda_cap=0.0)
    gradients, _, one = run_step(c, (1, 1, 1))
    flat = traverse_util.flatten_dict(gradients, sep="/")
    assert {path.split("/")[0] for path in flat} == {"bridge", "image_projection", "text_projection", "logit_scale"}
    # A key's bias shifts all scores of a query equally, so its gradient is zero.
    assert not [path for path, leaf in flat.items() if not np.any(leaf) and not path.endswith("key/bias")]
    # The zero-initialized matching head predicts 50%.
    assert abs(one[0]["loss/matching"] - np.log(2)) < 1e-5 and abs(one[0]["accuracy/matching"] - 2 / 3) < 1e-6
    _, _, other = run_step(c, (2, 2, 2))
    for a, b in zip(one, other, strict=True):
        for name in a.keys() - {"update_norm"}:
            np.testing.assert_allclose(b[name], a[name], rtol=5e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_eight_devices_equal_one(run_python) -> None:
    run_python(on_meshes, timeout=290)


def test_a_text_longer_than_the_positions_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 10\) are longer than the 9 positions"):
        CoCa(ONE.model).apply({"params": PARAMS}, np.ones((1, 10), np.int32), method="encode_text")


@pytest.mark.parametrize("width", [12, 16])
def test_stage_one_logits_use_the_bridges_own_head(width: int) -> None:
    """Not the text decoder's head, which is for stage two and 16 wide."""
    model = tiny.replace(ONE.model, bridge__width=width, text__tie_embeddings=False)
    params = parameters(tiny.replace(ONE, model=model))
    output = CoCa(model).apply({"params": params}, tiny.images(model, 4), TOKENS)
    head = params["bridge"]["token_embedding"]["embedding"].T
    np.testing.assert_allclose(output.logits, output.hidden @ head, rtol=1e-5, atol=1e-5)
