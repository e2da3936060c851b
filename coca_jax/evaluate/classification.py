"""Measures of a classifier on labelled records."""

from __future__ import annotations

import numpy as np


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of records whose class is among the likeliest. Ties count against the model, as in retrieval.

    Args:
      logits: float `[m, c]`.
      labels: int `[m]`, 0 .. c - 1; -1 is a class that the classifier does not have: always wrong.

    Returns:
      `top1`, `top5`; `mean_per_class`: top1 within each class that the classifier has and a record too, averaged;
      `unknown`: records of classes that it does not have, which may be any number of classes; `classes`: how many it
      has, and `classes_without_images`: how many of them no record has; `largest_class`: the top1 of always answering
      with the commonest class; `chance/top1`, `chance/top5`: of a random ranking of the classes.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if not len(labels):
        raise ValueError("no record to classify")
    known = labels >= 0
    own = np.take_along_axis(logits, np.maximum(labels, 0)[:, None], axis=1)
    rank = np.sum(~(logits < own), axis=1)  # what is not a number is not below
    rank = np.where(known & np.isfinite(own[:, 0]), rank, logits.shape[1] + 1)
    _, members, sizes = np.unique(labels[known], return_inverse=True, return_counts=True)
    per_class = np.bincount(members, weights=rank[known] == 1) / sizes
    classes = logits.shape[1]
    return {
        "top1": float(np.mean(rank == 1)),
        "top5": float(np.mean(rank <= min(5, classes))),
        "mean_per_class": float(per_class.mean()) if len(per_class) else 0.0,
        "unknown": float(np.sum(~known)),
        "classes": float(classes),
        "classes_without_images": float(classes - len(sizes)),
        # A class that the classifier does not have is no answer that it could always give.
        "largest_class": float(np.bincount(labels[known], minlength=1).max() / len(labels)),
        "chance/top1": 1 / classes,
        "chance/top5": min(5, classes) / classes,
    }
