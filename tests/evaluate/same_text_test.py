"""Texts and classes that the model reads as the same, classes without images, and what is said of such figures."""

from __future__ import annotations

import copy
import itertools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from coca_jax.data.sources import Source
from coca_jax.evaluate import caption_scores, classification, notes, splits, suite, tables
from tests.evaluate.shapes import LENGTH, World
from tests.evaluate.suite_test import scored, whole


class Rewritten:
    """A source twice over: as it is, then with its captions changed."""

    name, tokenizer_path, attribution = "rewritten", None, ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, source: Source, change: Callable[[str], str]) -> None:
        self._source, self._change = source, change

    def __len__(self) -> int:
        return 2 * len(self._source)

    def __getitem__(self, index: Any) -> Any:
        record = self._source[int(index) % len(self._source)]
        if index < len(self._source):
            return record
        return record._replace(captions=tuple(map(self._change, record.captions)))

    def contents(self) -> dict[str, str]:
        return {**self._source.contents(), "change": repr(self._change("x"))}

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} {self._change('x')!r}"


def measured(world: World, source: Source, functions: suite.Functions, **settings: Any) -> dict[str, float]:
    (spec, *_) = world.config.evaluate.splits
    world = world.with_evaluate(**{"splits": (spec,), "zero_shot": ""} | settings)
    reference = world.reference
    return suite.run(
        functions, {spec: source}, world.tokenizer, world.config, world.batches, reference=reference, progress=False
    ).metrics


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + " ",
        lambda text: "  " + text.replace(" ", "  "),
        lambda text: text.replace(" ", "\u00a0"),
        lambda text: text.translate({ord(c): ord(c) + 0xFEE0 for c in "abcdefghijklmnopqrstuvwxyz"}),  # full width
        lambda text: text.replace(" ", "\t\n"),
        lambda text: text.replace(" ", "\u3000"),
    ],
)
def test_texts_that_the_model_reads_alike_are_one_candidate(world: World, change: Callable[[str], str]) -> None:
    """All figures are those of captions that are equal letter by letter; beside them is how many were not."""
    source = world.sources[world.config.evaluate.splits[0]]
    functions = scored(world, noise=3.0)
    found = measured(world, Rewritten(source, change), functions, likelihood=36)
    equal = measured(world, Rewritten(source, lambda text: text), functions, likelihood=36)
    assert found.pop("seen/same_texts") == found.pop("seen/likelihood/same_texts") == 24
    assert equal.pop("seen/same_texts") == equal.pop("seen/likelihood/same_texts") == 0
    del found["seen/caption_exact_match"], equal["seen/caption_exact_match"]
    assert found == equal and found["seen/texts"] == 24 and found["seen/pixel/image_to_text/r1"] > 0.3
    assert measured(world, Rewritten(source, change), whole(world))["seen/text_to_image/r1"] == 1


def test_captions_that_differ_beyond_what_the_model_reads_are_one_text(world: World) -> None:
    """And those that differ before it are two."""
    source = world.sources[world.config.evaluate.splits[0]]
    keys = splits.TextKeys(world.tokenizer, LENGTH)
    long = "red square " * LENGTH
    assert len(set(keys([long, long + "blue", "blue " + long]))) == 2
    assert len(set(splits.TextKeys(world.tokenizer, 20 * LENGTH)([long, long + "blue"]))) == 2
    tail = " ".join(["bar"] * LENGTH)
    ends = itertools.count()
    found = measured(world, Rewritten(source, lambda text: f"{text} {tail} {next(ends)}"), whole(world))
    assert found["seen/texts"] == 48  # 24 short, 24 long, however many endings these have


def test_letters_of_two_unicode_forms_are_one_text(world: World) -> None:
    keys = splits.TextKeys(world.tokenizer, LENGTH)
    assert len(set(keys(["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")]))) == 1
    assert len(set(keys(["red square", "red circle", "Red square"]))) == 3  # this vocabulary knows case


def test_the_classes_that_a_source_names_are_the_candidates(world: World) -> None:
    """With images of them or without; a model that always answers with a class that has none is always wrong."""
    (spec, *_) = world.config.evaluate.splits
    source = copy.copy(world.sources[spec])
    others = ["red", "green", "blue", "yellow", "purple", "black", "apple"]
    source.class_names = {name: [name] for name in ["bar", "circle", "square", *others]}
    functions = scored(world)
    found = measured(world, source, functions, splits=(), zero_shot=spec, likelihood=15)
    assert (found["zero_shot/classes"], found["zero_shot/classes_without_images"]) == (10, 7)
    assert found["zero_shot/chance/top1"] == found["zero_shot/likelihood/chance/top1"] == 0.1
    few = measured(world, world.sources[spec], functions, splits=(), zero_shot=spec, likelihood=15)
    assert (few["zero_shot/classes"], few["zero_shot/classes_without_images"], few["zero_shot/top1"]) == (3, 0, 1)
    # The red square is as near to red as to square: ties are wrong, where three classes left no doubt.
    assert found["zero_shot/top1"] < 1
    (said,) = [note for note in notes.of_metrics(found) if "without" in note or "no image" in note]
    assert said.startswith("zero_shot: 7 of 10 classes have no image")
    assert f"note: {said}" in tables.summary(world.config, found)


def test_classes_that_the_model_reads_alike_are_one_class(world: World) -> None:
    (spec, *_) = world.config.evaluate.splits
    source = copy.copy(world.sources[spec])
    source.class_names = {"bar": ["bar"], "bar_2": ["bar "], "circle": ["circle"], "square": ["square", "red"]}
    found = measured(world, source, whole(world), splits=(), zero_shot=spec)
    assert (found["zero_shot/classes"], found["zero_shot/same_classes"]) == (3, 1)
    assert found["zero_shot/classes_without_images"] == 0
    assert any("reads 1 classes as others" in note for note in notes.of_metrics(found))


def test_a_classifier_counts_its_classes_without_records() -> None:
    found = classification.accuracy(np.eye(5)[[0, 0, 2]], np.array([0, 0, 2]))
    assert (found["classes"], found["classes_without_images"], found["mean_per_class"]) == (5, 3, 1)
    said = notes.of_metrics({f"val/classification/{key}": value for key, value in found.items()})
    assert said[0].startswith("val/classification: 3 of 5 classes have no image")


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        ([["a red dot"]], "is one image"),
        ([["a red dot", "a dot"]], "is one image"),
        ([["a red dot"], ["A red dot."]], "has the same references for all 2 images"),
        ([["a red dot"], ["a blue dot"]], ""),
    ],
)
def test_a_cider_that_is_0_whatever_is_said_says_why(references: list[list[str]], reason: str) -> None:
    found, _ = caption_scores.scores([texts[0] for texts in references], references)
    said = notes.of_metrics({f"seen/captions/{key}": value for key, value in found.items()})
    assert [note.endswith(reason) for note in said] == [True] * bool(reason)
    assert (found["cider"] > 0) == (not reason) and found["bleu_1"] == pytest.approx(1)


def test_captions_without_a_word_are_counted() -> None:
    found, _ = caption_scores.scores(["", "...", "a dot"], [["a dot"], ["a red dot"], ["a blue dot"]])
    assert found["empty"] == 2 and all(np.isfinite(value) for value in found.values())
    (said,) = notes.of_metrics({f"seen/captions/{key}": value for key, value in found.items()})
    assert said.startswith("seen/captions: 2 of 3 captions have no word")


def test_rankings_that_cannot_fail_are_named(world: World) -> None:
    """One text for all images, or one image, is always found."""
    source = world.sources[world.config.evaluate.splits[0]]

    class Single(Rewritten):
        def __len__(self) -> int:
            return 1

    said = notes.of_metrics(measured(world, Single(source, str), scored(world), likelihood=5, score_captions=True))
    for text in (
        "seen/image_to_text: any ranking of 1 text has R@1, R@5, R@10 of 1",
        "seen/text_to_image: any ranking of 1 image has R@1, R@5, R@10 of 1",
        "seen/likelihood/image_to_text_pmi: P(text) is the mean over the images, of which there is one",
        "seen/captions/cider is 0 whatever the captions are",
    ):
        assert any(note.startswith(text) for note in said), (text, said)
    assert not any("same_texts" in note for note in said)
