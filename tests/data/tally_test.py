from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from etils import epath

from coca_jax.data import records, tally
from coca_jax.data.mixture import Mixture
from coca_jax.data.records import REASONS, DataError, Record
from coca_jax.data.sources import open_source
from coca_jax.data.tally import Tally


def problems(**counts: int) -> np.ndarray:
    return np.array([counts.get(reason, 0) for reason in REASONS], np.int32)


def test_it_counts_and_goes_on_after_a_restart() -> None:
    counted = Tally()
    counted.add(64, problems())
    assert counted.metrics() == {"data/bad": 0.0}
    counted.add(64, problems(empty=1, truncated=2))
    again = Tally(json.loads(json.dumps(counted.to_json())))
    again.add(64, problems(truncated=1))
    assert again.examples == 192
    assert again.metrics() == {"data/bad": 4.0, "data/bad/empty": 1.0, "data/bad/truncated": 3.0}


def test_too_many_end_the_run_with_the_tally() -> None:
    counted = Tally()
    counted.add(64, problems(empty=60, truncated=4))
    counted.check(0.01, "list")  # a bad start is no share yet: 64 of 10,000
    counted.add(64, problems(truncated=37))
    with pytest.raises(
        DataError, match=r"101 of 128 .*config\.data\.max_bad=0\.01: 60 empty .*41 truncated .*see list"
    ):
        counted.check(0.01, "list")
    counted.add(10**6, problems())
    counted.check(0.01, "list")
    with pytest.raises(DataError):
        counted.check(0.0, "list")


def test_each_bad_record_is_listed_once(tmp_path) -> None:
    packed = [records.pack(Record(f"k-{i}", b"x", ("a",)), 1, 1) for i in range(6)]
    records.write(tmp_path / "a.array_record", packed)
    records.write(tmp_path / "b.array_record", packed[:3])
    sources = [open_source(f"array_record:{tmp_path}/{name}.array_record") for name in "ab"]
    mixture = Mixture(sources, (0.5, 0.5))
    folder = epath.Path(tmp_path)
    code = 1 + list(REASONS).index("not_a_picture")
    listed = tally.List(mixture, folder)
    listed.add(np.array([1, 7, 2]), np.array([code, code, 0]))
    listed.add(np.array([7]), np.array([code]))
    with listed.path.open("a") as file:
        file.write('{"source": "arr')  # killed while writing
    again = tally.List(mixture, folder)
    again.add(np.array([1, 5]), np.array([code, code]))
    lines = [json.loads(line) for line in listed.path.read_text().splitlines() if line.endswith("}")]
    assert [(line["source"], line["record"], line["key"], line["reason"]) for line in lines] == [
        (sources[0].name, 1, "k-1", "not_a_picture"),
        (sources[1].name, 1, "k-1", "not_a_picture"),
        (sources[0].name, 5, "k-5", "not_a_picture"),
    ]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x1d", "\n", "\udcff"])
def test_keys_with_unusual_line_ends_are_listed_once_too(tmp_path, odd: str) -> None:
    class Source(list):
        name, tokenizer_path, attribution, class_names = "folder:x", None, "", None

    source: Any = Source([Record(f"a{odd}b.jpg", b"x", ("a",))])
    mixture = Mixture([source], (1.0,))
    code = 1 + list(REASONS).index("truncated")
    for _ in range(2):  # a run, and the same that goes on
        tally.List(mixture, epath.Path(tmp_path)).add(np.array([0]), np.array([code]))
    assert (tmp_path / tally.BAD_EXAMPLES_FILE).read_bytes().count(b"folder:x") == 1
