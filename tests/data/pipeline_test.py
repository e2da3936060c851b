"""The Grain pipeline: epochs, shares, exact resumption, placement. Real files, real worker processes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from coca_jax import config
from coca_jax.data import images, pipeline, records
from coca_jax.data.records import DataError, Record
from coca_jax.data.sources import open_source

ROOT = Path(__file__).parents[2]
SIZE = 37  # records of `small`
BATCH = 8
LENGTH = 32
DATA = config.Data(
    crop_area=(0.4, 1.0), flip=True, color_jitter=0.3, hue_jitter=0.1, grayscale=0.1, rotate=10.0, blur=0.3, threads=2
)


@pytest.fixture
def load(small, small_tokenizer):
    """The training loader of the small source."""

    def make(data: config.Data = DATA, **changes) -> grain.IterDataset:
        options = {"image_size": 24, "length": LENGTH, "batch_size": BATCH, "seed": 3, **changes}
        return pipeline.train_loader(small, small_tokenizer, data, **options)

    return make


def take(loader, count: int) -> list:
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def assert_same(batches, others) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_shapes_and_types(load):
    (batch,) = take(load(), 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "images": ((BATCH, 24, 24, 3), "uint8"),
        "tokens": ((BATCH, LENGTH), "int32"),
        "index": ((BATCH,), "int64"),
        "problem": ((BATCH,), "int8"),
    }


def test_every_epoch_is_a_new_permutation(load):
    stream = np.concatenate([batch["index"] for batch in take(load(), 3 * SIZE // BATCH + 1)])
    epochs = [stream[i * SIZE : (i + 1) * SIZE].tolist() for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(SIZE))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


def test_tokens_and_colours_belong_to_the_record(load, small, small_tokenizer):
    data = dataclasses.replace(DATA, color_jitter=0.0, hue_jitter=0.0, grayscale=0.0, rotate=0.0)
    captions: dict[int, set[str]] = {}
    for batch in take(load(data), 12):
        for pixels, tokens, index in zip(batch["images"], batch["tokens"], batch["index"], strict=True):
            record = small[int(index)]
            text = small_tokenizer.decode(tokens)
            assert text in record.captions
            captions.setdefault(int(index), set()).add(text)
            middle = images.decode(record.image).mean((0, 1))
            np.testing.assert_allclose(pixels.mean((0, 1)), middle, atol=12)
    assert any(len(texts) == 2 for texts in captions.values())  # both captions are drawn in time


def test_any_example_can_be_made_again_alone(load, small, small_tokenizer):
    stream = take(load(), 2 * SIZE // BATCH + 1)
    examples = pipeline.train_examples(small, small_tokenizer, DATA, image_size=24, length=LENGTH, seed=3)
    positions = np.concatenate([batch["index"] for batch in stream])
    pixels = np.concatenate([batch["images"] for batch in stream])
    tokens = np.concatenate([batch["tokens"] for batch in stream])
    for position in range(0, 2 * SIZE, 5):
        epoch = position // SIZE
        again = examples[epoch * SIZE + int(positions[position])]
        np.testing.assert_array_equal(again["images"], pixels[position])
        np.testing.assert_array_equal(again["tokens"], tokens[position])


def test_augmentation_differs_between_epochs_and_seeds(small, small_tokenizer):
    first, other = (
        pipeline.train_examples(small, small_tokenizer, DATA, image_size=24, length=16, seed=seed) for seed in (0, 1)
    )
    assert (first[5]["images"] != first[SIZE + 5]["images"]).any()
    assert first[5]["index"] == first[SIZE + 5]["index"] == 5
    assert (first[5]["images"] != other[5]["images"]).any()


def test_seed_decides(load):
    assert_same(take(load(seed=7), 3), take(load(seed=7), 3))
    one, other = take(load(seed=7), 1), take(load(seed=8), 1)
    assert (one[0]["index"] != other[0]["index"]).any()


def test_threads_change_nothing(load):
    batches = take(load(dataclasses.replace(DATA, threads=1)), 7)
    assert_same(batches, take(load(dataclasses.replace(DATA, threads=4)), 7))


# Of two hosts and of four, whose rows are neighbours; of two whose devices alternate in the mesh, as on a torus.
SHARES = {
    "2": np.arange(BATCH).reshape(2, -1),
    "4": np.arange(BATCH).reshape(4, -1),
    "alternating": np.array([[0, 1, 4, 5], [2, 3, 6, 7]]),
}


@pytest.mark.parametrize("rows", SHARES.values(), ids=SHARES)
def test_processes_share_the_global_batch(load, rows):
    steps = 2 * SIZE // BATCH
    shares = [take(load(rows=its), steps) for its in rows]
    merged = []
    for parts in zip(*shares, strict=True):
        assert all(len(part["index"]) == len(its) for part, its in zip(parts, rows, strict=True))
        order = np.argsort(np.concatenate(rows))
        merged.append({key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]})
    assert_same(merged, take(load(), steps))  # the same pictures in the same order, row for row


# ---------------------------------------------------------------------------------------------------------------------
# Resumption


# Starting worker processes takes seconds each time: they are tried here only, in the longest chain.
@pytest.mark.parametrize("workers, placed", [(0, False), (0, True), (2, True)])
def test_resume_is_exact(load, workers, placed):
    def make(start: int) -> grain.IterDataset:
        loader = load(dataclasses.replace(DATA, workers=workers), start=start)
        return pipeline.place(loader, sharding(), BATCH, prefetch=2) if placed else loader

    before, after = 4, 6  # the first epoch ends in the fifth batch
    everything = take(load(), before + after)
    resumed = [jax.tree.map(np.array, batch) for batch in take(make(start=before * BATCH), after)]
    for batch in resumed:
        batch.pop("reason", None)  # the host's copy
    assert_same(resumed, everything[before:])
    indices = np.concatenate([batch["index"] for batch in everything[before:]])
    assert len(set(indices.tolist())) < len(indices)  # it did cross into the next epoch


def test_any_number_of_processes_goes_on_where_others_stopped(load):
    """Four processes, then two, then one: every record once an epoch, in the order that one process would have."""
    position, steps, stream = 0, (3, 4, 5), []
    for rows, count in zip((SHARES["4"], SHARES["alternating"], np.arange(BATCH)[None]), steps, strict=True):
        shares = [take(load(rows=its, start=position), count) for its in rows]
        for parts in zip(*shares, strict=True):
            index = np.empty(BATCH, np.int64)
            for its, part in zip(rows, parts, strict=True):
                index[its] = part["index"]
            stream += index.tolist()
        position += count * BATCH
    assert stream == np.concatenate([batch["index"] for batch in take(load(), sum(steps))]).tolist()
    assert position > 2 * SIZE  # two epochs ended on the way, each in the middle of a batch
    for epoch in range(2):
        assert sorted(stream[epoch * SIZE : (epoch + 1) * SIZE]) == list(range(SIZE))


def test_position_key_tells_what_a_position_is_good_for(small, small_folder):
    wanted = pipeline.position_key(small, seed=0)
    assert wanted == pipeline.position_key(open_source(small.name), seed=0)
    part = open_source(f"array_record:{small_folder}/small-0.array_record")
    assert pipeline.position_key(part, seed=0) != wanted
    assert pipeline.position_key(small, seed=1) != wanted


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("rows", [np.arange(BATCH)[None], SHARES["alternating"]], ids=["1", "alternating"])
def test_evaluation_is_one_pass(small, small_tokenizer, rows):
    def batches(its: np.ndarray) -> list:
        options = {"image_size": 24, "length": 16, "batch_size": BATCH}
        return list(pipeline.eval_batches(small, small_tokenizer, DATA, **options, rows=its))

    shares = [batches(its) for its in rows]
    assert {len(share) for share in shares} == {-(-SIZE // BATCH)}
    found = {}
    for its, share in zip(rows, shares, strict=True):
        for number, batch in enumerate(share):
            assert batch["images"].shape == (len(its), 24, 24, 3)
            # Of the whole batch, on every process.
            records = np.arange(number * BATCH, (number + 1) * BATCH)
            np.testing.assert_array_equal(batch["valid"], records < SIZE)
            np.testing.assert_array_equal(batch["index"], np.where(records < SIZE, records, -1))
            for i, row in enumerate(its):
                if batch["valid"][row]:
                    assert batch["index"][row] not in found
                    found[int(batch["index"][row])] = batch["images"][i], batch["tokens"][i]
                else:
                    assert not batch["images"][i].any() and not batch["tokens"][i].any()
    assert sorted(found) == list(range(SIZE))
    for index, (pixels, tokens) in found.items():
        record = small[index]
        np.testing.assert_array_equal(pixels, images.Preprocessor(24).pixels([record.image])[0])
        np.testing.assert_array_equal(tokens, small_tokenizer.encode(record.captions[0], 16))
    assert_same(shares[0], batches(rows[0]))


BAD = {"text-3": b"no picture", "empty-8": b"", "speechless-20": None}  # None: without a caption
BAD_ROWS = {int(key.rpartition("-")[2]): key for key in BAD}


@pytest.fixture
def damaged(small, tmp_path):
    """The small source with three records of which nothing can be made."""
    packed = []
    for row, record in enumerate(small[i] for i in range(SIZE)):
        if row in BAD_ROWS:
            key = BAD_ROWS[row]
            image, captions = (record.image, (" ",)) if BAD[key] is None else (BAD[key], ("a caption",))
            record = Record(key, image, captions)
        packed.append(records.pack(record, width=1, height=1))
    path = tmp_path / "damaged.array_record"
    records.write(path, packed)
    return open_source(f"array_record:{path}")


def test_what_cannot_be_used_is_replaced_and_said(damaged, small_tokenizer):
    options = {"image_size": 24, "length": LENGTH, "batch_size": BATCH, "seed": 3}
    batches = take(pipeline.train_loader(damaged, small_tokenizer, DATA, **options), 2 * SIZE // BATCH)
    index, problem, pixels = (np.concatenate([b[key] for b in batches]) for key in ("index", "problem", "images"))
    said = {int(i): list(records.REASONS)[p - 1] for i, p in zip(index, problem, strict=True) if p}
    assert said == {3: "not_a_picture", 8: "empty", 20: "no_caption"}
    assert sorted(index[:SIZE]) == list(range(SIZE))  # the order of the others is that of a sound set
    for row in np.flatnonzero(problem):
        assert pixels[row].std() > 0 and not any((pixels[row] == other).all() for other in np.delete(pixels, row, 0))
    shares = [
        take(pipeline.train_loader(damaged, small_tokenizer, DATA, rows=rows, **options), len(batches))
        for rows in (np.arange(0, BATCH, 2), np.arange(1, BATCH, 2))
    ]
    for batch, parts in zip(batches, zip(*shares, strict=True), strict=True):
        for key in ("images", "tokens", "problem"):
            np.testing.assert_array_equal(np.stack([p[key] for p in parts], 1).reshape(batch[key].shape), batch[key])


def test_evaluation_names_what_cannot_be_used(damaged, small_tokenizer):
    batches = list(pipeline.eval_batches(damaged, small_tokenizer, DATA, image_size=24, length=16, batch_size=BATCH))
    bad = np.concatenate([batch["bad"] for batch in batches])
    assert sorted(bad[bad >= 0]) == [3, 8]  # a picture without a caption is a picture
    assert np.concatenate([batch["valid"] for batch in batches]).sum() == SIZE
    assert not batches[0]["images"][3].any() and not batches[0]["tokens"][3].any()
    assert batches[2]["images"][4].any() and not batches[2]["tokens"][4].any()


def test_nothing_but_bad_examples_ends_the_run(tmp_path, small_tokenizer):
    record = Record("broken-7", b"no picture", ("a caption",))
    records.write(tmp_path / "bad.array_record", [records.pack(record, width=1, height=1)])
    source = open_source(f"array_record:{tmp_path}/bad.array_record")
    options = {"image_size": 24, "length": 16, "batch_size": 1}
    with pytest.raises(DataError, match=r"bad\.array_record: record 0 cannot be used \(.*nor can 99 others"):
        take(pipeline.train_loader(source, small_tokenizer, DATA, seed=0, **options), 1)


# ---------------------------------------------------------------------------------------------------------------------
# On the mesh


def sharding() -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_place(load, prefetch):
    host = take(load(), 3)
    placed = take(pipeline.place(load(), sharding(), BATCH, prefetch), 3)
    for batch, wanted in zip(placed, host, strict=True):
        for key in ("images", "tokens"):
            assert isinstance(batch[key], jax.Array)
            assert batch[key].sharding.is_equivalent_to(sharding(), batch[key].ndim)
        assert isinstance(batch["index"], np.ndarray) and batch["index"].dtype == np.int64
        np.testing.assert_array_equal(batch.pop("reason"), wanted["problem"])
        assert_same([batch], [wanted])


def test_place_ends_with_the_evaluation(small, small_tokenizer):
    loader = pipeline.eval_batches(small, small_tokenizer, DATA, image_size=24, length=16, batch_size=BATCH)
    valid = [np.asarray(batch["valid"]) for batch in pipeline.place(loader, sharding(), BATCH)]
    assert np.concatenate(valid).sum() == SIZE


# Rows 0, 1, 4, 5 of a batch belong to the first process: the devices alternate in the mesh.
TWO_PROCESSES = """
import sys
import jax
import numpy as np
from coca_jax import config
from coca_jax.data import pipeline, sources, tokenizer

port, index, spec, model = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
devices = sorted(jax.devices(), key=lambda device: device.id)
mesh = jax.sharding.Mesh(np.array(devices)[[0, 2, 1, 3]], ("fsdp",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
loader = pipeline.train_loader(
    sources.open_source(spec), tokenizer.Tokenizer(model), config.Data(threads=2), image_size=24, length=16,
    batch_size=8, seed=3, rows=pipeline.process_rows(sharding, 8),
)
placed = iter(pipeline.place(loader, sharding, 8))
for step, local, batch in zip(range(3), iter(loader), placed):
    assert batch["images"].shape == (8, 24, 24, 3) and local["images"].shape == (4, 24, 24, 3)
    for key in ("images", "tokens"):
        shards = sorted(batch[key].addressable_shards, key=lambda shard: shard.index[0].start)
        np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), local[key])
    sums = jax.jit(lambda x: x.astype("float32").sum((1, 2, 3)), out_shardings=jax.NamedSharding(mesh, jax.P()))
    print("sums", *np.asarray(sums(batch["images"])).tolist(), flush=True)
placed.close()
"""


def test_place_in_two_processes(small_folder, small_tokenizer, load, tmp_path, free_port):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    small_tokenizer.save(tmp_path / "t.model")
    spec = f"array_record:{small_folder}/small-*.array_record"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "two.py"), str(free_port), str(i), spec, str(tmp_path / "t.model")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    results = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], results[0][1][-3000:] + results[1][1][-3000:]
    lines = [[line.split()[1:] for line in out.splitlines() if line.startswith("sums")] for out, _ in results]
    wanted = [batch["images"].sum((1, 2, 3), dtype=np.float64) for batch in take(load(config.Data(threads=2)), 3)]
    assert lines[0] == lines[1]
    np.testing.assert_allclose(np.array(lines[0], float), wanted, rtol=1e-6)
