"""Conversion: what comes out is what went in, checked, counted, and the same whoever did the work."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pyarrow
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet

from coca_jax.data.prepare.convert import convert, verify
from coca_jax.data.records import DataError
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer
from tests.data.prepare import sets

GOOD = [i for i in range(sets.SIZE) if i not in sets.BAD]


def converted(source: str, out: pathlib.Path, **settings) -> dict:
    return convert(source, out, **{"workers": 1, "progress": False, "max_bad": 0.2, "name": "set"} | settings)


def read(folder: pathlib.Path) -> list:
    source = open_source(f"array_record:{folder}/*.array_record")
    return [source[i] for i in range(len(source))]


def test_records_come_out_as_they_went_in(mixed, tmp_path):
    manifest = converted(mixed, tmp_path / "out", records_per_shard=12)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("dropped.jsonl", "manifest.json"),
        *(f"set-0000{i}-of-00004.array_record" for i in range(4)),
    ]
    originals = [sets.mixed_records()[i] for i in GOOD]
    wanted = [record._replace(captions=tuple(c for c in record.captions if c.strip())) for record in originals]
    assert read(tmp_path / "out") == wanted
    assert manifest["records"] == len(GOOD)
    shards = [file["records"] for name, file in manifest["files"].items() if name.endswith(".array_record")]
    assert shards == [9, 11, 12, 4]


def test_the_manifest_is_true(mixed, tmp_path):
    out = tmp_path / "out"
    manifest = converted(mixed, out, records_per_shard=12)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    for name, file in manifest["files"].items():
        data = (out / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert manifest["dropped"] == dict.fromkeys(("empty", "not_a_picture", "truncated", "no_caption"), 1)
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {line["index"]: line["reason"] for line in lines} == sets.BAD
    assert [line["key"] for line in lines] == [f"key-{i}" for i in sets.BAD]
    assert manifest["duplicate_keys"] == {"number": 1, "examples": ["key-19"]}
    kept = read(out)
    lengths = [len(caption) for record in kept for caption in record.captions]
    captions = manifest["captions"]
    assert (captions["number"], captions["blank_left_out"]) == (len(lengths), 1)
    assert captions["characters"]["mean"] == pytest.approx(np.mean(lengths), abs=0.01)
    assert (captions["characters"]["min"], captions["characters"]["max"]) == (min(lengths), max(lengths))
    assert captions["per_record"]["max"] == 2
    pictures = manifest["pictures"]
    assert pictures["formats"] == {"JPEG": sum(i % 3 != 0 for i in GOOD), "PNG": sum(i % 3 == 0 for i in GOOD)}
    assert (pictures["width"]["min"], pictures["height"]["min"], pictures["height"]["max"]) == (90, 30, 69)
    assert manifest["labels"]["most_common"].keys() == {"warm", "cold"}
    assert manifest["styles"] == {"number": 1, "most_common": {"waves": len(GOOD)}}
    assert verify(out) == manifest
    with (out / "set-00002-of-00004.array_record").open("r+b") as file:
        file.seek(1000)
        file.write(b"!!!!")
    with pytest.raises(DataError, match=r"set-00002-of-00004.array_record is not the file that the manifest describes"):
        verify(out)


def test_workers_decide_nothing(mixed, tmp_path):
    settings = {"records_per_shard": 7, "max_side": 48}
    converted(mixed, tmp_path / "one", **settings)
    converted(mixed, tmp_path / "two", workers=2, **settings)
    assert sets.contents(tmp_path / "one") == sets.contents(tmp_path / "two")


def test_threads_decide_nothing(mixed, tmp_path):
    """More cores than shards: threads read ahead."""
    for name, workers in {"one": 1, "eight": 8}.items():
        converted(mixed, tmp_path / name, workers=workers, max_side=48)
    assert sets.contents(tmp_path / "one") == sets.contents(tmp_path / "eight")
    with pytest.raises(DataError, match="record 7: truncated"):
        converted(mixed, tmp_path / "stop", workers=8, bad="stop")


def test_vocabulary_and_tokens(mixed, tmp_path):
    out = tmp_path / "out"
    manifest = converted(mixed, out, vocab_size=330, length=24)
    tokenizer = Tokenizer(out / "tokenizer.model")
    captions = [caption for record in read(out) for caption in record.captions]
    counts = [int((tokenizer.encode(caption, 512) != tokenizer.pad_id).sum()) for caption in captions]
    tokens = manifest["captions"]["tokens"]
    assert tokens["captions"] == len(captions)
    assert tokens["tokens"]["mean"] == pytest.approx(np.mean(counts), abs=0.01)
    assert tokens["tokens"]["max"] == max(counts)
    assert tokens["truncated"] == pytest.approx(np.mean(np.array(counts) > 24), abs=1e-6)
    assert 0 < tokens["truncated"] < 1
    # The same vocabulary can count for another conversion; a sample of its records is enough.
    other = converted(mixed, tmp_path / "other", tokenizer=str(out / "tokenizer.model"), tokenizer_sample=10)
    assert not (tmp_path / "other" / "tokenizer.model").exists()
    assert 5 <= other["captions"]["tokens"]["captions"] <= 20
    assert other["vocab_size"] == tokenizer.vocab_size


def test_shuffle(mixed, tmp_path):
    keys = {}
    for name, settings in {"no": {}, "a": {"shuffle": True}, "b": {"shuffle": True, "seed": 1}}.items():
        converted(mixed, tmp_path / name, **settings)
        keys[name] = [record.key for record in read(tmp_path / name)]
    assert sorted(keys["a"]) == sorted(keys["b"]) == sorted(keys["no"])
    assert keys["no"] != keys["a"] != keys["b"] != keys["no"]


def test_shard_size(mixed, tmp_path):
    bytes_there = sum(len(record.image) for record in sets.mixed_records())
    manifest = converted(mixed, tmp_path / "out", shard_size=bytes_there // 4)
    assert len([name for name in manifest["files"] if "-of-" in name]) in (4, 5)


def write_webdataset(folder: pathlib.Path) -> str:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in GOOD[:9]:
            record = sets.mixed_records()[i]
            for ending, data in (("jpg" if i % 3 else "png", record.image), ("txt", record.captions[-1].encode())):
                member = tarfile.TarInfo(f"{i:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return f"webdataset:{folder}/0.tar"


def write_pictures(folder: pathlib.Path) -> str:
    lines = ["file_name,caption"]
    for i in GOOD[:9]:
        (folder / f"{i}.png").write_bytes(sets.mixed_records()[i].image)
        lines.append(f'{i}.png,"{sets.mixed_records()[i].captions[-1]}"')
    (folder / "captions.csv").write_text("\n".join(lines))
    return f"folder:{folder}"


def write_parquet(folder: pathlib.Path) -> str:
    found = [sets.mixed_records()[i] for i in GOOD[:9]]
    columns = {"image": [record.image for record in found], "caption": [record.captions[-1] for record in found]}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return f"parquet:{folder}/a.parquet"


@pytest.mark.parametrize("write", [write_webdataset, write_pictures, write_parquet])
def test_other_kinds_of_source(tmp_path, write):
    (tmp_path / "source").mkdir()
    spec = write(tmp_path / "source")
    manifest = converted(spec, tmp_path / "out", records_per_shard=4)
    source = open_source(spec)
    assert (manifest["records"], len(source)) == (9, 9)
    assert read(tmp_path / "out") == [source[i] for i in range(9)]
    assert [record.image for record in read(tmp_path / "out")] == [sets.mixed_records()[i].image for i in GOOD[:9]]


def test_several_sources(mixed, tmp_path):
    extra = tmp_path / "extra"
    other = sets.write_long(extra, 3)
    converted(f"{other} + {mixed}", tmp_path / "out")
    keys = [record.key for record in read(tmp_path / "out")]
    assert keys == [*(f"key-{i}" for i in range(3)), *(sets.mixed_records()[i].key for i in GOOD)]
    with pytest.raises(DataError, match="has a weight"):
        converted(f"0.5 * {other} + 0.5 * {mixed}", tmp_path / "weights")
    with pytest.raises(DataError, match="twice"):
        converted(f"{mixed} + {mixed}", tmp_path / "twice")


def test_stop_at_a_bad_record(mixed, tmp_path):
    with pytest.raises(DataError, match=r"record 7: truncated: .*--bad=drop leaves such records out"):
        converted(mixed, tmp_path / "out", bad="stop")
    # What was finished by then is kept, and the conversion goes on when it may.
    manifest = converted(mixed, tmp_path / "out")
    assert manifest["records"] == len(GOOD)


def test_too_many_bad_records(mixed, tmp_path):
    with pytest.raises(DataError, match=r"more than --max_bad=0.05: .*1 truncated \(its picture ends before its end\)"):
        converted(mixed, tmp_path / "out", max_bad=0.05, records_per_shard=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_left(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(DataError, match="no file matches"):
        converted(f"array_record:{folder}/*.array_record", tmp_path / "out")
    source = sets.write_mixed(folder)
    broken = folder / "mixed-1.array_record"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(DataError, match=r"mixed-1.array_record|array_record:.*mixed"):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_into_a_bucket(mixed, tmp_path, monkeypatch):
    """The store is fsspec's in memory: all files go through its interface as they do to Google's."""

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: dict = {}  # noqa: RUF012
        pseudo_dirs: list = [""]  # noqa: RUF012

    registry: Any = importlib.import_module("fsspec.registry")  # the package has an attribute of that name, too

    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setitem(registry._registry, "gcs", Bucket)
    monkeypatch.setitem(registry._registry, "gs", Bucket)
    try:
        manifest = converted(mixed, "gs://bucket/sets/out", records_per_shard=12)
        assert converted(mixed, "gs://bucket/sets/out", records_per_shard=12) == manifest
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
    converted(mixed, tmp_path / "out", records_per_shard=12)
    local = {f"gs://bucket/sets/out/{name}": digest for name, digest in sets.contents(tmp_path / "out").items()}
    there = {name: hashlib.sha256(file.getvalue()).hexdigest() for name, file in Bucket.store.items()}
    assert there == local
