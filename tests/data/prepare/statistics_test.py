"""Counts of parts add up to those of the whole, and percentiles are NumPy's."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from coca_jax.data.prepare.checking import check
from coca_jax.data.prepare.statistics import (
    PERCENTILES,
    Statistics,
    count_tokens,
    distribution,
    token_statistics,
)
from coca_jax.data.records import BadExample
from tests.data.prepare import sets


def counted(records) -> Statistics:
    found = Statistics()
    for record in records:
        try:
            found.add(check(record))
        except BadExample as error:
            found.drop(error.reason)
    return found


def test_parts_add_up():
    records = sets.mixed_records()
    whole, parts = counted(records), Statistics()
    for start in range(0, len(records), 7):
        through_json = json.loads(json.dumps(counted(reversed(records[start : start + 7])).to_json()))
        parts.merge(Statistics.from_json(through_json))
    assert json.dumps(parts.to_json()) == json.dumps(whole.to_json())
    assert parts.summary() == whole.summary()
    assert (whole.records, whole.bad) == (len(records) - len(sets.BAD), len(sets.BAD))


def test_empty():
    summary = Statistics().summary()
    assert (summary["records"], summary["pictures"]["width"], summary["dropped"]) == (0, {}, {})


@pytest.mark.parametrize("size", [1, 2, 99, 100, 1001])
def test_percentiles(size):
    values = np.random.default_rng(size).integers(-5, 60, size)
    found = distribution(collections.Counter(values.tolist()))
    assert found["mean"] == pytest.approx(values.mean(), abs=0.01)
    assert (found["min"], found["max"]) == (values.min(), values.max())
    for p in PERCENTILES:
        assert found[f"p{p}"] == np.percentile(values, p, method="inverted_cdf")


def test_tokens_beyond_any_length(small_tokenizer):
    for words in (0, 1, 60, 2000):
        caption = "a red picture " * words
        tokens = small_tokenizer.encode(caption, 100_000)
        assert count_tokens(caption, small_tokenizer) == (tokens != small_tokenizer.pad_id).sum()


def test_token_statistics(small_tokenizer):
    captions = ["a red picture", "number 1 in green " * 20]
    counts = [count_tokens(caption, small_tokenizer) for caption in captions]
    found = token_statistics(captions, small_tokenizer, length=counts[0])
    assert (found["captions"], found["truncated"]) == (2, 0.5)
    assert (found["tokens"]["min"], found["tokens"]["max"]) == tuple(counts)
    characters = sum(map(len, captions))
    assert found["characters_per_token"] == pytest.approx(characters / (sum(counts) - 4), abs=1e-3)
    assert token_statistics(captions, small_tokenizer, length=counts[0] - 1)["truncated"] == 1
    assert token_statistics([], small_tokenizer, length=64)["truncated"] == 0
