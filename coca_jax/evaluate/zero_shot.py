"""Zero-shot classification: a class is the mean text feature of prompts naming it (CLIP, arXiv:2103.00020, 3.1.4)."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.data import label_names
from coca_jax.data.sources.prompts import imagenet
from coca_jax.evaluate import retrieval


def class_names(labels: Sequence[str], given: Mapping[str, Sequence[str]] | None) -> list[tuple[str, ...]]:
    """What each label is called in captions.

    Args:
      labels: the classes.
      given: names by label, as the source has them. A label that is not in it, and every label where it is None, is
        called by `label_names.name_of`, as in the captions that training makes of labels.

    Raises:
      ValueError: a label is no name, and `given` has none for it.
    """
    names = [tuple((given or {}).get(label) or filter(None, [label_names.name_of(label)])) for label in labels]
    if missing := [label for label, words in zip(labels, names, strict=True) if not words]:
        raise ValueError(f"zero-shot classification: {label_names.no_name(missing[0])}")
    return names


def candidates(
    labels: Iterable[str],
    given: Mapping[str, Sequence[str]] | None,
    keys: Callable[[Iterable[str]], Sequence[str]],
    prompts: Sequence[str],
) -> tuple[list[str], list[tuple[str, ...]], dict[str, int]]:
    """The classes that an image may be given: those that the source names, with or without images, and the labels.

    Classes whose prompts the model reads as the same texts are one class, as with the texts of retrieval.

    Args:
      labels: Of the images.
      given: See `class_names`.
      keys: See `splits.TextKeys`.
      prompts: Templates of `class_features`.

    Returns:
      The classes in the order of their labels (those of one class joined by " / "), the names of each, and the row in
      them of every label.
    """
    everything = sorted({*labels, *(given or ())})
    called = class_names(everything, given)
    prompts = expand(prompts)

    def read(names: Sequence[str], some: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted(keys([prompt.replace("{}", name) for name in names for prompt in some])))

    # All prompts are read only of those classes that the first cannot tell apart.
    first = [read(names, prompts[:1]) for names in called]
    several = {key for key, count in collections.Counter(first).items() if count > 1}
    whole = [
        (key, read(names, prompts) if key in several else label)
        for label, names, key in zip(everything, called, first, strict=True)
    ]
    members: dict[Any, list[int]] = {}
    for at, key in enumerate(whole):
        members.setdefault(key, []).append(at)
    rows = {everything[at]: row for row, own in enumerate(members.values()) for at in own}
    joined = [" / ".join(everything[at] for at in own) for own in members.values()]
    return joined, [called[own[0]] for own in members.values()], rows


def class_features(
    encode: Callable[[Sequence[str]], np.ndarray], names: Sequence[Sequence[str]], prompts: Sequence[str]
) -> np.ndarray:
    """One unit-length feature a class, the mean over its names and the prompts: float64 `[c, d]`.

    Args:
      encode: texts `[n]` -> unit-length features `[n, d]`; called once, with every prompt of every name.
      names: what each class is called, at least one name a class, see `class_names`.
      prompts: templates; `{}` is where the name goes.

    Raises:
      ValueError: no class, a class without a name, no prompt, or a prompt without `{}`.
    """
    if not names or not prompts:
        raise ValueError(f"zero-shot classification needs classes and prompts, not {len(names)} and {len(prompts)}")
    if not all(names):
        raise ValueError(f"class {[bool(words) for words in names].index(False)} has no name: give each at least one")
    prompts = expand(prompts)
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} has no place for the name: write {{}} where it goes")
    # replace, not format: names and prompts are data, and a brace in them is only a brace.
    features = encode([prompt.replace("{}", name) for words in names for name in words for prompt in prompts])
    sizes = np.array([len(words) for words in names]) * len(prompts)
    starts = np.cumsum(sizes) - sizes
    mean = np.add.reduceat(np.asarray(features, np.float64), starts) / sizes[:, None]
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def expand(prompts: Sequence[str]) -> list[str]:
    """The prompts, with those of CLIP for ImageNet in the place of `imagenet`."""
    return [text for prompt in prompts for text in (imagenet()["prompts"] if prompt == "imagenet" else [prompt])]


def classify(image_features: np.ndarray, labels: np.ndarray, features: np.ndarray) -> dict[str, float]:
    """Accuracy of taking the class whose feature is nearest. Ties count against the model, as in retrieval.

    Args:
      image_features: float `[m, d]`, unit length.
      labels: int `[m]`, rows of `features`.
      features: float `[c, d]`, unit length, from `class_features`.

    Returns:
      See `accuracy`.
    """
    labels = np.asarray(labels)
    return accuracy(retrieval.ranks(image_features, features, labels[:, None].tolist()), labels, len(features))


def accuracy(rank: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy from the rank of each picture's own class.

    Args:
      rank: int `[m]`, from 1, as `retrieval.ranks` gives it.
      labels: int `[m]`.
      classes: how many there are.

    Returns:
      `top1` and `top5`: shares of the pictures; `mean_per_class`: top1 within each class that has pictures, averaged;
      `chance/top1` and `chance/top5`: of a random ranking of the classes; `largest_class`: the top1 of always
      answering with the commonest class, which random ranking understates where classes are uneven.
    """
    if not len(labels):
        raise ValueError("no picture to classify")
    _, members, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    per_class = np.bincount(members, weights=rank == 1) / sizes
    _, top1, top5 = of_class(rank, classes)
    return {
        "top1": top1,
        "top5": top5,
        "mean_per_class": float(per_class.mean()),
        "chance/top1": 1 / classes,
        "chance/top5": min(5, classes) / classes,
        "largest_class": float(sizes.max() / len(labels)),
    }


def of_class(rank: np.ndarray, classes: int) -> tuple[int, float, float]:
    """Pictures, and the shares of them in which the right class is the first, and among the first five."""
    return len(rank), float(np.mean(rank == 1)), float(np.mean(rank <= min(5, classes)))
