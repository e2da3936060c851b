from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import config
from coca_jax.model.coca import CoCa, Output
from coca_jax.model.image_encoder import ImageEncoder
from tests import tiny

KINDS = ("parallel", "cascade", "single")
# open_clip's architecture.
OPEN_CLIP = tiny.replace(
    tiny.MODEL,
    image__class_token=True,
    image__pre_norm=True,
    image__patch_bias=False,
    pooler__kind="single",
    text__cross_mlp=True,
    text__cross_kv_norm=True,
    text__cls_mask="legacy",
    norm_eps=1e-5,
    gelu="exact",
)
MODELS = {kind: tiny.replace(tiny.MODEL, pooler__kind=kind) for kind in KINDS} | {
    "open_clip": OPEN_CLIP,
    "sincos": tiny.replace(tiny.MODEL, image__position="sincos", text__position="sincos", image__class_token=True),
    "tied": tiny.replace(tiny.MODEL, text__tie_embeddings=True),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)

# float32 sums in another order differ by a few units in the last place for values near 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def apply(model: config.Model, params: Any, *args: Any, **kwargs: Any) -> Any:
    return CoCa(model).apply({"params": params}, *args, **kwargs)


@each_model
def test_outputs_have_the_documented_shapes_and_dtypes(model: config.Model) -> None:
    model = tiny.replace(model, dtype="bfloat16")
    output = apply(model, tiny.parameters(model), tiny.images(model, 3), tiny.tokens(model, [9, 4, 2]))
    queries = model.pooler.queries - (model.pooler.kind == "single")
    assert output.image_features.shape == output.text_features.shape == (3, 8)
    assert output.image_tokens.shape == (3, queries, 16)
    assert output.logits.shape == (3, 9, 40)
    assert output.logit_scale.shape == ()
    # The inputs of the losses are float32 whatever the compute dtype.
    assert {output.image_features.dtype, output.text_features.dtype, output.logits.dtype} == {jnp.dtype("float32")}
    assert output.image_tokens.dtype == jnp.bfloat16
    for features in (output.image_features, output.text_features):
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)


@each_model
def test_no_future_token_changes_an_earlier_logit(model: config.Model) -> None:
    params, images = tiny.parameters(model), tiny.images(model, 1)
    tokens = tiny.tokens(model, [9])

    def logits(tokens: Any) -> np.ndarray:
        return np.asarray(apply(model, params, images, tokens).logits)

    before = logits(tokens)
    for at in range(1, 9):
        changed = tokens.copy()
        changed[0, at:] = 3 + (changed[0, at:] - 3 + 7) % 37
        after = logits(changed)
        np.testing.assert_array_equal(after[0, :at], before[0, :at])
        assert np.abs(after[0, at] - before[0, at]).max() > 1e-4, "the token itself must matter"


@each_model
def test_more_padding_does_not_change_the_outputs(model: config.Model) -> None:
    # open_clip's legacy mask lets [CLS] attend to one padding position, so the text features of that mask are not
    # compared.
    params, images = tiny.parameters(model), tiny.images(model, 2)
    tokens = tiny.tokens(model, [4, 5])
    short, full = (apply(model, params, images, t) for t in (tokens[:, :5], tokens))
    np.testing.assert_allclose(short.logits[0, :4], full.logits[0, :4], **CLOSE)
    np.testing.assert_allclose(short.logits[1, :5], full.logits[1, :5], **CLOSE)
    if model.text.cls_mask == "full":
        np.testing.assert_allclose(short.text_features, full.text_features, **CLOSE)


def test_text_features_depend_on_every_real_token_and_no_other() -> None:
    # A prefix as its own text equals the prefix in a longer row, and [CLS] attends to every real token.
    model, params = tiny.MODEL, tiny.parameters(tiny.MODEL)
    tokens = tiny.tokens(model, [9, 6])
    prefix = np.where(np.arange(9) < 4, tokens, 0).astype(np.int32)
    embed = jax.jit(lambda t: apply(model, params, t, method="encode_text").text_features)
    np.testing.assert_allclose(embed(prefix), embed(np.pad(tokens[:, :4], ((0, 0), (0, 5)))), **CLOSE)
    for at in range(4):
        changed = prefix.copy()
        changed[:, at] = 3 + (changed[:, at] - 3 + 5) % 37
        assert np.abs(embed(changed) - embed(prefix)).max() > 1e-4


def test_legacy_cls_mask_is_shifted_by_one() -> None:
    from coca_jax.model.text_decoder import cls_mask

    tokens = jnp.array([[5, 6, 0, 0], [5, 6, 7, 8]])
    full, legacy = (np.asarray(cls_mask(tokens, 0, kind))[:, 0] for kind in ("full", "legacy"))
    assert full[:, -1].tolist() == [[True, True, False, False, True], [True] * 5]
    assert legacy[:, -1].tolist() == [[True, True, True, False, False], [True] * 5]
    for mask in (full, legacy):
        np.testing.assert_array_equal(mask[:, :-1], np.tril(np.ones((5, 5), bool))[None, :-1].repeat(2, 0))


@each_model
def test_cached_decoding_equals_teacher_forcing(model: config.Model) -> None:
    params, images = tiny.parameters(model), tiny.images(model, 2)
    tokens = tiny.tokens(model, [9, 9])
    full = apply(model, params, images, tokens)
    prompt = 3  # several tokens in one pass, then one per step
    step = jax.jit(lambda t, cache: apply(model, params, t, cache, method="decode_step"))
    logits, cache = apply(model, params, tokens[:, :prompt], full.image_tokens, 9, method="prefill")
    np.testing.assert_allclose(logits, full.logits[:, :prompt], **CLOSE)
    for at in range(prompt, 9):
        logits, cache = step(tokens[:, at : at + 1], cache)
        np.testing.assert_allclose(logits[:, 0], full.logits[:, at], **CLOSE)


@pytest.mark.slow
def test_scan_unrolling_and_rematerialization_do_not_change_results() -> None:
    params, images = tiny.parameters(tiny.MODEL), tiny.images(tiny.MODEL, 2)
    tokens = tiny.tokens(tiny.MODEL, [9, 5])

    def loss_and_gradient(model: config.Model) -> Any:
        def loss(params: Any) -> Any:
            output = apply(model, params, images, tokens)
            return jnp.sum(output.logits**2) * 1e-3 + jnp.sum(output.image_features @ output.text_features.T)

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradient = loss_and_gradient(tiny.MODEL)
    for remat, unroll in (("dots", 1), ("everything", 0), ("none", 0)):
        model = tiny.replace(tiny.MODEL, image__remat=remat, text__remat=remat)
        model = tiny.replace(model, image__scan_unroll=unroll, text__scan_unroll=unroll)
        other_value, other = loss_and_gradient(model)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other, gradient)


@each_model
def test_the_image_is_encoded_once(model: config.Model) -> None:
    calls = []

    def count(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, ImageEncoder) and context.method_name == "__call__":
            calls.append(context.module.path)
        return run(*args, **kwargs)

    params = tiny.parameters(model)  # initializes the model, outside the count
    with nn.intercept_methods(count):
        apply(model, params, tiny.images(model, 1), tiny.tokens(model, [5]))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_unrequested_half_has_no_parameters_and_no_outputs(kind: str) -> None:
    model = tiny.replace(tiny.MODEL, pooler__kind=kind)
    images, tokens = tiny.images(model, 1), tiny.tokens(model, [5])

    def init(**parts: bool) -> tuple[Output, Any]:
        return CoCa(model).init_with_output(jax.random.key(0), images, tokens, method="forward", **parts)

    output, variables = init(captioning=False)
    assert output.hidden is None
    assert "multimodal" not in variables["params"]["text_decoder"]
    assert ("generative_pooler" in variables["params"]) == (kind != "parallel")
    output, variables = init(contrastive=False)
    assert output.image_features is None and output.text_features is None
    assert not {"contrastive_pooler", "image_projection", "text_projection"} & set(variables["params"])


def test_a_model_without_multimodal_layers_is_contrastive() -> None:
    model = tiny.replace(tiny.MODEL, text__n_multi=0)
    output = CoCa(model).init_with_output(jax.random.key(0), tiny.images(model, 2), tiny.tokens(model, [5, 9]))[0]
    assert output.logits is None and output.text_features.shape == (2, 8)


def test_wrong_shapes_are_rejected_with_both_shapes() -> None:
    model, params = tiny.MODEL, tiny.parameters(tiny.MODEL)
    with pytest.raises(ValueError, match=r"\(1, 20, 20, 3\).*\[b, 16, 16, 3\]"):
        apply(model, params, jnp.zeros((1, 20, 20, 3)), tiny.tokens(model, [5]))
    with pytest.raises(ValueError, match="longer than the 9 positions"):
        apply(model, params, tiny.images(model, 1), jnp.ones((1, 10), jnp.int32))
    pooled = jnp.zeros((1, 4, 16))
    for prompt, length in ((3, 10), (3, 2), (10, 10)):
        with pytest.raises(ValueError, match=rf"length={length} .*\(1, {prompt}\).*text\.length=9"):
            apply(model, params, jnp.ones((1, prompt), jnp.int32), pooled, length, method="prefill")
