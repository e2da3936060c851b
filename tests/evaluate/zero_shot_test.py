from __future__ import annotations

import copy

import numpy as np
import pytest

from coca_jax.data import emoji_art, sources
from coca_jax.data.sources import Spec, prompts
from coca_jax.evaluate import suite, zero_shot
from tests.evaluate.shapes import World


def test_classes_average_their_prompts():
    table = {"a cat": [1.0, 0, 0], "cat!": [0, 1.0, 0], "a {dog}": [0, 0, 1.0], "{dog}!": [0, 0.6, 0.8]}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.array([table[text] for text in texts])

    found = zero_shot.class_features(encode, [["cat"], ["{dog}"]], ["a {}", "{}!"])
    assert asked == ["a cat", "cat!", "a {dog}", "{dog}!"]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[half, half, 0], [0, 0.6 / np.sqrt(3.6), 1.8 / np.sqrt(3.6)]])


def test_classes_of_several_names_weigh_each_alike():
    rng = np.random.default_rng(0)
    table: dict[str, np.ndarray] = {}

    def encode(texts):
        return np.array([table.setdefault(text, rng.normal(size=5)) for text in texts])

    names, prompts = [["cat"], ["dog", "puppy", "hound"], ["cow", "calf"]], ["{}", "a {}"]
    found = zero_shot.class_features(encode, names, prompts)
    for row, words in zip(found, names, strict=True):
        mean = np.mean([table[prompt.replace("{}", word)] for word in words for prompt in prompts], 0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean))


def test_labels_are_called_by_the_given_names_or_their_own_words():
    assert zero_shot.class_names(["cat-face", "sports_car"], None) == [("cat face",), ("sports car",)]
    assert zero_shot.class_names(["cat-face", "sports_car"], {"cat-face": ["cat", "smiling cat"], "lion": ["x"]}) == [
        ("cat", "smiling cat"),
        ("sports car",),
    ]


def test_the_suite_calls_classes_as_their_source_does(world: World):
    asked: list[str] = []

    def encode_text(tokens):
        asked.extend(world.tokenizer.decode(row) for row in tokens)
        return np.ones((len(tokens), 2))

    functions = suite.Functions(encode_image=lambda images: np.ones((len(images), 2)), encode_text=encode_text)
    (spec, *_) = world.config.evaluate.splits
    source = copy.copy(world.sources[spec])
    source.class_names = {"bar": ["bar,", "red bar"], "circle": ["circle"]}  # and nothing for squares
    found = suite.run(
        functions, {spec: source}, world.tokenizer, world.with_evaluate(splits=()).config, world.batches, progress=False
    )
    assert found.metrics["zero_shot/classes"] == 3
    words = ("bar,", "red bar", "circle", "square")
    assert [text for text in asked if text] == [p.format(word) for word in words for p in ("a {}", "{}")]


def test_the_emoji_classes_have_names_that_give_nothing_away():
    """One entry for each subgroup, a few words each, and none that is the name of a held-out concept."""
    names = sources._emoji_class_names()
    concepts = list(emoji_art.concepts().values())
    assert set(names) == {concept.label for concept in concepts} - {""}
    assert all(1 <= len(words) <= 4 and len(set(words)) == len(words) for words in names.values())
    assert all(word == " ".join(word.split()) and word for words in names.values() for word in words)
    held_out = {concept.name.lower() for concept in concepts if concept.held_out == "concepts"}
    assert len(held_out) > 300
    assert not held_out & {word.lower() for words in names.values() for word in words}


def test_accuracy_by_hand():
    classes = np.eye(7)
    images = np.eye(7)[[0, 0, 0, 1, 2, 3]] + 0.5 * np.eye(7)[[6, 6, 6, 6, 6, 6]]
    labels = np.array([0, 0, 0, 0, 2, 6])  # three of class 0 right, one wrong; class 2 right; class 6 only second
    found = zero_shot.classify(images, labels, classes)
    assert found["top1"] == pytest.approx(4 / 6)
    # The wrong one of class 0 scores 0 for its class, as four wrong classes do, and two score more: 7th.
    assert found["top5"] == pytest.approx(5 / 6)
    assert found["mean_per_class"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert found["largest_class"] == pytest.approx(4 / 6)
    assert (found["chance/top1"], found["chance/top5"]) == (1 / 7, 5 / 7)


def test_equal_features_are_not_an_answer():
    found = zero_shot.classify(np.ones((4, 3)), np.arange(4) % 2, np.ones((2, 3)))
    assert found["top1"] == 0
    assert found["top5"] == 1  # of two classes
    assert zero_shot.classify(np.full((4, 3), np.nan), np.arange(4) % 2, np.ones((2, 3)))["top5"] == 0


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="'a photo' has no place for the name"):
        zero_shot.class_features(lambda texts: np.ones((len(texts), 2)), [["cat"]], ["{}", "a photo"])
    with pytest.raises(ValueError, match="needs classes and prompts, not 1 and 0"):
        zero_shot.class_features(lambda texts: np.ones((len(texts), 2)), [["cat"]], [])
    with pytest.raises(ValueError, match="class 1 has no name"):
        zero_shot.class_features(lambda texts: np.ones((len(texts), 2)), [["cat"], []], ["{}"])
    with pytest.raises(ValueError, match="no picture"):
        zero_shot.classify(np.ones((0, 2)), np.zeros(0, int), np.eye(2))


def test_imagenet_has_clips_names_and_prompts() -> None:
    known = prompts.imagenet()
    assert len(known["classes"]) == 1000 and list(known["classes"]) == sorted(known["classes"])
    assert known["classes"]["n01440764"] == "tench" and "CLIP" in known["source"]
    texts = zero_shot.expand(["{}", "imagenet"])
    assert len(texts) == 81 and texts[:2] == ["{}", "a bad photo of a {}."] and all("{}" in text for text in texts)
    classes = prompts.read_classes(Spec.parse("folder:/nowhere?classes=imagenet"))
    assert classes is not None and len(classes) == 2000
    assert classes["n01440764"] == classes["0"] == ("n01440764", ("tench",))
    assert classes["999"].names == ("toilet paper",)
