"""What is counted of records: sizes, formats, captions. Counts of parts add up to those of the whole."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from coca_jax.data.prepare.checking import Checked
from coca_jax.data.records import REASONS
from coca_jax.data.tokenizer import Tokenizer

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_SHOWN = 100  # labels and styles that are listed; there may be millions

# Name of each count -> whether its values are numbers.
_COUNTS = {
    "captions_per_record": True,
    "characters": True,
    "width": True,
    "height": True,
    "kibibytes": True,
    "format": False,
    "label": False,
    "style": False,
    "dropped": False,
}


class Statistics:
    """Counts of records: for each property a value -> how many have it.

    Attributes:
      counts: by property; exact, so that percentiles of sums can be taken.
      resized: pictures that were made smaller.
      blank: blank captions that were left out of records with others.
    """

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[Any]] = {name: collections.Counter() for name in _COUNTS}
        self.resized = 0
        self.blank = 0

    def add(self, checked: Checked) -> None:
        """Counts a record that is used."""
        record = checked.record
        self.counts["captions_per_record"][len(record.captions)] += 1
        self.counts["characters"].update(map(len, record.captions))
        self.counts["width"][checked.width] += 1
        self.counts["height"][checked.height] += 1
        self.counts["kibibytes"][math.ceil(len(record.image) / 1024)] += 1
        self.counts["format"][checked.format] += 1
        for name, value in (("label", record.label), ("style", record.style)):
            if value:
                self.counts[name][value] += 1
        self.resized += checked.resized
        self.blank += checked.blank

    def drop(self, reason: str) -> None:
        """Counts a record that is left out."""
        self.counts["dropped"][reason] += 1

    def merge(self, other: Statistics) -> None:
        """Adds the counts of another part."""
        for name, count in other.counts.items():
            self.counts[name].update(count)
        self.resized += other.resized
        self.blank += other.blank

    @property
    def records(self) -> int:
        """How many are used."""
        return self.counts["format"].total()

    @property
    def bad(self) -> int:
        """How many are left out."""
        return self.counts["dropped"].total()

    def to_json(self) -> dict[str, Any]:
        """In plain values, in an order that does not depend on that of the records."""
        counts = {name: {str(v): n for v, n in sorted(count.items())} for name, count in self.counts.items()}
        return {"counts": counts, "resized": self.resized, "blank": self.blank}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Statistics:
        """The inverse of `to_json`."""
        new = cls()
        for name, count in values["counts"].items():
            new.counts[name] = collections.Counter({int(v) if _COUNTS[name] else v: n for v, n in count.items()})
        new.resized, new.blank = values["resized"], values["blank"]
        return new

    def summary(self) -> dict[str, Any]:
        """What a manifest says: numbers, and distributions as `distribution` gives them."""
        counts = self.counts
        return {
            "records": self.records,
            "dropped": {reason: counts["dropped"][reason] for reason in REASONS if counts["dropped"][reason]},
            "captions": {
                "number": counts["characters"].total(),
                "blank_left_out": self.blank,
                "per_record": distribution(counts["captions_per_record"]),
                "characters": distribution(counts["characters"]),
            },
            "pictures": {
                "formats": _common(counts["format"]),
                "resized": self.resized,
                **{name: distribution(counts[name]) for name in ("width", "height", "kibibytes")},
            },
            "labels": {"number": len(counts["label"]), "most_common": _common(counts["label"])},
            "styles": {"number": len(counts["style"]), "most_common": _common(counts["style"])},
        }


def _common(count: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(count.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN])


def distribution(count: collections.Counter[int]) -> dict[str, float]:
    """Mean, least, largest, and percentiles: the smallest value that at least so many per cent do not exceed.

    An empty dictionary where nothing was counted.
    """
    if not count:
        return {}
    values = np.array(sorted(count), np.int64)
    numbers = np.array([count[v] for v in values.tolist()], np.int64)
    upto = np.cumsum(numbers)
    total = int(upto[-1])
    ranks = [max(1, -(-total * p // 100)) for p in PERCENTILES]
    at = {f"p{p}": int(values[np.searchsorted(upto, rank)]) for p, rank in zip(PERCENTILES, ranks, strict=True)}
    mean = round(float((values * numbers).sum() / total), 2)
    return {"mean": mean, "min": int(values[0]), **at, "max": int(values[-1])}


def token_statistics(captions: Iterable[str], tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Tokens of captions (bos and eos counted), and the share of captions that `length` cuts off.

    Args:
      captions: of which they are taken.
      tokenizer: makes the tokens.
      length: tokens that a model reads.
    """
    count: collections.Counter[int] = collections.Counter()
    characters = 0
    for caption in captions:
        count[count_tokens(caption, tokenizer)] += 1
        characters += len(caption)
    captions_seen, tokens = count.total(), sum(n * k for n, k in count.items())
    cut = sum(k for n, k in count.items() if n > length)
    return {
        "normalization": tokenizer.normalization,
        "captions": captions_seen,
        "length": length,
        "truncated": round(cut / captions_seen, 6) if captions_seen else 0.0,
        "characters_per_token": round(characters / max(1, tokens - 2 * captions_seen), 3),
        "tokens": distribution(count),
    }


def count_tokens(caption: str, tokenizer: Tokenizer) -> int:
    """Tokens of a caption, bos and eos counted, however many there are."""
    length = 256
    while True:
        ids = tokenizer.encode(caption, length)
        tokens = int(np.argmax(ids[1:] == tokenizer.eos_id)) + 2  # in some vocabularies bos is eos
        if tokens < length:
            return tokens
        length *= 4
