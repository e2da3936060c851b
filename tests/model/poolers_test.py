"""The poolers' attention weights are the softmax that pools, and map to the image's patches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from coca_jax import config
from coca_jax.interop.weights import Weights
from coca_jax.model.coca import CoCa
from coca_jax.pretrained import Pretrained
from tests import tiny


def norm(x: np.ndarray, p: dict[str, np.ndarray], eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def pooled(p: Any, tokens: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """A pooler in float64, written as loops: outputs `[b, q, d]`, and softmax averaged over heads `[b, q, n]`."""
    query, tokens = norm(p["query_tokens"], p["query_norm"], eps), norm(tokens, p["token_norm"], eps)
    a, outputs, weights = p["attention"], [], []
    for row in tokens:
        out, mean = a["out"]["bias"], 0.0
        for h in range(a["query"]["kernel"].shape[1]):
            q, k, v = (
                x @ a[name]["kernel"][:, h] + a[name]["bias"][h]
                for name, x in (("query", query), ("key", row), ("value", row))
            )
            e = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            softmax = e / e.sum(axis=1, keepdims=True)
            out = out + softmax @ v @ a["out"]["kernel"][h]
            mean = mean + softmax / a["query"]["kernel"].shape[1]
        outputs.append(norm(out, p["out_norm"], eps))
        weights.append(mean)
    return np.stack(outputs), np.stack(weights)


@pytest.mark.parametrize("kind", ["parallel", "cascade", "single"])
def test_attention_weights_are_the_softmax_that_pools(kind: str) -> None:
    model = tiny.replace(tiny.MODEL, pooler__kind=kind, image__class_token=True)
    params, images = tiny.parameters(model, seed=2), tiny.images(model, 2)

    def apply(method: Any, **options: bool) -> Any:
        function = functools.partial(CoCa(model).apply, method=method, **options)
        return jax.jit(function)({"params": params}, images)

    patches = np.asarray(apply(lambda m, x: m.image_encoder(x)), np.float64)
    tokens, generative = pooled(params["generative_pooler"], patches, model.norm_eps)
    if kind == "single":
        tokens, generative, contrastive = tokens[:, 1:], generative[:, 1:], generative[:, :1]
    else:
        read = patches if kind == "parallel" else tokens
        contrastive = pooled(params["contrastive_pooler"], read, model.norm_eps)[1]
        if kind == "cascade":
            contrastive = contrastive @ generative
    np.testing.assert_allclose(apply("encode_image").image_tokens, tokens, atol=1e-4)  # the reference is this pooler
    for is_contrastive, wanted in ((True, contrastive), (False, generative)):
        found = apply("attention", contrastive=is_contrastive)
        assert wanted.std() > 1e-3  # the weights are not uniform
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-5)


def test_attention_of_a_loaded_model_maps_to_the_patches() -> None:
    # Without position embeddings a patch is known by its content alone: moving it moves its weight to the new row and
    # column.
    params = tiny.parameters(tiny.MODEL)
    params["image_encoder"]["position_embedding"] *= 0
    coca = Pretrained(Weights(config.Config(model=tiny.MODEL), params, None, 1))
    positions, images = ((0, 1), (2, 3)), np.full((2, 16, 16, 3), 255, np.uint8)
    for image, (row, column) in zip(images, positions, strict=True):
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
    found = coca.attention(list(images))
    assert found.shape == (2, 4, 4, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=(2, 3)), 1.0, rtol=1e-5)
    dark = [at[0][position] for at, position in zip(found, positions, strict=True)]
    assert dark[0] == pytest.approx(dark[1], rel=1e-4)
    for at, (row, column) in zip(found, positions, strict=True):
        rest = np.delete(at[0].ravel(), 4 * row + column)
        assert abs(at[0, row, column] - rest.mean()) > 100 * rest.std()
    assert coca.attention(images[0], pooler="contrastive").shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="pooler='text' must be one of contrastive, generative"):
        coca.attention(images, pooler="text")


@pytest.mark.parametrize(("weight", "pooler"), [("lambda_con", "contrastive"), ("lambda_cap", "generative")])
def test_attention_of_a_missing_pooler_names_the_loss_weight(weight: str, pooler: str) -> None:
    c = config.Config(model=tiny.MODEL, loss=config.Loss(**{weight: 0.0}))
    with pytest.raises(ValueError, match=f"{weight}=0 and has no such half"):
        Pretrained(Weights(c, {}, None, 1)).attention(np.zeros((16, 16, 3), np.uint8), pooler=pooler)
