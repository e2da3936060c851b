"""What a task asks of its examples beside a picture: a class, the frames of a clip, a text."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from coca_jax import config
from coca_jax.data import opening
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import Source

FILE = "classes.txt"  # in a workdir: what its classifier tells apart, by number
_LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines also ends lines at U+0085, U+2028 and others: part of a label


@dataclasses.dataclass(frozen=True)
class Task:
    """Of the examples of a run.

    Attributes:
      labels: the classes by number; empty: examples have none.
      frames: above 1 an example is a clip of so many.
      texts: whether captions (or questions) are read; without, an example may have none.
    """

    labels: tuple[str, ...] = ()
    frames: int = 1
    texts: bool = True

    @classmethod
    def of(cls, c: config.Config, labels: tuple[str, ...]) -> Task:
        loss, head = c.loss, c.model.head
        texts = loss.lambda_con > 0 or loss.lambda_cap > 0 or head.reads == "decoder"
        return cls(labels, head.frames, texts)

    def number(self, record: Record) -> int:
        """The class of a record. Raises BadExample where it is none of them."""
        if record.label not in self._numbers:
            has = f"the label {record.label!r}" if record.label else "no label"
            raise BadExample("no_class", f"record {record.key} has {has}: none of the {len(self.labels)} classes")
        return self._numbers[record.label]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def chosen(self, record: Record, rng: np.random.Generator | None = None) -> list[bytes]:
        """`frames` encoded pictures of a clip, in order: one of each of as many equal spans of time.

        Args:
          record: with at least one frame; fewer than asked for are repeated.
          rng: draws a place in each span (Wang et al. 2016, arXiv 1608.00859); None: the middles.
        """
        clip = (record.image, *record.frames)
        places = np.full(self.frames, 0.5) if rng is None else rng.random(self.frames)
        return [clip[i] for i in frames_at(len(clip), places)]


def frames_at(length: int, places: np.ndarray) -> np.ndarray:
    """Which of a clip's `length` frames are at these places, 0..1, in as many equal spans of time."""
    at = ((np.arange(len(places)) + places) * length / len(places)).astype(int)
    return np.minimum(at, length - 1)


def of_clips(clips: Any, frames: int) -> list[list[Any]]:
    """The pictures of each clip that a model of so many frames looks at, those in the middle of equal spans.

    Args:
      clips: each pictures in order, of any number; arrays are `[frames, h, w, 3]`.
      frames: of the model.

    Raises:
      DataError: there is no clip, or a picture in the place of one.
    """
    wanted = f"this model looks at {frames} frames of a clip: give a list of clips, each a list of pictures in order"
    if not _holds(clips, 5):
        raise DataError(wanted)
    found, middles = [], np.full(frames, 0.5)
    for at, clip in enumerate(clips):
        pictures = list(clip) if _holds(clip, 4) else []
        if not pictures:
            what = "has no pictures" if _holds(clip, 4) else "is one picture"
            raise DataError(f"clip {at} {what}; {wanted}")
        found.append([pictures[i] for i in frames_at(len(pictures), middles)])
    if not found:
        raise DataError(f"no clip was given; {wanted}")
    return found


def _holds(value: Any, axes: int) -> bool:
    """Whether it is several, and not a path, encoded bytes, a picture or an array of other axes."""
    single = isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Iterable)
    return not single and getattr(value, "ndim", axes) == axes


@dataclasses.dataclass(frozen=True)
class Label:
    """A class that a classifier gives a picture, and its probability."""

    name: str
    probability: float


def likeliest(logits: np.ndarray, labels: tuple[str, ...], top: int) -> list[list[Label]]:
    """The likeliest classes of each row, the likeliest first.

    Args:
      logits: float `[b, c]`.
      labels: of the c classes.
      top: how many.

    Raises:
      ValueError: top is less than 1.
    """
    if top < 1:
        raise ValueError(f"top={top} must be 1 or more: how many classes of each picture are wanted")
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    rows = zip(best, probabilities, strict=True)
    return [[Label(labels[i], float(row[i])) for i in order] for order, row in rows]


PAIRS = Task()  # pictures with captions: no task


def read(path: epath.PathLike) -> tuple[str, ...]:
    """The labels in a file, one a line.

    Raises:
      DataError: it is missing or not UTF-8, or has a label twice or less than two.
    """
    try:
        text = opening.read_text(path, what="a file of labels")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; config.data.classes names one with a label a line, or is empty"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    labels = tuple(line.strip() for line in _LINE_END.split(text) if line.strip())
    if len(set(labels)) < len(labels) or len(labels) < 2:
        twice = next((label for label in labels if labels.count(label) > 1), "")
        what = f"has {twice!r} twice" if twice else f"has {len(labels)} labels"
        raise DataError(f"{path} {what}: write each of two or more labels on a line of its own")
    return labels


def to_bytes(labels: tuple[str, ...]) -> bytes:
    """The file that `read` reads."""
    return ("\n".join(labels) + "\n").encode()


def of_source(source: Source, *, progress: bool = True) -> tuple[str, ...]:
    """All labels of a source, sorted: numbers by value, before words. Every record is read once.

    Raises:
      DataError: there are less than two.
    """
    found = set()
    for index in tqdm(range(len(source)), desc="reading labels", unit=" records", disable=not progress, leave=None):
        try:
            found.add(source[index].label)
        except BadExample:  # it will be met, and counted, in training
            continue
    found.discard("")
    labels = tuple(sorted(found, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label)))
    if len(labels) < 2:
        raise DataError(
            f"{source.name} has {len(labels)} labels, and config.loss.lambda_cls trains a classifier: name a labelled "
            "source, or with ?label= the column that holds the labels"
        )
    for label in labels:  # else the workdir's list of them would be read as another one
        if _LINE_END.search(label) or label != label.strip():
            raise DataError(
                f"{source.name} has the label {label!r}: labels are words without line ends, and without blanks before "
                "or after them; write them so, or name another column by ?label="
            )
    return labels
