"""Captions scored by their likelihood: what the generative half alone knows of pictures and texts.

Every text has log P(text | image) for every picture, a matrix `[m, k]` in nats. Texts are ranked for a picture, and
classes, in two ways:

- by log P(text | image), which favours what is short and common whatever the picture shows;
- by log P(text | image) - log P(text), where P(text) is the mean of P(text | image) over the pictures at hand: by
  Bayes, what ranks the texts where each was as likely beforehand ("pmi", pointwise mutual information).

For a text, pictures are ranked by log P(text | image); P(text) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coca_jax.evaluate import retrieval

Measures = dict[str, dict[str, float]]


def pmi(log_probs: np.ndarray) -> np.ndarray:
    """log P(text | image) - log P(text), float64 `[m, k]`, with P(text) the mean over the pictures."""
    log_probs = np.asarray(log_probs, np.float64)
    with np.errstate(invalid="ignore"):  # of a model that diverged; its ranks say so
        return log_probs - _log_mean_exp(log_probs, axis=0)


def recall(log_probs: np.ndarray, image_to_text: retrieval.Truth) -> Measures:
    """Retrieval as `retrieval.recall`, by likelihood.

    Args:
      log_probs: `[m, k]`, nats.
      image_to_text: for each picture the rows of its texts.

    Returns:
      `{"image_to_text": {"r1", ...}, "image_to_text_pmi": {...}, "text_to_image": {...}, "chance": {...}}`.
    """
    log_probs = np.asarray(log_probs, np.float64)
    m, k = log_probs.shape
    text_to_image = retrieval.invert(image_to_text, k)
    ways = (retrieval.chance(image_to_text, k), retrieval.chance(text_to_image, m))
    return {
        "image_to_text": retrieval.measures(retrieval.ranks_of(log_probs, image_to_text), image_to_text, k),
        "image_to_text_pmi": retrieval.measures(retrieval.ranks_of(pmi(log_probs), image_to_text), image_to_text, k),
        "text_to_image": retrieval.measures(retrieval.ranks_of(log_probs.T, text_to_image), text_to_image, m),
        "chance": {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]},
    }


def of_classes(log_probs: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """log P(class | image) of classes with several names, float64 `[m, c]`: the mean probability of its names.

    Args:
      log_probs: `[m, sum(sizes)]`, the names of the first class first.
      sizes: names of each class.
    """
    parts = np.split(np.asarray(log_probs, np.float64), np.cumsum(sizes)[:-1], axis=1)
    return np.stack([_log_mean_exp(part, axis=1) for part in parts], axis=1)


def _log_mean_exp(x: np.ndarray, axis: int) -> np.ndarray:
    most = np.max(x, axis=axis, keepdims=True)
    most = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.squeeze(most, axis) + np.log(np.mean(np.exp(x - most), axis=axis))
