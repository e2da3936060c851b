from __future__ import annotations

import itertools

from coca_jax import config
from coca_jax.plan.activations import residual_bytes_per_row
from tests import tiny


def residual_bytes(rows: int = 4096, **changes: object) -> float:
    return residual_bytes_per_row(tiny.replace(tiny.CONFIG, **changes), rows)


def test_a_recomputed_layer_keeps_only_its_input() -> None:
    depths = [residual_bytes(model__image__depth=depth, model__image__remat="everything") for depth in (2, 3, 5)]
    tokens = (tiny.MODEL.image.size // tiny.MODEL.image.patch) ** 2 + tiny.MODEL.image.class_token
    layer = 4 * tokens * tiny.MODEL.image.width
    assert depths[1] - depths[0] == layer and depths[2] - depths[1] == 2 * layer


def test_each_policy_keeps_less_than_the_previous_one() -> None:
    # Needs several layers: what the backward pass of a single layer holds at a time is not counted.
    sizes = [residual_bytes(model__image__depth=4, model__image__remat=remat) for remat in config.REMAT]
    assert all(a > b for a, b in itertools.pairwise(sizes)), sizes


def test_parameters_and_batch_are_not_counted() -> None:
    assert residual_bytes() == residual_bytes(batch_size=2 * tiny.CONFIG.batch_size)
    assert residual_bytes() == residual_bytes(model__text__vocab_size=2 * tiny.TEXT.vocab_size, loss__caption_chunk=1)


def test_logits_count_only_without_chunks() -> None:
    """The rows of a device decide about chunks, whatever row counts are used for counting."""
    length, vocabulary = tiny.TEXT.length, tiny.TEXT.vocab_size
    chunked = residual_bytes(loss__caption_chunk=1)
    for rows in (1, 100):
        assert residual_bytes(rows, loss__caption_chunk=rows * length - 1) == chunked > 0
        unchunked = [residual_bytes(rows, loss__caption_chunk=chunk) for chunk in (0, rows * length, 2 * rows * length)]
        assert len(set(unchunked)) == 1 and unchunked[0] - chunked > length * vocabulary
