"""Picture and video classification on digits, through the real program: each beats a baseline measured beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest

import coca_jax
from coca_jax import evaluation
from coca_jax.data.classes import Task
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.interop import exported, open_clip
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.pretrained import Pretrained
from coca_jax.stored import read_weights
from coca_jax.train import state as states
from tests import tiny
from tests.finetune import digits
from tests.finetune.conftest import Tuned

Tune = Callable[..., Tuned]
PICTURES = "test/classification/"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Few labelled pictures of pretraining's kind, and others of other writers."""
    folder = tmp_path_factory.mktemp("classes")
    return digits.classes(folder / "train", 0, 200), digits.classes(folder / "test", 1000, 1500)


@pytest.mark.slow
def test_a_linear_probe_beats_one_of_a_random_encoder_and_moves_nothing_else(
    tune: Tune, folders: tuple[str, str]
) -> None:
    options = {"steps": 60, "optimizer__peak_lr": 0.05}
    probe = tune("linear_probe", *folders, **options)
    random = tune("linear_probe", *folders, scratch=True, name="scratch", **options)
    top1, baseline = probe.last[PICTURES + "top1"], random.last[PICTURES + "top1"]
    assert top1 > baseline + 0.1 and top1 > 2 * probe.last[PICTURES + "largest_class"], (top1, baseline)
    assert probe.last[PICTURES + "top5"] >= top1 and probe.last[PICTURES + "records"] == 500
    assert probe.kept() == [path for path in probe.after if not path.startswith("classifier/")]
    assert set(probe.of("classifier/")) == {"classifier/linear/kernel", "classifier/linear/bias"}
    assert "test           classes       top-1" in probe.said and "classifier/linear/kernel" in probe.said
    assert not probe.of("text_decoder/")

    # What was trained answers from a few lines, and by itself on other pictures.
    coca = coca_jax.load(probe.workdir)
    pictures, labels = digits.arrays()
    found = coca.classify([digits.png(p) for p in pictures[1000:1500]])
    assert np.mean([row[0].name == digits.NAMES[n] for row, n in zip(found, labels[1000:], strict=False)]) == top1
    assert len(found[0]) == 5 and 0 < found[0][4].probability <= found[0][0].probability <= 1
    with pytest.raises(ValueError, match="looks at pictures alone"):
        coca.answer([pictures[0]], "what is it?")
    with pytest.raises(ValueError, match="lambda_con=0"):
        coca.encode_text("a digit")


@pytest.mark.slow
def test_a_pooler_of_its_own_on_the_frozen_encoder(
    tune: Tune, folders: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    tuned = tune("frozen_pooler", *folders, steps=100, optimizer__peak_lr=1e-2)
    top1 = tuned.last[PICTURES + "top1"]
    assert top1 > 4 * tuned.last[PICTURES + "largest_class"] and top1 > 4 * tuned.last[PICTURES + "chance/top1"], top1
    assert (
        tuned.kept("image_encoder/") == tuned.of("image_encoder/") and "classifier/pooler/query_tokens" in tuned.after
    )

    # Nothing exported has a place for the classifier: it is refused, and where it lives is said.
    weights = read_weights(tuned.workdir)
    for write in (exported.write, open_clip.write):
        with pytest.raises(ConversionError, match="a classifier of 10 classes"):
            write(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    # A checkpoint with a classifier is evaluated by itself too.
    assert evaluation.run(None, str(tuned.workdir), str(tmp_path / "results")) == 0
    assert f'"test/classification/top1": {top1}' in (tmp_path / "results" / "results.json").read_text()


@pytest.mark.slow
def test_all_weights_trained_beat_the_same_from_the_seed(tune: Tune, folders: tuple[str, str]) -> None:
    options = {"steps": 60, "optimizer__peak_lr": 3e-3, "optimizer__ema_decay": 0.0}
    tuned = tune("classification", *folders, **options)
    scratch = tune("classification", *folders, scratch=True, name="scratch", **options)
    assert tuned.last[PICTURES + "top1"] > scratch.last[PICTURES + "top1"] + 0.05, (tuned.last, scratch.last)
    assert not [path for path in tuned.kept("image_encoder/") if path.endswith("kernel")]


@pytest.mark.slow
def test_clips_are_told_apart_by_the_order_of_their_frames(tune: Tune, tmp_path: pathlib.Path) -> None:
    train, test = digits.clips(tmp_path / "train", 0, 120), digits.clips(tmp_path / "test", 1000, 1100)
    tuned = tune("video", train, test, steps=100, model__head__frames=3, optimizer__peak_lr=2e-2, batch_size=32)
    top1 = tuned.last[PICTURES + "top1"]
    assert top1 > tuned.last[PICTURES + "largest_class"] + 0.3, top1  # half of them go either way
    assert tuned.kept("image_encoder/") == tuned.of("image_encoder/")

    coca = coca_jax.load(tuned.workdir)
    clips = [[tmp_path / "test" / f"{i}-{step}.png" for step in range(6)] for i in range(1000, 1100)]
    found = coca.classify([clip if i % 2 else clip[::-1] for i, clip in enumerate(clips)])
    assert np.mean([row[0].name == ("right" if i % 2 else "left") for i, row in enumerate(found)]) == top1


@pytest.mark.slow
def test_what_cannot_be_classified_is_said(
    tune: Tune, pretrained: pathlib.Path, folders: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    def said(**changes: object) -> str:
        with pytest.raises(AssertionError) as error:
            tune("linear_probe", *folders, steps=1, **changes)
        return str(error.value)

    (tmp_path / "labels.txt").write_text("zero\none\nzero\n")
    assert "has 'zero' twice" in said(data__classes=str(tmp_path / "labels.txt"))
    assert "config.model.head.classes=7, and the labels are 10" in said(model__head__classes=7)


def test_a_record_of_another_class_is_a_bad_example() -> None:
    task = Task(("one", "two"))
    assert task.number(Record("a", b"", (), "two")) == 1
    for label, reason in (("three", "the label 'three': none of the 2 classes"), ("", "no label")):
        with pytest.raises(BadExample, match=reason) as error:
            task.number(Record("a", b"", (), label))
        assert error.value.reason == "no_class"


def test_one_clip_is_not_taken_for_many() -> None:
    c = tiny.replace(tiny.CONFIG, model__head__frames=3, model__head__classes=2, loss__lambda_cls=1.0)
    c = tiny.replace(c, loss__lambda_con=0.0, loss__lambda_cap=0.0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), states.abstract_parameters(c))
    coca = Pretrained(Weights(c, params, None, labels=("left", "right")))
    clip = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    found = coca.classify([clip, clip[::-1]])
    assert [len(row) for row in found] == [2, 2]
    (alone,) = coca.classify(clip[None])
    assert alone[0].name == found[0][0].name and alone[0].probability == pytest.approx(found[0][0].probability)
    for images in (clip, ["1.png", "2.png", "3.png"], []):
        with pytest.raises(DataError, match="this model looks at 3 frames of a clip: give a list of clips"):
            coca.classify(images)
