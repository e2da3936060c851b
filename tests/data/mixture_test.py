from __future__ import annotations

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from coca_jax import config
from coca_jax.data import pipeline, records
from coca_jax.data.mixture import BLOCK, Mixture, Schedule, Segment, open_mixture
from coca_jax.data.records import DataError
from coca_jax.data.sources import open_source

DATA = config.Data(threads=2)
BATCH = 8


@pytest.fixture
def specs(small, tmp_path: Path) -> list[str]:
    """Three sources of 20, 12 and 5 records."""
    folder, found = tmp_path, []
    for name, rows in (("a", range(20)), ("b", range(20, 32)), ("c", range(32, 37))):
        records.write(folder / f"{name}.array_record", [records.pack(small[row], 1, 1) for row in rows])
        found.append(f"array_record:{folder}/{name}.array_record")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1), (0.999, 0.001)])
def test_every_source_is_read_in_order_and_by_its_weight(weights: tuple[float, ...]) -> None:
    schedule = Schedule([Segment(0, weights)])
    counts = [0] * len(weights)
    for position in range(3000):
        assert schedule.counts(position) == counts
        source, element = schedule.at(position)
        assert element == counts[source]
        counts[source] += 1
        # As even as whole examples can be, but for a few: multiples of the golden ratio stray with the logarithm.
        assert all(abs(n - (position + 1) * w) < 8 for n, w in zip(counts, weights, strict=True)), (position, counts)


def test_the_shares_are_exact_in_the_long_run() -> None:
    weights = (0.7, 0.2, 0.1)
    counts = Schedule([Segment(0, weights)]).counts(10**6 * BLOCK)
    assert sum(counts) == 10**6 * BLOCK
    np.testing.assert_allclose(np.array(counts) / (10**6 * BLOCK), weights, atol=1 / BLOCK)


@pytest.mark.parametrize("stride", [2, 3, 4, 8, 64, 1000])
def test_every_nth_position_holds_every_source_too(stride: int) -> None:
    """Hosts and microbatches read such positions: none may get one source alone."""
    schedule = Schedule([Segment(0, (0.5, 0.5))])
    for first in range(0, stride, max(1, stride // 3)):
        owners = [schedule.at(first + stride * i)[0] for i in range(200)]
        assert 80 <= sum(owners) <= 120, (stride, first)


def test_weights_change_at_a_position_and_nothing_before_it_moves() -> None:
    first = Schedule([Segment(0, (0.5, 0.5))])
    position = 2 * BLOCK + 777
    second = first.changed(position, (0.9, 0.1))
    assert first.changed(position, (0.5, 0.5)) is first
    for at in (0, 1, position - 1):
        assert second.at(at) == first.at(at)
    assert second.counts(position) == first.counts(position)
    counts = list(first.counts(position))
    for at in range(position, position + 500):
        source, element = second.at(at)
        assert element == counts[source]  # goes on with the next, none twice and none left out
        counts[source] += 1
    assert counts[0] - first.counts(position)[0] == pytest.approx(450, abs=4)
    assert Schedule.from_json(second.to_json()).segments == second.segments
    # Changed again before a single example was read: the weights between were never used.
    assert second.changed(position, (0.2, 0.8)).segments == (Segment(0, (0.5, 0.5)), Segment(position, (0.2, 0.8)))


# ---------------------------------------------------------------------------------------------------------------------
# The sources


def test_a_mixture_is_a_source_of_all_records(specs: list[str], small) -> None:
    mixture = open_mixture(" + ".join(specs))
    assert len(mixture) == 37 and mixture.weights == pytest.approx((20 / 37, 12 / 37, 5 / 37))
    assert [mixture[i] for i in range(37)] == [small[i] for i in range(37)]
    assert mixture.locate(31) == (1, 11) and mixture.index(1, 11) == 31
    weighted = open_mixture(f"3 * {specs[0]} + 1e0*  {specs[2]}")
    assert weighted.weights == (0.75, 0.25) and len(weighted) == 25
    alone = open_mixture(specs[1])
    assert alone.weights == (1.0,) and alone.fingerprint() == open_source(specs[1]).fingerprint()
    fingerprints = {open_mixture(" + ".join(order)).fingerprint() for order in itertools.permutations(specs)}
    assert len(fingerprints) == 6
    assert open_mixture(f"0.5 * {specs[0]} + 0.5 * {specs[2]}").fingerprint() == weighted.fingerprint()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("0.5 * A + B", "some have a weight and some have none"),
        ("half * A + 0.5 * B", "'half' before A is not a weight"),
        ("0 * A + 1 * B", "every weight must be more than 0"),
        ("inf * A + 1 * B", "every weight must be more than 0"),
        ("A + A", "stands there twice"),
        ("A + ", "nothing stands beside a +"),
        ("1 * A + 0.000001 * B", "less than 1 / 65536"),
        ("A + nonsense", "source 'nonsense': write kind:location"),
    ],
)
def test_what_cannot_be_mixed_is_said(specs: list[str], spec: str, said: str) -> None:
    named = spec.replace("A", specs[0]).replace("B", specs[1])
    with pytest.raises(DataError) as error:
        open_mixture(named)
    assert said.replace("A", specs[0]) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def stream(mixture: Mixture, tokenizer, count: int, **changes) -> list[dict[str, np.ndarray]]:
    options = {"image_size": 16, "length": 16, "batch_size": BATCH, "seed": 5, **changes}
    data = options.pop("data", DATA)
    iterator = iter(pipeline.train_loader(mixture, tokenizer, data, **options))
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def test_each_source_has_its_own_epochs(specs: list[str], small_tokenizer) -> None:
    mixture = open_mixture(f"0.5 * {specs[0]} + 0.25 * {specs[1]} + 0.25 * {specs[2]}")
    batches = stream(mixture, small_tokenizer, 20)
    for batch in batches:  # every batch is mixed as it should be, to one example
        owners = collections.Counter(mixture.locate(int(i))[0] for i in batch["index"])
        assert abs(owners[0] - 4) <= 1 and abs(owners[1] - 2) <= 1 and abs(owners[2] - 2) <= 1
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in np.concatenate([batch["index"] for batch in batches]).tolist():
        source, element = mixture.locate(index)
        read[source].append(element)
    for source, elements in read.items():
        size = len(mixture.sources[source])
        for epoch in range(len(elements) // size):
            assert sorted(elements[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert read[2][:5] != read[2][5:10]  # shuffled anew
    counts = Schedule([Segment(0, mixture.weights)]).counts(20 * BATCH)
    assert counts == [len(read[n]) for n in range(3)]
    assert mixture.epochs(counts) == {f"data/epochs/{n}": len(read[n]) / len(mixture.sources[n]) for n in range(3)}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mixture_goes_on_where_it_stopped_with_other_weights(specs: list[str], small_tokenizer, workers: int) -> None:
    mixture = open_mixture(f"0.5 * {specs[0]} + 0.5 * {specs[1]}")
    before = stream(mixture, small_tokenizer, 6)
    schedule = Schedule([Segment(0, mixture.weights)]).changed(3 * BATCH, (0.125, 0.875))
    # Other hosts, other workers.
    data = dataclasses.replace(DATA, workers=workers)
    rows = np.arange(BATCH).reshape(2, -1)
    parts = [
        stream(mixture, small_tokenizer, 8, schedule=schedule, rows=its, start=3 * BATCH, data=data) for its in rows
    ]
    whole = stream(mixture, small_tokenizer, 11, schedule=schedule)
    for batch, other in zip(whole[:3], before[:3], strict=True):
        np.testing.assert_array_equal(batch["images"], other["images"])
    for batch, halves in zip(whole[3:], zip(*parts, strict=True), strict=True):
        for key in ("images", "tokens", "index"):
            np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), batch[key])
    indices = np.concatenate([batch["index"] for batch in whole]).tolist()
    of_b = [i - 20 for i in indices if i >= 20]
    assert len(of_b) == pytest.approx(12 + 56, abs=2)
    assert all(sorted(of_b[n : n + 12]) == list(range(12)) for n in range(0, len(of_b) - 11, 12))


def test_two_sources_of_one_size_are_not_shuffled_alike(specs: list[str], tmp_path: Path, small_tokenizer) -> None:
    records.write(tmp_path / "d.array_record", [records.pack(open_source(specs[0])[i], 1, 1) for i in range(20)])
    mixture = open_mixture(f"{specs[0]} + array_record:{tmp_path}/d.array_record")
    indices = np.concatenate([batch["index"] for batch in stream(mixture, small_tokenizer, 5)])
    first, second = (indices[(indices < 20) == half][:19] % 20 for half in (True, False))
    assert len(set(first)) == len(set(second)) == 19 and first.tolist() != second.tolist()
