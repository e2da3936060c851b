from __future__ import annotations

import numpy as np
import pytest

from coca_jax.evaluate import zero_shot


def test_classes_average_their_prompts():
    table = {"a cat": [1.0, 0, 0], "cat!": [0, 1.0, 0], "a {dog}": [0, 0, 1.0], "{dog}!": [0, 0.6, 0.8]}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.array([table[text] for text in texts])

    found = zero_shot.class_features(encode, ["cat", "{dog}"], ["a {}", "{}!"])
    assert asked == ["a cat", "cat!", "a {dog}", "{dog}!"]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[half, half, 0], [0, 0.6 / np.sqrt(3.6), 1.8 / np.sqrt(3.6)]])


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
        zero_shot.class_features(lambda texts: np.ones((len(texts), 2)), ["cat"], ["{}", "a photo"])
    with pytest.raises(ValueError, match="needs classes and prompts, not 1 and 0"):
        zero_shot.class_features(lambda texts: np.ones((len(texts), 2)), ["cat"], [])
    with pytest.raises(ValueError, match="no picture"):
        zero_shot.classify(np.ones((0, 2)), np.zeros(0, int), np.eye(2))
