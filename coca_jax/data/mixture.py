"""Several sources as one stream: which source each position reads, and which of its examples.

    0.5 * array_record:/web/*.array_record + 0.5 * tfds:imagenet2012

The stream is a function of the position: nothing is drawn, nothing is counted while reading, and any place of it can be
asked for. Weights may change at a position; what was read before stays what it was.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from coca_jax.data.records import DataError, Record
from coca_jax.data.sources import Source, content, open_source

# Positions come in blocks in which every source has its share exactly. Inside a block they follow multiples of the odd
# number nearest to BLOCK / golden ratio, modulo BLOCK: any run of positions, and every n-th of them, holds every source
# by its weight, to a few examples. So does every batch, and every host's part of it.
BLOCK = 1 << 16
_STEP = 40503


class Mixture:
    """Sources and their weights. It is itself a source: the records of all, one source after the other.

    Attributes:
      sources: what is mixed.
      weights: shares of the stream, which sum to 1.
      name, tokenizer_path, attribution, class_names: see Source; of the first source that has one.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.name = " + ".join(source.name for source in sources)
        self._offsets = np.cumsum([0, *(len(source) for source in sources)])
        found = [source.tokenizer_path for source in sources if source.tokenizer_path]
        self.tokenizer_path: epath.Path | None = found[0] if found else None
        self.attribution = "\n".join(dict.fromkeys(source.attribution for source in sources if source.attribution))
        self.remarks = [remark for source in sources for remark in getattr(source, "remarks", ())]
        names = [source.class_names for source in sources if source.class_names]
        self.class_names: Mapping[str, Sequence[str]] | None = names[0] if names else None

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: SupportsIndex) -> Record:
        source, element = self.locate(index.__index__())
        return self.sources[source][element]

    def __repr__(self) -> str:
        return f"Mixture({self.name})"

    def fingerprint(self) -> str:
        """See Source; the weights are not in it, which may change."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint()
        return hashlib.sha256("\n".join(s.fingerprint() for s in self.sources).encode()).hexdigest()[:16]

    def contents(self) -> dict[str, str]:
        """See Source; each name is preceded by the specification of its source."""
        return {f"{s.name}: {name}": value for s in self.sources for name, value in content.of_source(s).items()}

    def epochs(self, counts: Sequence[int]) -> dict[str, float]:
        """`data/epochs/NUMBER`, passes over each source after so many of its examples; of one `data/epochs`."""
        names = [f"data/epochs/{n}" for n in range(len(counts))] if len(counts) > 1 else ["data/epochs"]
        return {n: count / len(s) for n, count, s in zip(names, counts, self.sources, strict=True)}

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a record, and the record's number in it."""
        source = bisect.bisect_right(self._offsets, index) - 1
        return source, index - int(self._offsets[source])

    def index(self, source: int, element: int) -> int:
        """The inverse of `locate`."""
        return int(self._offsets[source]) + element


def open_mixture(spec: str) -> Mixture:
    """Opens one source, or several with ` + ` between them, each with `weight * ` before it or none.

    Without weights every record counts the same: a source has the share of its size.

    Raises:
      DataError: a source cannot be opened, or the weights are not all given or all left out, or one is not above 0.
    """
    parts = read_spec(spec)
    specs, given = list(parts), [weight for weight in parts.values() if weight is not None]
    sources = [open_source(s) for s in specs]
    shares = np.array(given or [len(source) for source in sources], float)
    mixture = Mixture(sources, tuple((shares / shares.sum()).tolist()))
    Schedule([Segment(0, mixture.weights)])  # says it now if a weight is too small
    return mixture


def read_spec(spec: str) -> dict[str, float | None]:
    """The sources that a specification names, in their order, and their weights.

    Raises:
      DataError: as `open_mixture`.
    """
    found: dict[str, float | None] = {}
    for part in re.split(r"(?:^|\s)\+(?:\s|$)", spec.strip()):
        split = re.fullmatch(r"\s*(?:(\S+)\s*\*\s+)?(\S.*?)\s*", part)
        if split is None:
            raise DataError(f"sources {spec!r}: nothing stands beside a +; write A + B, or 0.7 * A + 0.3 * B")
        weight, source = split.groups()
        if source in found:
            raise DataError(f"sources {spec!r}: {source} stands there twice: name it once, with the sum of its weights")
        try:
            found[source] = None if weight is None else float(weight)
        except ValueError:
            raise DataError(f"sources {spec!r}: {weight!r} before {source} is not a weight: write 0.7 * A") from None
    given = [weight for weight in found.values() if weight is not None]
    if given and len(given) < len(found):
        raise DataError(f"sources {spec!r}: some have a weight and some have none: give all of them one")
    if not all(0 < weight < float("inf") for weight in given):
        raise DataError(f"sources {spec!r}: every weight must be more than 0; leave a source out instead")
    return found


@dataclasses.dataclass(frozen=True)
class Segment:
    """From position `start` on, the sources are read by these weights, which sum to 1."""

    start: int
    weights: tuple[float, ...]


class Schedule:
    """Position of the stream -> source, and how many of that source's examples came before.

    Args:
      segments: the first starts at 0; starts rise.

    Raises:
      DataError: a weight is less than 1 / BLOCK.
    """

    def __init__(self, segments: Sequence[Segment]):
        self.segments = tuple(segments)
        self._starts = [segment.start for segment in segments]
        self._counts = [np.zeros(len(segments[0].weights), np.int64)]  # of each source, before each segment
        for segment, stop in zip(segments, self._starts[1:], strict=False):
            self._counts.append(self._counts[-1] + _counted(segment.weights, stop - segment.start))
        _table(segments[-1].weights)

    def at(self, position: int) -> tuple[int, int]:
        """The source that a position reads, and the number of that source's examples before it."""
        number = bisect.bisect_right(self._starts, position) - 1
        owners, ranks, per_block = _table(self.segments[number].weights)
        block, rest = divmod(position - self._starts[number], BLOCK)
        source = int(owners[rest])
        before = int(self._counts[number][source]) + block * int(per_block[source]) + int(ranks[rest])
        return source, before

    def counts(self, position: int) -> list[int]:
        """How many examples of each source the positions before this one read."""
        number = max(0, bisect.bisect_left(self._starts, position) - 1)
        segment = self.segments[number]
        return (self._counts[number] + _counted(segment.weights, position - segment.start)).tolist()

    def changed(self, position: int, weights: Sequence[float]) -> Schedule:
        """The schedule that goes on with other weights from a position on; itself where they are the same."""
        if tuple(weights) == self.segments[-1].weights:
            return self
        kept = [segment for segment in self.segments if segment.start < position]
        return Schedule([*kept, Segment(position, tuple(weights))])

    def to_json(self) -> list[Any]:
        """In plain values."""
        return [[segment.start, list(segment.weights)] for segment in self.segments]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Schedule:
        """The inverse of `to_json`."""
        return cls([Segment(int(start), tuple(float(w) for w in weights)) for start, weights in values])


def _counted(weights: tuple[float, ...], positions: int) -> np.ndarray:
    owners, _, per_block = _table(weights)
    blocks, rest = divmod(positions, BLOCK)
    return blocks * per_block + np.bincount(owners[:rest], minlength=len(weights))


@functools.lru_cache(maxsize=64)
def _table(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each place of a block its source, and how many of that source come before; and how many each source has."""
    bounds = np.rint(np.cumsum(weights) / np.sum(weights) * BLOCK).astype(np.int64)
    per_block = np.diff(bounds, prepend=0)
    if (per_block < 1).any():
        small = weights[int(np.argmin(per_block))]
        raise DataError(
            f"a source's share of the mixture is {small:.2g}, less than 1 / {BLOCK}: raise it or leave it out"
        )
    owners = np.searchsorted(bounds, np.arange(BLOCK) * _STEP % BLOCK, side="right").astype(np.int32)
    ranks = np.empty(BLOCK, np.int32)
    for source, size in enumerate(per_block):
        ranks[owners == source] = np.arange(size)
    return owners, ranks, per_block
