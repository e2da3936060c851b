"""The compiled functions agree on texts that contain the padding id, as "!(" does in CLIP's vocabulary."""

from __future__ import annotations

import functools

import jax
import numpy as np

from coca_jax import sharding
from coca_jax.apply import Apply
from tests import tiny

BOS, EOS, PAD = 2, 1, 0
C = tiny.replace(tiny.CONFIG, model__text__n_uni=1, model__text__n_multi=1, model__image__depth=1)
TEXTS = np.array([[BOS, 7, 8, PAD, 9, 10, 11, 12, EOS], [BOS, PAD, 5, EOS, *[PAD] * 5]], np.int32)


@functools.cache
def apply() -> Apply:
    return Apply(C, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), bos_id=BOS, eos_id=EOS)


def test_the_likelihood_of_a_text_includes_its_last_token() -> None:
    params, images = tiny.parameters(C.model), tiny.batch(C.model, [9, 9])["images"]
    found = apply().log_probs(params, images, TEXTS)
    losses, counts = apply().caption_loss(params, images, TEXTS)
    assert counts.tolist() == [7, 2]
    np.testing.assert_allclose(np.diagonal(found), -losses, rtol=1e-5)
    np.testing.assert_allclose(apply().log_probs(params, images, TEXTS[1:])[:, 0], found[:, 1], rtol=1e-5)


def test_a_caption_continues_the_whole_prompt() -> None:
    params, images = tiny.parameters(C.model), tiny.batch(C.model, [9, 9])["images"]
    captions, _ = apply().captions(params, images, prompts=TEXTS[:, :6])
    np.testing.assert_array_equal(captions.tokens[0, 0, :6], TEXTS[0, :6])
    np.testing.assert_array_equal(captions.tokens[1, 0, :4], TEXTS[1, :4])
    assert (captions.log_probs[0, 0, :6] == 0).all() and (captions.log_probs[1, 0, :4] == 0).all()
    assert captions.log_probs[0, 0, 6] < 0 and captions.log_probs[1, 0, 4] < 0
