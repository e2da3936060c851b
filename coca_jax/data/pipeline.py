"""The input pipeline, as a Grain graph: sources -> augmented examples -> shuffle -> mixture -> rows -> batches -> mesh.

Everything up to the batches is a MapDataset, a pure function of the position: it can be asked for any example, and the
number of threads, worker processes or hosts changes nothing in what comes out. A place in the data is one number.

An example that cannot be used is replaced by another of its source, drawn from its own random numbers: the batch is
full on every host, and the same at every reading. It says so under "problem".
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Any, SupportsIndex

import grain
import jax
import numpy as np

from coca_jax import config
from coca_jax.data import images, label_names, readers
from coca_jax.data.classes import PAIRS, Task
from coca_jax.data.mixture import Mixture, Schedule, Segment
from coca_jax.data.records import REASONS, BadExample, DataError, Record
from coca_jax.data.sources import Source
from coca_jax.data.tokenizer import Tokenizer

Batch = dict[str, Any]

HOST_KEYS = ("index", "reason", "valid", "bad")  # of a batch: what stays with the host
_REPLACEMENTS = 100  # tries to find an example that can be used: if so many in a row cannot, something else is wrong


@dataclasses.dataclass(frozen=True)
class _Read:
    """Index -> one example, without chance unless an rng is given. A class, so that worker processes can be sent it."""

    source: Source
    tokenizer: Tokenizer
    data: config.Data
    image_size: int
    length: int
    task: Task = PAIRS

    def train(self, index: int, rng: np.random.Generator) -> Batch:
        chosen, problem, first = index, 0, ""
        for _ in range(_REPLACEMENTS):
            try:
                with readers.reading(self.source.name, chosen):
                    example = self._augmented(chosen, rng)
            except BadExample as error:
                problem, first = problem or _code(error), first or str(error)
                chosen = int(rng.integers(len(self.source)))
            else:
                return example | {"index": np.int64(index), "problem": np.int8(problem)}
        raise DataError(
            f"{self.source.name}: record {index} cannot be used ({first}), nor can {_REPLACEMENTS - 1} others that "
            "were to replace it: see what is there with `python -m coca_jax.data.prepare describe`"
        )

    def _augmented(self, index: int, rng: np.random.Generator) -> Batch:
        record, task = self._record(index), self.task
        example: Batch = {"labels": np.int32(task.number(record))} if task.labels else {}
        captions = [caption for caption in record.captions if caption.strip()]
        if task.texts and not captions:
            why = label_names.why_no_caption(record.label)
            raise BadExample("no_caption", f"{self.source.name}: record {index} ({record.key}): {why}")
        tokens = np.full(self.length, self.tokenizer.pad_id, np.int32)
        if task.texts:
            caption = captions[rng.integers(len(captions)) if len(captions) > 1 else 0]
        if task.frames > 1:
            frames = task.chosen(record, rng)
            drawn = int(rng.integers(2**63))  # all frames of a clip are augmented alike
            pixels = [
                images.decode_and_augment(frame, self.image_size, np.random.default_rng(drawn), self.data)
                for frame in frames
            ]
            example["images"] = np.stack(pixels)
        else:
            example["images"] = images.decode_and_augment(record.image, self.image_size, rng, self.data)
        if task.texts:
            tokens = self.tokenizer.encode(caption, self.length, rng=rng, sampling=self.data.subword_sampling)
        return example | {"tokens": tokens}

    def _record(self, index: int) -> Record:
        record = self.source[index]
        if not record.image:
            raise BadExample("empty", f"{self.source.name}: record {index} ({record.key}) has an empty picture")
        return record

    def evaluate(self, index: int) -> Batch:
        frames = self.task.frames
        blank = {
            "images": np.zeros((*((frames,) if frames > 1 else ()), self.image_size, self.image_size, 3), np.uint8),
            "tokens": np.full(self.length, self.tokenizer.pad_id, np.int32),
        }
        if index >= len(self.source):  # fills the last batch
            return blank | {"problem": np.int8(0)}
        try:
            with readers.reading(self.source.name, index):
                record = self._record(index)
                fit = images.Preprocessor.from_config(self.image_size, self.data)
                pixels = fit.pixels(self.task.chosen(record)) if frames > 1 else fit.pixels([record.image])[0]
        except BadExample as error:
            return blank | {"problem": np.int8(_code(error))}
        caption = next((caption for caption in record.captions if caption.strip()), None)
        return {
            "images": pixels,
            "tokens": blank["tokens"] if caption is None else self.tokenizer.encode(caption, self.length),
            "problem": np.int8(0),
        }


def _code(error: BadExample) -> int:
    return 1 + list(REASONS).index(error.reason)


def train_examples(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    length: int,
    seed: int,
    task: Task = PAIRS,
) -> grain.MapDataset:
    """The unshuffled examples: element `epoch * len(source) + index` is that record as that epoch sees it.

    Grain seeds the generator of each element by (seed, that number), so that an example met in training can be made
    again alone, whatever the batch size, the processes and the workers were.
    """
    read = _Read(source, tokenizer, data, image_size, length, task)
    indices = grain.MapDataset.range(len(source))
    return indices.seed(seed).random_map(read.train)


def source_seed(seed: int, number: int) -> int:
    """The seed of a source of a mixture, by its place: two sources of one size must not be shuffled alike."""
    return seed if not number else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def train_loader(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    length: int,
    batch_size: int,
    seed: int,
    schedule: Schedule | None = None,
    rows: np.ndarray | None = None,
    start: int = 0,
    task: Task = PAIRS,
) -> grain.IterDataset:
    """Training batches of this process, without end.

    Every source has epochs of its own, each shuffled anew over the whole source; batches run across their ends, so that
    all are full. Row r of global batch k is position `start + k * batch_size + r` of one stream, which (sources,
    schedule, seed) alone decide: however many processes share the batches, they are the same ones in the same order,
    and the number of the positions that have been handed out is all that there is to remember of a place in the data.

    Args:
      source: what to read; a Mixture is read by its weights.
      tokenizer: makes ids of the captions.
      data: augmentation, workers, threads.
      image_size: side of the pictures, pixels.
      length: tokens of a caption.
      batch_size: global.
      seed: of shuffle, captions and augmentation, 0 .. 2^32 - 1.
      schedule: of the mixture; None: the mixture's weights from the beginning.
      rows: of each global batch that are read here, as `process_rows` tells them; None: all.
      start: position of the stream to begin at.
      task: whether examples have classes, frames, texts.

    Returns:
      Of `{"images": uint8 [b, image_size, image_size, 3], "tokens": int32 [b, length], "index": int64 [b],
      "problem": int8 [b]}`, with b = len(rows), index the number of the record in the source, and problem 0, or, where
      that record could not be used and another stands in its place, 1 + the number of the reason in records.REASONS.
      Of a task with classes also `"labels": int32 [b]`; of clips images are `[b, frames, image_size, image_size, 3]`.
    """
    mixture = source if isinstance(source, Mixture) else Mixture([source], [1.0])
    streams = [
        train_examples(
            part, tokenizer, data, image_size=image_size, length=length, seed=source_seed(seed, number), task=task
        ).shuffle()
        for number, part in enumerate(mixture.sources)
    ]
    mixed = _Mixed(mixture, tuple(streams), schedule or Schedule([Segment(0, mixture.weights)]))
    return _read_ahead(_batched(grain.MapDataset.source(mixed), batch_size, rows, start), data)


def eval_batches(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    length: int,
    batch_size: int,
    rows: np.ndarray | None = None,
    start: int = 0,
    task: Task = PAIRS,
) -> grain.IterDataset:
    """One pass over the source in order, without augmentation and with the first caption of each record.

    Row r of global batch k is record `k * batch_size + r`; arguments as `train_loader`, but that `start` is a
    number of batches that are left out. The last batch is filled up with examples that are not valid (black, all pad),
    so that all batches, and those of all processes, have one shape.

    Returns:
      Images and tokens of the rows that are read here, as `train_loader`, but nothing replaces what cannot be used: its
      picture is black and its tokens are all pad (all pad is also one without a caption). Instead of "problem" there is
      `"bad": int64 [b]`, the index of each such record, else -1. And with B = batch_size
      `"index": int64 [B]` and `"valid": bool [B]` of the whole global batch: every process knows which records the
      others read. The index of an example that is not valid is -1.
    """
    read = _Read(source, tokenizer, data, image_size, length, task)
    total = -(-len(source) // batch_size) * batch_size
    rows = np.arange(batch_size) if rows is None else rows
    batches = _batched(grain.MapDataset.range(total).map(read.evaluate), batch_size, rows, start * batch_size)
    number = functools.partial(_number, batch_size, len(source), rows, start)
    return _read_ahead(batches.map_with_index(number), data)


def _number(batch_size: int, records: int, rows: np.ndarray, start: int, number: int, batch: Batch) -> Batch:
    """The batch with the records of its global batch, which is number `start + number`."""
    index = np.arange((start + number) * batch_size, (start + number + 1) * batch_size, dtype=np.int64)
    valid = index < records
    bad = np.where(batch["problem"] > 0, index[rows], -1)
    kept = {key: value for key, value in batch.items() if key != "problem"}
    return kept | {"bad": bad, "index": np.where(valid, index, -1), "valid": valid}


def position_key(source: Source, *, seed: int) -> dict[str, Any]:
    """What a position of the stream is only good for. Store it with the position, and compare before going on.

    A mixture's weights are not in it: they may change, see Schedule.changed.
    """
    return {"source": source.fingerprint(), "records": len(source), "seed": seed}


def process_rows(sharding: jax.sharding.Sharding, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """The rows of a global batch that the devices of a process hold, int64, ascending, each once.

    Rows belong to devices by their place in the mesh, which follows the network: those of a process need not be
    neighbours, and processes whose devices share a model (tensor parallelism over hosts) hold the same rows.

    Args:
      sharding: of the batch axis.
      batch_size: global; the shards of the batch divide it.
      process_index: this process if None.
    """
    process_index = jax.process_index() if process_index is None else process_index
    places: Any = sharding.devices_indices_map((batch_size,))
    held = {rows.indices(batch_size)[:2] for d, (rows,) in places.items() if d.process_index == process_index}
    return np.concatenate([np.arange(*span) for span in sorted(held)])


def place(
    loader: grain.IterDataset, sharding: jax.sharding.Sharding, batch_size: int, prefetch: int = 2
) -> grain.IterDataset:
    """Batches on the mesh, ahead of the step: a thread places `prefetch` of them while the step runs.

    Args:
      loader: on each process the batches of its `process_rows`.
      sharding: of the batch axis, the same on every process.
      batch_size: global.
      prefetch: batches placed ahead; 0 places each when it is asked for.

    Returns:
      The same batches as global jax arrays `[batch_size, ...]`, but for `"index"`, `"valid"` and `"bad"`, which stay
      numpy arrays (they are for people and reports, and jax would cut the index's 64 bits). `"problem"` becomes a
      global array too, and as `"reason"` stays a numpy array of this process's rows.
    """
    rows = process_rows(sharding, batch_size)

    def to_mesh(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(batch_size)
            at = int(np.searchsorted(rows, first))
            return local[at : at + end - first]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    def to_meshes(batch: Batch) -> Batch:
        placed = {key: value if key in HOST_KEYS else to_mesh(value) for key, value in batch.items()}
        return placed | ({"reason": batch["problem"]} if "problem" in batch else {})

    return grain.experimental.ThreadPrefetchIterDataset(loader.map(to_meshes), prefetch_buffer_size=prefetch)


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """The stream of a mixture, without end; a source of its own for Grain."""

    mixture: Mixture
    streams: tuple[grain.MapDataset, ...]
    schedule: Schedule

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Batch:
        source, element = self.schedule.at(index.__index__())
        example = self.streams[source][element]
        return example | {"index": np.int64(self.mixture.index(source, int(example["index"])))}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Those rows of consecutive batches of a dataset, one after another; a source of its own for Grain."""

    dataset: grain.MapDataset
    batch_size: int
    rows: np.ndarray
    start: int

    def __len__(self) -> int:
        return (len(self.dataset) - self.start) // self.batch_size * len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        batch, row = divmod(index.__index__(), len(self.rows))
        return self.dataset[self.start + batch * self.batch_size + int(self.rows[row])]


def _batched(
    dataset: grain.MapDataset, batch_size: int, rows: np.ndarray | None = None, start: int = 0
) -> grain.MapDataset:
    # Batched as a MapDataset: batching after the workers would let their number change the order.
    rows = np.arange(batch_size) if rows is None else rows
    return grain.MapDataset.source(_Rows(dataset, batch_size, rows, start)).batch(len(rows), drop_remainder=True)


def _read_ahead(batches: grain.MapDataset, data: config.Data) -> grain.IterDataset:
    threads = data.threads or max(1, min(16, 2 * (os.cpu_count() or 1) // max(1, data.workers)))
    # Each thread makes one batch at a time; a longer buffer would only hold memory.
    loader = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    return readers.in_processes(loader, data) if data.workers else loader
