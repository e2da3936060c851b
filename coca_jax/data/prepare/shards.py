"""One shard: a range of the source's records, checked and written. The same function on every machine."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from array_record.python import array_record_module
from etils import epath

from coca_jax.data import records
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import files
from coca_jax.data.prepare.checking import Checked, Dropped, check, in_words
from coca_jax.data.prepare.inputs import is_sequential
from coca_jax.data.prepare.plan import Plan
from coca_jax.data.prepare.statistics import Statistics
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources.base import one_line

STOP, DROP = "stop", "drop"
T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class Part:
    """What is known of a finished shard.

    Attributes:
      records: in it.
      bytes: of its file.
      sha256: of its file.
      statistics: of its records.
      dropped: records of its range that are not in it.
      captions: of those of its records that are in the sample.
      keys: uint64 `[records]`, a hash of each key, in the order of the records.
      indices: int64 `[records]`, the number of each in the source.
    """

    records: int
    bytes: int
    sha256: str
    statistics: Statistics
    dropped: list[Dropped]
    captions: list[str]
    keys: np.ndarray
    indices: np.ndarray


def process(
    plan: Plan, shard: int, bad: str, progress: Callable[[int], None] = lambda records: None, threads: int = 1
) -> int:
    """Writes a shard, unless it is there already and whole; returns how many records of its range are left out.

    Args:
      plan: what to write.
      shard: its number.
      bad: DROP leaves a record out that cannot be used; STOP raises.
      progress: is told how many records of the source have been seen since it was told last.
      threads: that read and check records ahead. They decide nothing about the result.

    Raises:
      DataError: the source is damaged or has changed, the shard cannot be written, or `bad` is STOP and a record is.
    """
    if (done := finished(plan, shard)) is not None:
        progress(len(plan.span(shard)))
        return len(done.dropped)
    part = Part(0, 0, "", Statistics(), [], [], np.zeros(0, np.uint64), np.zeros(0, np.int64))
    source = plan.open()
    threads = 1 if is_sequential(source) else threads
    outcomes = _ahead(lambda item: _outcome(plan, source, *item), plan.indices(shard), threads)
    seen: list[tuple[int, int]] = []  # hash of the key, number in the source
    with files.whole(plan.staged(shard), plan.work) as temporary:
        part.records = records.write(temporary, _packed(outcomes, bad, part, seen, progress))
        _read_back(temporary, part.records)
        part.bytes = temporary.stat().st_size
        part.sha256 = files.sha256(temporary)
    part.keys, part.indices = np.array([k for k, _ in seen], np.uint64), np.array([i for _, i in seen], np.int64)
    _note(plan, shard, part)
    return len(part.dropped)


class _Outcome(NamedTuple):
    """Of one record: its number in the source, whether it is in the sample, and what was found."""

    number: int
    sampled: bool
    found: Checked | Dropped


def _outcome(plan: Plan, source: Mixture, index: int, sampled: bool) -> _Outcome:
    key: object = None
    try:
        record = source[index]
        key = record.key
        return _Outcome(index, sampled, check(record, plan.max_side, plan.quality))
    except BadExample as error:
        printable = key.encode(errors="backslashreplace").decode() if isinstance(key, str) else None
        return _Outcome(index, sampled, Dropped(index, printable, error.reason, in_words(error)))
    except (OSError, RuntimeError) as error:  # else it would pass for one of writing
        raise DataError(f"{source.name}: record {index} cannot be read: {one_line(error)}") from error


def _ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The function of every item, in order; with several threads some of them ahead."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _packed(
    outcomes: Iterable[_Outcome], bad: str, part: Part, seen: list[tuple[int, int]], progress: Callable[[int], None]
) -> Iterator[bytes]:
    """What is written of the records; counts them on the way."""
    for number, sampled, found in outcomes:
        if isinstance(found, Dropped):
            if bad == STOP:
                said = f"record {number}: {found.reason}: {found.message}"
                raise DataError(f"{said}; --bad=drop leaves such records out")
            part.statistics.drop(found.reason)
            part.dropped.append(found)
        else:
            part.statistics.add(found)
            seen.append((key_hash(found.record.key), number))
            if sampled:
                part.captions.extend(found.record.captions)
            yield records.pack(found.record, found.width, found.height)
        progress(1)


def key_hash(key: str) -> int:
    """64 bits of a key. Among a billion keys, two share theirs by chance with a probability of 3%."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _read_back(path: Path, wanted: int) -> None:
    """The end of the file says how many records there are: it must be there."""
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
        found = reader.num_records()
    finally:
        reader.close()
    if found != wanted:
        raise OSError(f"{found} records can be read back of {wanted}")


# ---------------------------------------------------------------------------------------------------------------------
# Notes about finished shards


def _note(plan: Plan, shard: int, part: Part) -> None:
    """Writes what is known of a shard beside it. The JSON comes last: with it the shard is finished."""
    numbers = io.BytesIO()
    np.save(numbers, np.stack([part.keys, part.indices.view(np.uint64)]), allow_pickle=False)
    files.write(plan.work / f"{plan.stem(shard)}.npy", numbers.getvalue(), plan.work)
    values = {
        "records": part.records,
        "bytes": part.bytes,
        "sha256": part.sha256,
        "statistics": part.statistics.to_json(),
        "dropped": [dataclasses.asdict(dropped) for dropped in part.dropped],
        "captions": part.captions,
    }
    files.write_json(note_path(plan, shard), values, plan.work)


def note_path(plan: Plan, shard: int) -> epath.Path:
    """The file whose presence says that the shard is finished."""
    return plan.work / f"{plan.stem(shard)}.json"


def finished(plan: Plan, shard: int) -> Part | None:
    """What is known of a shard, if it is finished and its file is the one that was written (by its SHA-256)."""
    part = read_note(plan, shard)
    path = plan.staged(shard) if plan.staged(shard).is_file() else plan.path(shard)
    if part is None or not path.is_file() or path.stat().length != part.bytes or files.sha256(path) != part.sha256:
        return None
    return part


def read_note(plan: Plan, shard: int) -> Part | None:
    """What is known of a shard, without a look at its file; None where it is not finished."""
    path = note_path(plan, shard)
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        with (plan.work / f"{plan.stem(shard)}.npy").open("rb") as file:
            keys, indices = np.load(io.BytesIO(file.read()), allow_pickle=False)
        return Part(
            values["records"],
            values["bytes"],
            values["sha256"],
            Statistics.from_json(values["statistics"]),
            [Dropped(**dropped) for dropped in values["dropped"]],
            values["captions"],
            keys,
            indices.view(np.int64),
        )
    except (OSError, ValueError, KeyError, TypeError):  # damaged: as good as none
        return None
