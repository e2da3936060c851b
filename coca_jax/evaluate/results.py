"""What an evaluation takes from a model, and what it gives: figures, and the material of the report's galleries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from coca_jax.evaluate.retrieval import Comparer

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Functions:
    """The model, its parameters bound. A half that was not trained is None, and its measures are absent.

    Results are numpy arrays. With several processes, each calls them alike and gets all of the result.

    Attributes:
      encode_image: images uint8 `[b, s, s, 3]` -> features `[b, d]`, unit length.
      encode_text: tokens int32 `[b, t]` -> features `[b, d]`, unit length.
      caption_loss: (images, tokens) -> (sum of negative log-likelihoods in nats `[b]`, target tokens `[b]`).
      generate: images -> tokens int32 `[b, t]`.
      log_probs: (images, tokens `[c, t]`) -> log P(text | image) in nats of every text for every image, `[b, c]`.
      classify: (images, tokens) -> logits `[b, k]` of a task's classes.
      classes: these classes' labels, by number.
      compare: scores of many pairs on the devices, see `retrieval.Comparer`; None: all are computed on the host.
    """

    encode_image: Callable[[Array], Array] | None = None
    encode_text: Callable[[Array], Array] | None = None
    caption_loss: Callable[[Array, Array], tuple[Array, Array]] | None = None
    generate: Callable[[Array], Array] | None = None
    log_probs: Callable[[Array, Array], Array] | None = None
    classify: Callable[[Array, Array], Array] | None = None
    classes: tuple[str, ...] = ()
    compare: Comparer | None = None


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that evaluate together, each of which calls `run`, and this one among them.

    Attributes:
      index: of this one. Process 0 shows progress, measures the pixel baseline and gets the gallery.
      count: how many.
      gather: what JSON can hold -> the values of all processes, by index; called by all alike.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One of the top answers: a name, and in a search for pictures the picture (encoded, as in the record)."""

    text: str
    right: bool
    picture: bytes = b""


@dataclasses.dataclass(frozen=True)
class Query:
    """A query of the gallery. `text` holds the right names of a picture, or the name that is asked for."""

    split: str
    direction: str  # image_to_text | text_to_image | zero_shot (a picture, answered by classes)
    text: str
    answers: tuple[Answer, ...]
    rank: int  # of the best right answer, from 1
    candidates: int
    picture: bytes = b""  # asked about, in image_to_text and zero_shot


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated caption with its picture and references."""

    split: str
    text: str
    references: tuple[str, ...]
    exact: bool
    picture: bytes


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """Zero-shot classification within one class: its label, what it is called, its pictures, shares of them right."""

    label: str
    names: tuple[str, ...]
    pictures: int
    top1: float
    top5: float


@dataclasses.dataclass(frozen=True)
class Results:
    """What was found: metrics by name (plain floats) and classes, the same in all processes; in process 0 galleries."""

    metrics: dict[str, float]
    queries: tuple[Query, ...] = ()
    captions: tuple[Caption, ...] = ()
    classes: tuple[ClassScore, ...] = ()

    def __add__(self, other: Results) -> Results:
        return Results(
            self.metrics | other.metrics,
            self.queries + other.queries,
            self.captions + other.captions,
            self.classes + other.classes,
        )
