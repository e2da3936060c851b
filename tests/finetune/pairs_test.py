"""Fine-tuning on pictures with captions: captioning, retrieval, resolution, a locked tower, low-rank updates."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

import coca_jax
from coca_jax.interop import exported
from coca_jax.stored import read_weights
from tests.finetune import digits
from tests.finetune.conftest import Tuned

Tune = Callable[..., Tuned]
NEW = "handwritten: {}, the number"  # words in an order that pretraining has not seen


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Training and test sets with the captions of pretraining, and with others."""
    folder = tmp_path_factory.mktemp("pairs")

    def both(name: str, text: str) -> tuple[str, str]:
        for part in ("train", "test"):
            (folder / name / part).mkdir(parents=True)
        train = digits.pairs(folder / name / "train" / "train.array_record", 0, 300, text)
        return train, digits.pairs(folder / name / "test" / "test.array_record", 1000, 1300, text)

    return {"same": both("same", "the digit {}"), "new": both("new", NEW)}


@pytest.mark.slow
def test_captioning_is_learned_and_the_contrastive_half_lives(tune: Tune, sources: dict[str, tuple[str, str]]) -> None:
    tuned = tune("captioning", *sources["new"], steps=80, optimizer__peak_lr=3e-3)
    first, last = tuned.first, tuned.last
    assert last["test/caption_loss"] < 0.5 * first["test/caption_loss"]
    assert last["test/image_to_text/r1"] >= first["test/image_to_text/r1"] - 0.02
    assert "before training:" in tuned.said and "after training:" in tuned.said
    assert tuned.said.count("image_to_text model") == 2


@pytest.mark.slow
def test_retrieval_gets_better_and_the_captioning_half_is_not_there(
    tune: Tune, sources: dict[str, tuple[str, str]]
) -> None:
    tuned = tune("retrieval", *sources["new"], steps=60, optimizer__peak_lr=3e-3)
    assert tuned.last["test/image_to_text/r1"] > tuned.first["test/image_to_text/r1"] + 0.1, (tuned.first, tuned.last)
    assert tuned.last["test/image_to_text/r1"] > 3 * tuned.last["test/chance/r1"]
    assert not tuned.of("text_decoder/multimodal/") and not tuned.of("generative_pooler/")


@pytest.mark.slow
def test_a_higher_resolution_goes_on_from_a_lower_one(tune: Tune, sources: dict[str, tuple[str, str]]) -> None:
    tuned = tune(
        *("higher_resolution", *sources["same"]),
        **{"init__image_size": 24, "steps": 40, "optimizer__peak_lr": 1e-3, "optimizer__name": "adamw"},
    )
    assert "resized: image_encoder/position_embedding: from a grid of 4x4 to 6x6" in tuned.said
    assert tuned.after["image_encoder/position_embedding"].shape == (36, 32)
    # Resized, it knows some yet (0.18): three standard errors of 300 guesses among ten captions above chance.
    assert tuned.first["test/image_to_text/r1"] > tuned.first["test/chance/r1"] + 3 * (0.1 * 0.9 / 300) ** 0.5
    assert tuned.last["test/image_to_text/r1"] > tuned.first["test/image_to_text/r1"] + 0.2, (tuned.first, tuned.last)


@pytest.mark.slow
def test_a_text_tower_learns_to_read_a_locked_image_tower(tune: Tune, sources: dict[str, tuple[str, str]]) -> None:
    tuned = tune(
        *("locked_image", *sources["same"]),
        **{"steps": 80, "optimizer__peak_lr": 5e-3, "evaluate__zero_shot": sources["same"][1]},
        **{"evaluate__prompts": ("the digit {}",), "init__skip": ("text_decoder/.*", "text_projection/.*")},
    )
    # The tower is drawn anew: before training it knows nothing.
    assert tuned.first["zero_shot/top1"] < 0.4 and tuned.last["zero_shot/top1"] > tuned.first["zero_shot/top1"] + 0.2
    locked = [path for path in tuned.after if path.startswith(("image_", "contrastive_pooler/"))]
    assert locked and set(locked) <= set(tuned.kept())


@pytest.mark.slow
def test_low_rank_updates_train_load_decode_and_convert(
    tune: Tune, sources: dict[str, tuple[str, str]], tmp_path: pathlib.Path
) -> None:
    tuned = tune("lora", *sources["new"], steps=120, optimizer__peak_lr=2e-2, lora__rank=4)
    assert tuned.last["test/caption_loss"] < 0.8 * tuned.first["test/caption_loss"], (tuned.first, tuned.last)
    changed = sorted(set(tuned.after) - set(tuned.kept()))
    assert changed and all(path.endswith(("query/kernel", "value/kernel")) for path in changed), changed
    assert not tuned.of("lora/")  # added to the kernels when it is loaded

    coca = coca_jax.load(tuned.workdir)
    pictures = [digits.arrays()[0][1000], digits.arrays()[0][1001]]
    texts = coca.caption(pictures)
    exported.write(read_weights(tuned.workdir), tmp_path / "out")
    other = coca_jax.load(tmp_path / "out")
    assert other.caption(pictures) == texts and other.config.lora.rank == 0
    np.testing.assert_array_equal(other.encode_image(pictures), coca.encode_image(pictures))
