from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import config, losses
from coca_jax.model.coca import Output
from tests import tiny


def _captioning_inputs(b: int = 3, t: int = 10, d: int = 8, v: int = 13) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((b, t, d), (d, v)))
    tokens = np.where(np.arange(t)[None] < np.array([10, 3, 1])[:, None], rng.integers(1, v, (b, t)), 0)
    return hidden, head, tokens.astype(np.int32)


def test_captioning_is_the_mean_over_the_real_tokens_of_the_whole_batch() -> None:
    hidden, head, tokens = _captioning_inputs()
    logits = (hidden @ head).astype(np.float64)
    expected = []
    for row in range(3):
        for at in range(9):
            label = tokens[row, at + 1]
            if label != 0:
                expected.append(np.log(np.exp(logits[row, at]).sum()) - logits[row, at, label])
    assert len(expected) == 9 + 2 + 0
    value = losses.captioning(hidden, head, tokens, pad_id=0, chunk=0)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 10, 99])
def test_chunked_captioning_equals_full_in_value_and_gradient(chunk: int) -> None:
    hidden, head, tokens = _captioning_inputs()

    def both(chunk: int) -> Any:
        def loss(hidden: Any, head: Any) -> Any:
            return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)

    # float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), both(chunk), both(0))


def test_chunking_keeps_the_logits_out_of_memory() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32, 16), (16, 4000))]
    tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32)

    def temporaries(chunk: int) -> int:
        def loss(hidden: Any, head: Any, tokens: Any) -> Any:
            return losses.captioning(hidden, head, tokens, pad_id=0, chunk=chunk)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2) * 8 < temporaries(0)


def test_a_batch_of_padding_alone_costs_nothing_and_is_finite() -> None:
    hidden, head, tokens = _captioning_inputs()
    value, gradient = jax.value_and_grad(
        lambda h: losses.captioning(h, head, np.zeros_like(tokens), pad_id=0, chunk=0)
    )(hidden)
    assert value == 0 and not np.any(gradient)


def test_contrastive_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(6, 5)) for _ in range(2))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    scores = np.exp(7.0 * image @ text.T)
    own = np.diag(scores)
    expected = -(np.log(own / scores.sum(axis=1)).mean() + np.log(own / scores.sum(axis=0)).mean()) / 2
    value, metrics = losses.contrastive(image.astype(np.float32), text.astype(np.float32), jnp.float32(7))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    hits = (scores.argmax(axis=1) == np.arange(6)).mean(), (scores.argmax(axis=0) == np.arange(6)).mean()
    np.testing.assert_allclose((metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]), hits, rtol=1e-6)


def test_accuracy_counts_both_of_two_equal_rows() -> None:
    same = jnp.ones((2, 4)) / 2
    value, metrics = losses.contrastive(same, same, jnp.float32(10))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert metrics["accuracy/image_to_text"] == 1.0


def test_total_weighs_the_parts_and_leaves_out_what_weighs_nothing() -> None:
    hidden, head, tokens = _captioning_inputs()
    features = jnp.eye(3, 5)
    output = Output(image_features=features, text_features=features, hidden=hidden, logit_scale=jnp.float32(2))

    def total(con: float, cap: float) -> tuple[Any, Any]:
        return losses.total(output, head, tokens, config.Loss(lambda_con=con, lambda_cap=cap), pad_id=0)

    value, parts = total(1.0, 2.0)
    np.testing.assert_allclose(value, parts["loss/contrastive"] + 2 * parts["loss/captioning"], rtol=1e-6)
    assert "loss/captioning" not in total(1.0, 0.0)[1]
    assert "loss/contrastive" not in total(0.0, 1.0)[1]
    np.testing.assert_allclose(total(0.0, 3.0)[0], 3 * parts["loss/captioning"], rtol=1e-6)


def test_losses_are_float32_whatever_the_model_computes_in() -> None:
    hidden, head, tokens = _captioning_inputs()
    value = losses.captioning(jnp.bfloat16(hidden), head, tokens, pad_id=0, chunk=4)
    assert value.dtype == jnp.float32
    full = losses.captioning(hidden, head, tokens, pad_id=0, chunk=0)
    np.testing.assert_allclose(value, full, rtol=2e-2)  # the hidden states' 8 bits, not the sum's


def test_targets_are_the_next_tokens() -> None:
    tokens = tiny.tokens(tiny.MODEL, [9, 4])
    labels, weights = losses.targets(tokens, 0)
    np.testing.assert_array_equal(labels[:, :-1], tokens[:, 1:])
    np.testing.assert_array_equal(weights.sum(axis=1), [8, 3])
