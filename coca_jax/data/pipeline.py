"""The input pipeline, as a Grain graph: source -> augmented examples -> shuffle -> process's share -> batches -> mesh.

Everything up to the batches is a MapDataset, a pure function of the position: it can be asked for any example, its
state is one number, and the number of threads or worker processes changes nothing in what comes out.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from coca_jax import config
from coca_jax.data import images
from coca_jax.data.records import DataError
from coca_jax.data.sources import Source
from coca_jax.data.tokenizer import Tokenizer

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Read:
    """Index -> one example, without chance unless an rng is given. A class, so that worker processes can be sent it."""

    source: Source
    tokenizer: Tokenizer
    data: config.Data
    image_size: int
    length: int

    def train(self, index: int, rng: np.random.Generator) -> Batch:
        record = self.source[index]
        try:
            pixels = images.decode(record.image, self.data.background, images.crop_min_side(self.image_size, self.data))
        except DataError as error:
            raise DataError(f"{self.source.name}: record {index} ({record.key}): {error}") from error
        caption = record.captions[rng.integers(len(record.captions)) if len(record.captions) > 1 else 0]
        return {
            "images": images.augment(pixels, self.image_size, rng, self.data),
            "tokens": self.tokenizer.encode(caption, self.length),
            "index": np.int64(index),
        }

    def evaluate(self, index: int) -> Batch:
        if index >= len(self.source):  # fills the last batch
            return {
                "images": np.zeros((self.image_size, self.image_size, 3), np.uint8),
                "tokens": np.full(self.length, self.tokenizer.pad_id, np.int32),
                "index": np.int64(-1),
                "valid": np.bool_(False),
            }
        record = self.source[index]
        try:
            pixels = images.decode(record.image, self.data.background, self.image_size)
        except DataError as error:
            raise DataError(f"{self.source.name}: record {index} ({record.key}): {error}") from error
        return {
            "images": images.fit(pixels, self.image_size, self.data.eval_crop),
            "tokens": self.tokenizer.encode(record.captions[0], self.length),
            "index": np.int64(index),
            "valid": np.bool_(True),
        }


def train_examples(
    source: Source, tokenizer: Tokenizer, data: config.Data, *, image_size: int, length: int, seed: int
) -> grain.MapDataset:
    """The unshuffled examples: element `epoch * len(source) + index` is that record as that epoch sees it.

    Grain seeds the generator of each element by (seed, that number), so that an example met in training can be made
    again alone, whatever the batch size, the processes and the workers were.
    """
    read = _Read(source, tokenizer, data, image_size, length)
    indices = grain.MapDataset.range(len(source))
    return indices.seed(seed).random_map(read.train)


def train_loader(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Training batches of this process, without end.

    Every epoch is shuffled anew over the whole source; batches run across the ends of epochs, so that all are full. The
    batches of all processes of a step together are `batch_size` consecutive positions of one shuffled stream, whatever
    process_count is.

    Args:
      source: what to read.
      tokenizer: makes ids of the captions.
      data: augmentation, workers, threads.
      image_size: side of the pictures, pixels.
      length: tokens of a caption.
      batch_size: global.
      seed: of shuffle, captions and augmentation, 0 .. 2^32 - 1.
      process_index: which share is read here.
      process_count: how many processes share a batch.

    Returns:
      Of `{"images": uint8 [b, image_size, image_size, 3], "tokens": int32 [b, length], "index": int64 [b]}`, with
      b = batch_size / process_count and index the number of the record in the source. The iterator's `get_state` and
      `set_state` resume exactly; a state fits only the same data.workers (see `position_key`).

    Raises:
      DataError: batch_size is not divisible by process_count.
    """
    local = _local_batch(batch_size, process_count)
    examples = train_examples(source, tokenizer, data, image_size=image_size, length=length, seed=seed)
    dataset = examples.shuffle().repeat(None)
    # Taken after the shuffle, so that the shares of a step make up one global batch.
    dataset = dataset.slice(slice(process_index, None, process_count)) if process_count > 1 else dataset
    return _batches(dataset, local, data)


def eval_batches(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """One pass over the source in order, without augmentation and with the first caption of each record.

    Arguments and result as `train_loader`, and `"valid": bool [b]`: the last batch is filled up with examples that are
    not valid (black, all pad, index -1), so that all batches, and those of all processes, have one shape.
    """
    local = _local_batch(batch_size, process_count)
    read = _Read(source, tokenizer, data, image_size, length)
    total = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(total).map(read.evaluate)
    dataset = dataset.slice(slice(process_index, None, process_count)) if process_count > 1 else dataset
    return _batches(dataset, local, data)


def position_key(source: Source, data: config.Data, *, batch_size: int, seed: int) -> dict[str, Any]:
    """What an iterator's state is only good for. Store it with the state, and compare before `set_state`.

    Grain would load a state into a loader of another number of workers without an error, and read other records.
    """
    return {
        "source": source.fingerprint(),
        "records": len(source),
        "workers": data.workers,
        "batch_size": batch_size,
        "seed": seed,
    }


def place(loader: grain.IterDataset, sharding: jax.sharding.Sharding, prefetch: int = 2) -> grain.IterDataset:
    """Batches on the mesh, ahead of the step: a thread places `prefetch` of them while the step runs.

    Args:
      loader: host-local batches; those of all processes together are the global batch.
      sharding: of the batch axis, the same on every process.
      prefetch: batches placed ahead; 0 places each when it is asked for.

    Returns:
      The same batches as global jax arrays `[batch_size, ...]`, but for `"index"`, which stays a host-local numpy array
      (it is for people and reports, and jax would cut its 64 bits). The iterator's state is that of the batches handed
      out, not of those placed ahead.
    """

    def to_mesh(batch: Batch) -> Batch:
        return {
            key: value if key == "index" else jax.make_array_from_process_local_data(sharding, value)
            for key, value in batch.items()
        }

    return grain.experimental.ThreadPrefetchIterDataset(loader.map(to_mesh), prefetch_buffer_size=prefetch)


def _local_batch(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        near = max(1, batch_size // process_count) * process_count
        raise DataError(
            f"config.batch_size={batch_size} is not divisible by the {process_count} processes; near it: "
            f"{near}, {near + process_count}"
        )
    return batch_size // process_count


def _batches(dataset: grain.MapDataset, batch_size: int, data: config.Data) -> grain.IterDataset:
    # Batched as a MapDataset: batching after the workers would let their number change the order.
    batched = dataset.batch(batch_size, drop_remainder=True)
    threads = data.threads or max(1, min(16, 2 * (os.cpu_count() or 1) // max(1, data.workers)))
    # Each thread makes one batch at a time; a longer buffer would only hold memory.
    loader = batched.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts workers, also where no absl.app runs
            flags.FLAGS.mark_as_parsed()
        loader = loader.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2))
    return loader
