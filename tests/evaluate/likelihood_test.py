from __future__ import annotations

import numpy as np
import pytest

from coca_jax.evaluate import likelihood


def test_pmi_is_log_p_of_text_and_picture_over_p_of_text() -> None:
    p = np.random.default_rng(0).uniform(0.01, 0.9, (5, 7))
    np.testing.assert_allclose(likelihood.pmi(np.log(p)), np.log(p / p.mean(axis=0)[None, :]))
    # Far below what a float can hold as a probability: captions of a hundred tokens are.
    np.testing.assert_allclose(likelihood.pmi(np.log(p) - 2000), likelihood.pmi(np.log(p)), atol=1e-9)


def test_a_class_is_the_mean_of_its_names() -> None:
    p = np.random.default_rng(1).uniform(size=(4, 6))
    found = np.exp(likelihood.of_classes(np.log(p), [1, 3, 2]))
    wanted = np.stack([p[:, 0], p[:, 1:4].mean(1), p[:, 4:].mean(1)], axis=1)
    np.testing.assert_allclose(found, wanted)


def test_short_texts_win_but_not_when_compared() -> None:
    """Text 0 is likely whatever is shown; the others are each likeliest for their own picture, but long."""
    own = np.full((3, 3), -30.0) + 5 * np.eye(3)
    matrix = np.concatenate([np.full((3, 1), -2.0), own], axis=1)
    found = likelihood.recall(matrix, [[1], [2], [3]])
    assert found["image_to_text"]["r1"] == 0 and found["image_to_text"]["r5"] == 1
    assert found["image_to_text_pmi"]["r1"] == found["text_to_image"]["r1"] == 1
    assert found["chance"]["r1"] == pytest.approx((1 / 4 + 1 / 3) / 2)


def test_a_model_that_diverged_is_a_miss() -> None:
    found = likelihood.recall(np.full((2, 2), np.nan), [[0], [1]])
    assert found["image_to_text"]["r10"] == found["text_to_image"]["r10"] == found["image_to_text_pmi"]["r10"] == 0
    found = likelihood.recall(np.full((2, 2), -np.inf), [[0], [1]])
    assert found["image_to_text"]["r10"] == 0
