"""What a conversion is going to write: which records go into which shard, and how. It decides every byte."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import grain
from etils import epath

from coca_jax.data import addresses, records
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare.checking import check
from coca_jax.data.prepare.inputs import is_sequential, open_inputs
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources.files import is_remote
from coca_jax.data.tokenizer import Tokenizer

# Raise it with every change of what is written for the same settings: a folder of another version is not gone on with.
FORMAT_VERSION = 1
WORK = ".prepare"  # folder, inside of the result's, of what is needed until the end
_SAMPLE = 200  # records by which the size of the others is judged
_LEAST_PIECES = 260  # of Tokenizer.train: 256 bytes, pad, eos, bos, unk
# Settings that are needed when the shards are there already: until then they may change.
LATE = ("vocab_size", "tokenizer", "length")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
      out: folder of the result. All else decides what lies in it.
      source: specification, see open_inputs.
      fingerprint: of the source.
      records: of the source.
      name: what the shards are called.
      records_per_shard: of the source; a shard holds fewer where some are left out.
      max_side: pixels, 0: pictures stay as they are.
      quality: of JPEG, where a picture is resized.
      shuffle: whether the records come in another order than the source's.
      seed: of that order.
      vocab_size: of the vocabulary to train; 0: none is.
      sample: records whose captions train it, and are counted in tokens.
      tokenizer: file of the vocabulary for counting tokens, where none is trained; may be empty.
      length: tokens that a model reads, for the share of captions that are cut.
      software: versions of the packages that decide the bytes.
    """

    out: str
    source: str
    fingerprint: str
    records: int
    name: str
    records_per_shard: int
    max_side: int
    quality: int
    shuffle: bool
    seed: int
    vocab_size: int
    sample: int
    tokenizer: str
    length: int
    software: dict[str, str]

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.records // self.records_per_shard)

    @property
    def work(self) -> epath.Path:
        """Folder of what is needed until the end."""
        return addresses.path(self.out) / WORK

    def stem(self, shard: int) -> str:
        """Name of a shard without its ending."""
        return f"{self.name}-{shard:05d}-of-{self.shards:05d}"

    def path(self, shard: int) -> epath.Path:
        """File of a shard in the end."""
        return addresses.path(self.out) / f"{self.stem(shard)}.array_record"

    def staged(self, shard: int) -> epath.Path:
        """File of a shard until all are there: nobody shall read a part of the set for the whole.

        In a bucket, where moving is copying, it is `path`.
        """
        return self.path(shard) if is_remote(self.out) else self.work / self.path(shard).name

    def span(self, shard: int) -> range:
        """Positions, in the order of the result, of the records of a shard."""
        start = shard * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.records))

    def indices(self, shard: int) -> Iterator[tuple[int, bool]]:
        """Of each record of a shard: its number in the source, and whether it is in the sample."""
        order = _order(self.records, self.seed) if self.shuffle else range(self.records)
        sample = min(self.sample, self.records)
        for position in self.span(shard):
            # Evenly over the positions: it goes up by one where the next record of the sample is.
            sampled = (position + 1) * sample // self.records > position * sample // self.records
            yield int(order[position]), sampled

    def open(self) -> Mixture:
        """The source. Raises DataError where it is not the one that was planned for."""
        source = open_inputs(self.source)
        if source.fingerprint() != self.fingerprint:
            raise DataError(f"{self.source} has changed since the conversion began: name another --out, and keep it")
        return source

    def settings(self) -> dict[str, Any]:
        """All but the folder: what two conversions must share to be the same."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "out"} | {"format_version": FORMAT_VERSION}

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int) -> grain.MapDataset:
    """A permutation that is computed where it is asked for: one of billions of records takes no memory."""
    return grain.MapDataset.range(count).shuffle(seed=seed)


def make(
    source: str,
    out: str,
    *,
    name: str,
    records_per_shard: int,
    shard_size: int,
    max_side: int,
    quality: int,
    shuffle: bool,
    seed: int,
    vocab_size: int,
    sample: int,
    tokenizer: str,
    length: int,
) -> Plan:
    """Plans a conversion; arguments as `convert`.

    Raises:
      DataError: the source or the tokenizer cannot be opened, or a setting makes no sense.
    """
    if not re.fullmatch(r"[^./*?\[{\s][^/*?\[{]*", name):
        raise DataError(f"--name={name}: shards cannot be called that; use letters, digits, - and _")
    if 0 < vocab_size <= _LEAST_PIECES:
        raise DataError(f"--vocab_size={vocab_size}: control ids and single bytes alone are {_LEAST_PIECES}; raise it")
    if tokenizer and vocab_size:
        raise DataError(
            f"--tokenizer={tokenizer} counts tokens where none is trained, and --vocab_size={vocab_size} trains one: "
            "leave out one of them"
        )
    if tokenizer:
        Tokenizer(tokenizer)  # says now, not after hours, that it cannot be read
    inputs = open_inputs(source)
    if shuffle and is_sequential(inputs):
        raise DataError(f"{source}: gzipped files can only be read in order: unpack them, or leave out --shuffle")
    if not records_per_shard:
        records_per_shard = max(1, min(len(inputs), int(shard_size // _mean_size(inputs, max_side, quality))))
    packages = ["array-record", "sentencepiece"]
    packages += ["pillow", "opencv-python-headless", "simplejpeg"] if max_side else []
    return Plan(
        out=out,
        source=source,
        fingerprint=inputs.fingerprint(),
        records=len(inputs),
        name=name,
        records_per_shard=records_per_shard,
        max_side=max_side,
        quality=quality,
        shuffle=shuffle,
        seed=seed,
        vocab_size=vocab_size,
        sample=sample,
        tokenizer=tokenizer,
        length=length,
        software={package: importlib.metadata.version(package) for package in packages},
    )


def _mean_size(inputs: Mixture, max_side: int, quality: int) -> float:
    """Bytes of a record as it will be written, from some of them."""
    sizes = []
    step = math.ceil(len(inputs) / _SAMPLE)
    for index in range(0, len(inputs), step):
        try:
            record = inputs[index]
            if max_side:
                record = check(record, max_side, quality).record
            sizes.append(len(records.pack(record, 0, 0)))
        except BadExample:
            continue
    return sum(sizes) / len(sizes) if sizes else 1.0
