"""What `coca_jax.load` and the model that it opens take from a user. What they compute is tested in run_test.py."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import coca_jax
from coca_jax.config import ConfigError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported
from coca_jax.interop.weights import Weights
from coca_jax.pretrained import Pretrained
from coca_jax.train.checkpoint import CheckpointError
from tests import pairs, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    exported.write(Weights(tiny.CONFIG, tiny.parameters(tiny.MODEL), None), folder)
    return folder


def test_pictures_come_in_whatever_holds_them(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    coca = coca_jax.load(model)
    pictures = [pairs.picture(*e) for e in pairs.examples()[:2]]
    paths = [tmp_path / f"{at}.png" for at in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(pairs.png(picture))
    wanted = coca.encode_image([pictures[0], pictures[1]])
    text = np.array([str(path) for path in paths])
    holders = [iter(paths), (path for path in text), text, dict.fromkeys(paths), np.stack(pictures)]
    for several in [*holders, jax.numpy.stack(pictures)]:
        np.testing.assert_allclose(coca.encode_image(several), wanted, atol=1e-5)
    content = paths[0].read_bytes()
    one = [
        paths[0],
        text[0],
        content,
        bytearray(content),
        memoryview(content),
        pictures[0],
        jax.numpy.array(pictures[0]),
    ]
    for single in one:
        np.testing.assert_allclose(coca.encode_image(single), wanted[:1], atol=1e-5)


@pytest.mark.parametrize("image_size", [0, -16, 32.0, "32"])
def test_a_picture_size_that_is_none_is_refused(model: pathlib.Path, image_size: Any) -> None:
    with pytest.raises(ConfigError, match=f"image_size={image_size!r} must be a whole number above 0"):
        coca_jax.load(model, image_size=image_size)


@pytest.mark.parametrize("step", ["12", 12.0])
def test_a_step_that_is_no_number_of_one_is_refused(tmp_path: pathlib.Path, step: Any) -> None:
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"step={step!r} must be a whole number"):
        coca_jax.load(tmp_path, step=step)


@pytest.mark.slow
def test_there_are_as_many_captions_as_the_vocabulary_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)
    drawn = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    coca = Pretrained(Weights(tiny.replace(tiny.CONFIG, model=drawn), tiny.parameters(drawn), tokenizer))
    (found,) = coca.captions(pairs.picture("red", "dot"), method="beam", beams=320, returns=320, length=2)
    assert len(found) == tokenizer.vocab_size - 2  # all but padding and bos, eos alone among them
    assert all(-20 < caption.log_prob < 0 and caption.score == caption.log_prob for caption in found)
    (found,) = coca.captions(
        pairs.picture("red", "dot"), method="beam", beams=320, returns=320, length=2, rerank=True, length_penalty=0.5
    )
    assert len(found) == tokenizer.vocab_size - 2
    real = coca._apply.captions

    def nothing(*arguments: Any) -> Any:
        made, similarity = real(*arguments)
        return dataclasses.replace(made, scores=np.full_like(made.scores, -np.inf)), similarity

    monkeypatch.setattr(coca._apply, "captions", nothing)
    with pytest.raises(ValueError, match=r"Options\(method='beam'.* leave no caption of this vocabulary"):
        coca.captions(pairs.picture("red", "dot"), method="beam")
