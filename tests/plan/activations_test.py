from __future__ import annotations

import itertools

from coca_jax import config
from coca_jax.plan.activations import bytes_of_a_row
from tests import tiny


def kept(**changes: object) -> float:
    return bytes_of_a_row(tiny.replace(tiny.CONFIG, **changes))


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
