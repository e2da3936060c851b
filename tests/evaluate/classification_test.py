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
