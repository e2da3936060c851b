from __future__ import annotations

import itertools

from coca_jax import config
from coca_jax.plan.activations import bytes_of_a_row
from tests import tiny


def kept(rows: int = 4096, **changes: object) -> float:
    return bytes_of_a_row(tiny.replace(tiny.CONFIG, **changes), rows)


def test_a_layer_that_is_computed_again_keeps_its_input_alone() -> None:
    depths = [kept(model__image__depth=depth, model__image__remat="everything") for depth in (2, 3, 5)]
    tokens = (tiny.MODEL.image.size // tiny.MODEL.image.patch) ** 2 + tiny.MODEL.image.class_token
    layer = 4 * tokens * tiny.MODEL.image.width
    assert depths[1] - depths[0] == layer and depths[2] - depths[1] == 2 * layer


def test_the_policies_keep_less_and_less() -> None:
    # From a depth of some layers on: of a single one, what its backward pass holds at a time is not counted here.
    sizes = [kept(model__image__depth=4, model__image__remat=remat) for remat in config.REMAT]
    assert all(a > b for a, b in itertools.pairwise(sizes)), sizes


def test_parameters_and_batch_do_not_count() -> None:
    assert kept() == kept(batch_size=2 * tiny.CONFIG.batch_size)
    assert kept() == kept(model__text__vocab_size=2 * tiny.TEXT.vocab_size, loss__caption_chunk=1)


def test_logits_count_where_a_device_holds_them_at_once() -> None:
    """By its own rows, whatever the numbers of rows that are counted make of the chunk: one of them was negative."""
    length, vocabulary = tiny.TEXT.length, tiny.TEXT.vocab_size
    in_chunks = kept(loss__caption_chunk=1)
    for rows in (1, 100):
        assert kept(rows, loss__caption_chunk=rows * length - 1) == in_chunks > 0
        at_once = [kept(rows, loss__caption_chunk=chunk) for chunk in (0, rows * length, 2 * rows * length)]
        assert len(set(at_once)) == 1 and at_once[0] - in_chunks > length * vocabulary
