"""Questions and sentences about pictures: a classifier on the multimodal decoder."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable

import pytest

import coca_jax
from coca_jax.data.sources import open_source
from tests.finetune import digits
from tests.finetune.conftest import Tuned

Tune = Callable[..., Tuned]


def blind(train: str, test: str) -> float:
    """What each question's commonest answer gets: the best that not looking at the picture can do."""
    seen: dict[str, Counter[str]] = {}
    for record in (open_source(train)[i] for i in range(len(open_source(train)))):
        seen.setdefault(record.captions[0], Counter())[record.label] += 1
    asked = [open_source(test)[i] for i in range(len(open_source(test)))]
    return sum(seen[r.captions[0]].most_common(1)[0][0] == r.label for r in asked) / len(asked)


@pytest.mark.slow
def test_questions_are_answered_better_than_without_looking(tune: Tune, tmp_path: pathlib.Path) -> None:
    train, test = digits.questions(tmp_path / "train", 0, 600), digits.questions(tmp_path / "test", 1000, 1250)
    assert len(open_source(test)) == 500
    tuned = tune("vqa", train, test, steps=250, optimizer__peak_lr=3e-3)
    top1, baseline = tuned.last["test/classification/top1"], blind(train, test)
    assert top1 > baseline + 0.1 and top1 > tuned.last["test/classification/largest_class"] + 0.1, (top1, baseline)

    coca = coca_jax.load(tuned.workdir)
    assert coca.labels == ("even", "no", "odd", "yes")
    picture = tmp_path / "test" / "1000.png"
    answers = coca.answer([picture, picture], ["odd or even", "the digit one"])
    assert answers[0][0].name in ("odd", "even") and answers[1][0].name in ("yes", "no")
    with pytest.raises(ValueError, match="answers: answer"):
        coca.classify([picture])
    with pytest.raises(ValueError, match="3 questions for 1 pictures"):
        coca.answer(picture, ["a", "b", "c"])


@pytest.mark.slow
def test_entailment_is_told_from_contradiction(tune: Tune, tmp_path: pathlib.Path) -> None:
    train = digits.sentences(tmp_path / "train.array_record", 0, 800)
    test = digits.sentences(tmp_path / "test.array_record", 1000, 1400)
    tuned = tune("entailment", train, test, steps=250, optimizer__peak_lr=3e-3)
    top1 = tuned.last["test/classification/top1"]
    assert top1 > tuned.last["test/classification/largest_class"] + 0.1 and top1 > blind(train, test) + 0.1, top1
