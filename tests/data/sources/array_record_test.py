"""Sources over real ArrayRecord files."""

from __future__ import annotations

import os
import pickle
import shutil

import msgpack
import pytest

from coca_jax.data import records
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import files, open_source

SIZE = 37  # records of `small`, in two files


def written(path, *keys: str) -> None:
    records.write(path, [records.pack(Record(key, b"picture", ("a caption",)), width=4, height=3) for key in keys])


def test_pack_and_unpack():
    record = Record("key", b"\x00\xff", ("one", "zwei ü"), "label", "style")
    data = records.pack(record, width=640, height=480)
    assert records.unpack(data) == record
    assert (msgpack.unpackb(data)["width"], msgpack.unpackb(data)["height"]) == (640, 480)


def test_optional_fields_may_be_absent():
    data = msgpack.packb({"key": "k", "image": b"i", "captions": ["c"]})
    assert records.unpack(data) == Record("k", b"i", ("c",), "", "")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"text", msgpack.packb({"key": "k"}), msgpack.packb([1]), b"\x80\x00"])
def test_unpack_other_bytes(data):
    with pytest.raises(DataError, match="not a record with the fields key, image and captions"):
        records.unpack(data)


def test_files_follow_one_another(small):
    assert len(small) == SIZE
    assert [small[i].key for i in range(SIZE)] == [f"picture-{i}" for i in range(SIZE)]
    assert small[1].captions == ("a green picture number 1", "number 1 in green")
    assert (small[1].label, small[1].style, small.tokenizer_path) == ("green", "", None)


def test_pickle_reads_the_same(small):
    small[0]  # an open file must not get in the way
    other = pickle.loads(pickle.dumps(small))
    assert other[SIZE - 1] == small[SIZE - 1]
    assert other.fingerprint() == small.fingerprint()


def test_wildcards(tmp_path):
    for name in ("a-0", "a-1", "b-0"):
        (tmp_path / name[0]).mkdir(exist_ok=True)
        written(tmp_path / name[0] / f"{name}.array_record", name)

    def keys(pattern: str) -> list[str]:
        source = open_source(f"array_record:{tmp_path}/{pattern}")
        return [source[i].key for i in range(len(source))]

    assert keys("a/a-1.array_record") == ["a-1"]
    assert keys("a/a-?.array_record") == ["a-0", "a-1"]
    assert keys("*/*.array_record") == ["a-0", "a-1", "b-0"]
    assert keys("[b]/*") == ["b-0"]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "x.array_record", "x")
    assert open_source("array_record:x.array_record")[0].key == "x"
    assert open_source("array_record:./*.array_record")[0].key == "x"


def test_fingerprint_knows_other_data(small, small_folder, tmp_path):
    same = shutil.copytree(small_folder, tmp_path / "same")
    assert open_source(f"array_record:{same}/small-*.array_record").fingerprint() == small.fingerprint()
    part = open_source(f"array_record:{same}/small-0.array_record")
    assert part.fingerprint() != small.fingerprint()
    written(same / "small-1.array_record", "other")
    assert open_source(f"array_record:{same}/small-*.array_record").fingerprint() != small.fingerprint()


@pytest.mark.parametrize("spec", ["", "emoji", "emoji:", "webdatasets:/x.tar", "/data/x.array_record"])
def test_unknown_kind(spec):
    with pytest.raises(DataError, match="write kind:location with kind one of emoji, array_record") as error:
        open_source(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("name", ["none-*.array_record", "none.array_record", "no/such/folder/*"])
def test_missing_files(tmp_path, name):
    with pytest.raises(DataError, match=r"no file matches; name files that exist") as error:
        open_source(f"array_record:{tmp_path}/{name}")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text, not an ArrayRecord file", bytes(100_000)])
def test_not_an_array_record_file(tmp_path, content):
    (tmp_path / "bad.array_record").write_bytes(content)
    with pytest.raises(DataError, match="not an ArrayRecord file") as error:
        open_source(f"array_record:{tmp_path}/bad.array_record")
    assert "\n" not in str(error.value)


def test_no_records(tmp_path):
    written(tmp_path / "empty.array_record")
    with pytest.raises(DataError, match="holds no records"):
        open_source(f"array_record:{tmp_path}/empty.array_record")


def test_another_record_format_is_named(tmp_path):
    records.write(tmp_path / "other.array_record", [b"tf.Example"])
    source = open_source(f"array_record:{tmp_path}/other.array_record")
    with pytest.raises(DataError, match=r"other\.array_record: record 0: not a record with the fields"):
        source[0]


def test_damaged_record(small_folder, tmp_path):
    path = tmp_path / "damaged.array_record"
    content = bytearray((small_folder / "small-0.array_record").read_bytes())
    content[70_000:80_000] = b"\xaa" * 10_000
    path.write_bytes(content)
    source = open_source(f"array_record:{path}")
    with pytest.raises(DataError, match=r"damaged\.array_record: record \d+") as error:
        for i in range(len(source)):
            source[i]
    assert "\n" not in str(error.value)


def test_emoji_splits_are_ranges_of_two_files(emoji_cache):
    whole, seen, base = (open_source(f"emoji:{name}") for name in ("all", "seen", "base"))
    combinations, concepts = open_source("emoji:combinations"), open_source("emoji:concepts")
    assert len(whole) == len(seen) + len(combinations) + len(concepts)
    assert whole[0] == seen[0] == base[0]
    assert whole[len(seen)] == combinations[0]
    assert whole[len(whole) - 1] == concepts[len(concepts) - 1]
    assert len({source.fingerprint() for source in (whole, seen, base, combinations, concepts)}) == 5
    train = open_source("emoji:train")
    assert {train[0].style, train[len(train) - 1].style} == {"twemoji", "openmoji"}
    assert train.tokenizer_path == emoji_cache / "emoji" / "tokenizer.model"
    prompted = open_source("emoji:seen?template=a drawing of {}")
    i = next(i for i in range(9) if seen[i].label)
    names = prompted.class_names[seen[i].label]
    assert (prompted[i].label, prompted[i].captions) == (seen[i].label, tuple(f"a drawing of {name}" for name in names))
    with pytest.raises(DataError, match="emoji:test: no such split; there are train, twemoji"):
        open_source("emoji:test")


def test_braces_and_lists(tmp_path):
    for i in (8, 9, 10):
        written(tmp_path / f"x-{i:05d}.array_record", f"x-{i}")

    def keys(location: str) -> list[str]:
        source = open_source(f"array_record:{location}")
        return [source[i].key for i in range(len(source))]

    assert keys(f"{tmp_path}/x-{{00008..00010}}.array_record") == ["x-8", "x-9", "x-10"]
    assert keys(f"{tmp_path}/x-000{{10,08}}.array_record") == ["x-10", "x-8"]
    assert keys(f"{tmp_path}/x-00010.array_record, {tmp_path}/x-0000?.array_record") == ["x-10", "x-8", "x-9"]


def test_braces_as_a_shell_expands_them():
    def expanded(pattern: str) -> list[str]:
        return list(files.braces(pattern))

    assert expanded("a{1..3}") == ["a1", "a2", "a3"]
    assert expanded("{09..11}{a,b}") == ["09a", "09b", "10a", "10b", "11a", "11b"]
    assert expanded("{3..1}") == ["3", "2", "1"]
    assert expanded("{x}.{a..b}") == ["{x}.{a..b}"]
    with pytest.raises(DataError, match="are more than 10000000 files"):
        expanded("{0..99999999999}")


def test_a_bad_record_is_one_bad_example(tmp_path):
    records.write(tmp_path / "x.array_record", [b"tf.Example", records.pack(Record("k", b"i", ("c",)), 1, 1)])
    source = open_source(f"array_record:{tmp_path}/x.array_record")
    with pytest.raises(BadExample) as error:
        source[0]
    assert error.value.reason == "unreadable" and source[1].key == "k"


@pytest.mark.parametrize("location", ["s9://b/x.array_record", "gs://"])
def test_stores_that_are_not_there(location):
    with pytest.raises(DataError) as error:
        open_source(f"array_record:{location}")
    assert "\n" not in str(error.value) and location in str(error.value)


def test_a_truncated_file_is_named(small_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copy(small_folder / "small-0.array_record", tmp_path / f"{name}.array_record")
    data = (tmp_path / "b.array_record").read_bytes()
    (tmp_path / "b.array_record").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"b\.array_record: not an ArrayRecord file") as error:
        open_source(f"array_record:{tmp_path}/*.array_record")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["in place", "moved over", "gone"])
def test_a_file_overwritten_while_open(tmp_path, how):
    for name in "abc":
        written(tmp_path / f"{name}.array_record", f"{name}0", f"{name}1")
    source = open_source(f"array_record:{tmp_path}/*.array_record")
    assert source[0].key == "a0"
    path = tmp_path / "b.array_record"
    if how == "gone":
        path.unlink()
    else:
        target = path if how == "in place" else tmp_path / "new"
        written(target, "other", "records", "than before")
        os.utime(target, ns=(1, 1))
        os.replace(target, path)
    for other in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(DataError, match=r"b\.array_record (was overwritten|cannot be read any more)") as error:
            other[3]
        assert not isinstance(error.value, BadExample)
        assert (other[1].key, other[4].key) == ("a1", "c0")
