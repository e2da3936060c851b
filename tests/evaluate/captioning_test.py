from __future__ import annotations

import numpy as np
import pytest

from coca_jax.evaluate import captioning
from tests.evaluate.shapes import LENGTH


def test_loss_is_the_mean_over_tokens_not_examples():
    found = captioning.summary(np.array([2.0, 12.0]), np.array([1, 3]))
    assert found == {"caption_loss": 3.5, "perplexity": pytest.approx(np.exp(3.5))}


def test_uniform_guessing_has_the_perplexity_of_the_vocabulary():
    tokens = np.array([5, 1, 9])
    assert captioning.summary(tokens * np.log(64), tokens)["perplexity"] == pytest.approx(64)


def test_extreme_losses_stay_numbers():
    assert captioning.summary(np.array([1e6]), np.array([1]))["perplexity"] == np.inf
    assert np.isnan(captioning.summary(np.array([np.nan]), np.array([1]))["perplexity"])
    with pytest.raises(ValueError, match="no target token"):
        captioning.summary(np.zeros(2), np.zeros(2, int))


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (8, [8]), (19, [8, 8, 8]), (0, [])])
def test_captions_come_in_batches_of_one_shape(world, count, sizes):
    texts = [f"{'red' if i % 2 else 'blue'} {'bar' if i % 3 else 'circle'}" for i in range(count)]
    tokens = world.tokenizer.encode_batch(texts, LENGTH)
    seen = []

    def generate(images):
        seen.append(len(images))
        return tokens[images[:, 0, 0, 0]]

    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3))
    assert captioning.captions(generate, images, world.tokenizer, 8) == texts
    assert seen == sizes


def test_exact_allows_what_the_tokenizer_cannot_write(world):
    assert captioning.exact("red bar", ["blue bar", "red  bar"], world.tokenizer, LENGTH)
    assert captioning.exact("red bar", ["\uff52\uff45\uff44 bar"], world.tokenizer, LENGTH)  # full-width letters
    assert not captioning.exact("red bars", ["red bar"], world.tokenizer, LENGTH)
    assert not captioning.exact("", ["red bar"], world.tokenizer, LENGTH)
