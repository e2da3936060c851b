"""Measures of a classifier, on cases that can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest

from coca_jax.evaluate import classification


def test_always_one_answer_is_as_good_as_its_class_is_common() -> None:
    """And a class that the classifier does not have is no answer, however common it is."""
    labels = np.array([-1, -1, -1, 0, 1, 1])
    for answer in (0, 1, 2):
        logits = np.tile(np.eye(3)[answer], (len(labels), 1))
        found = classification.accuracy(logits, labels)
        assert found["top1"] == np.mean(labels == answer)
        assert found["largest_class"] == pytest.approx(2 / 6)
    assert classification.accuracy(np.zeros((2, 3)), np.array([-1, -1]))["largest_class"] == 0.0


@pytest.mark.parametrize("logits", [np.zeros((2, 4)), np.full((2, 4), np.nan)])
def test_ties_and_what_is_not_a_number_count_against_the_model(logits: np.ndarray) -> None:
    assert classification.accuracy(logits, np.array([0, 3]))["top1"] == 0.0


def test_classes_that_the_classifier_lacks_are_counted_and_are_no_class_of_the_mean() -> None:
    """However many they are: nobody says that they are one class, or how many."""
    logits, labels = np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2])
    without = classification.accuracy(logits, labels)
    assert without["mean_per_class"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert without["unknown"] == 0.0
    for lacking in (1, 2, 7):
        more = np.concatenate([logits, np.eye(3)[[0] * lacking]])
        found = classification.accuracy(more, np.concatenate([labels, [-1] * lacking]))
        assert (found["mean_per_class"], found["unknown"]) == (without["mean_per_class"], float(lacking))
        assert found["top1"] == 3 / (4 + lacking)  # of all records, these too
    nothing = classification.accuracy(logits, np.full(4, -1))
    assert (nothing["mean_per_class"], nothing["unknown"]) == (0.0, 4.0)
