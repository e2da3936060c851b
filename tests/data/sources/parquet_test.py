"""Parquet files written by pyarrow."""

from __future__ import annotations

import os
import pickle
import sys
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import files, open_source


def write(path, columns: dict, rows: int = 4) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return str(path)


def rows(first: int, count: int) -> dict:
    numbers = range(first, first + count)
    return {
        "id": [f"row {i}" for i in numbers],
        "image": [b"picture %d" % i for i in numbers],
        "caption": [f"text {i}" for i in numbers],
        "extra": [list(range(i)) for i in numbers],
    }


def bad(source, index: int) -> str:
    with pytest.raises(BadExample) as error:
        source[index]
    assert "\n" not in str(error.value) and ".parquet" in str(error.value)
    return error.value.reason


@pytest.fixture
def two(tmp_path) -> str:
    write(tmp_path / "0.parquet", rows(0, 10))
    write(tmp_path / "1.parquet", rows(10, 7))
    return f"parquet:{tmp_path}/*.parquet"


def test_any_row_is_at_hand(two):
    source = open_source(two)
    assert len(source) == 17
    for i in (16, 0, 9, 10, 3, 4, 16, 8):
        record = source[i]
        assert (record.image, record.captions) == (b"picture %d" % i, (f"text {i}",))
    assert len({source[i].key for i in range(17)}) == 17
    other = pickle.loads(pickle.dumps(source))
    assert (other[12], other.fingerprint()) == (source[12], source.fingerprint())
    assert open_source(two.replace("*", "1")).fingerprint() != source.fingerprint()
    assert open_source(f"{two}?caption=id")[2].captions == ("row 2",)
    with pytest.raises(IndexError):
        source[17]


def test_row_groups_are_read_once_a_thread_and_only_their_columns(two, monkeypatch):
    source = open_source(two)
    read = []
    real = pq.ParquetFile.read_row_group

    def read_row_group(self, group, columns=None, **options):
        read.append((threading.get_ident(), group, tuple(columns)))
        return real(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    threads = [threading.Thread(target=lambda: [source[i] for i in range(17)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 2 * 5  # 4 + 4 + 2 rows, and 4 + 3
    assert {columns for _, _, columns in read} == {("image", "caption")}


def test_pictures_as_hugging_face_writes_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"on disk")
    images = [{"bytes": b"in", "path": "x.jpg"}, {"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}, None]
    table = {"image": images, "text": [["one", "two"], ["three", None], ["four"], ["five"]], "label": [0, 1, 1, 1]}
    source = open_source(f"parquet:{write(tmp_path / 'x.parquet', table)}")
    assert [(source[i].image, source[i].captions) for i in (0, 1)] == [
        (b"in", ("one", "two")),
        (b"on disk", ("three",)),
    ]
    assert [bad(source, i) for i in (2, 3)] == ["empty", "empty"]
    assert source[1].label == "1"


def test_paths(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "beside.jpg").write_bytes(b"beside")
    (tmp_path / "root" / "under.jpg").write_bytes(b"under")
    paths = ["beside.jpg", "under.jpg", "../x.jpg", "/etc/passwd", "http://x.org/y.jpg"]
    path = write(tmp_path / "x.parquet", {"file_name": paths, "caption": ["c"] * 5})
    source, rooted = open_source(f"parquet:{path}"), open_source(f"parquet:{path}?root={tmp_path}/root")
    assert (source[0].image, rooted[1].image) == (b"beside", b"under")
    assert [bad(source, 1), bad(rooted, 0)] == ["unreadable", "unreadable"]
    for i in (2, 3, 4):
        with pytest.raises(
            DataError, match=rf"x\.parquet: row {i % 4} of row group {i // 4}: .*(leaves the|an address)"
        ):
            source[i]


def test_bad_rows(tmp_path):
    table = {
        "jpg": [b"a", b"", b"c", None],
        "caption": pa.array([b"caf\xe9", b"b", b" ", b"d"]).view(pa.string()),  # as a careless writer leaves it
    }
    source = open_source(f"parquet:{write(tmp_path / 'x.parquet', table)}")
    assert bad(source, 0) == "encoding"
    assert source[1].image == b""  # the pipeline tells an empty picture
    assert [bad(source, 2), bad(source, 3)] == ["no_caption", "empty"]


def test_labels(tmp_path):
    path = write(tmp_path / "x.parquet", {"image": [b"a", b"b"], "label": [1, 0], "other": [1.5, 2.5]})
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    source = open_source(f"parquet:{path}?classes={tmp_path}/names.txt")
    assert [source[i].captions for i in (0, 1)] == [("a photo of a dog.",), ("a photo of a cat.",)]


def test_texts_without_the_mark_of_texts(tmp_path):
    captions = pa.array([b"one", "zwei ü".encode(), b"caf\xe9", None], pa.binary())
    table = {"image": [b"i"] * 4, "caption": captions, "label": pa.array([b"cat"] * 4, pa.binary())}
    source = open_source(f"parquet:{write(tmp_path / 'x.parquet', table)}")
    assert [source[i].captions for i in (0, 1)] == [("one",), ("zwei ü",)]
    assert bad(source, 2) == "encoding"
    assert (source[3].captions, source[3].label) == (("a photo of a cat.",), "cat")
    lists = pa.array([[b"one", b"two"]], pa.list_(pa.binary()))
    path = write(tmp_path / "y.parquet", {"image": [b"i"], "caption": lists})
    assert open_source(f"parquet:{path}")[0].captions == ("one", "two")


def test_whole_numbers_beside_missing_ones_are_labels(tmp_path):
    table = {"image": [b"i"] * 4, "label": pa.array([3.0, None, 1.5, float("nan")])}  # as pandas writes them
    source = open_source(f"parquet:{write(tmp_path / 'x.parquet', table)}")
    assert source[0].label == "3"
    assert [bad(source, i) for i in (1, 2, 3)] == ["no_caption"] * 3


def test_files_of_one_name_have_keys_of_their_own(tmp_path):
    for part in "ab":
        (tmp_path / part).mkdir()
        write(tmp_path / part / "0.parquet", rows(ord(part), 2))
    source = open_source(f"parquet:{tmp_path}/{{a,b}}/0.parquet")
    assert [source[i].key for i in range(4)] == [
        "a/0.parquet:0:0",
        "a/0.parquet:0:1",
        "b/0.parquet:0:0",
        "b/0.parquet:0:1",
    ]
    assert pickle.loads(pickle.dumps(source))[3].key == "b/0.parquet:0:1"
    assert open_source(f"parquet:{tmp_path}/b/0.parquet")[1].key == "0.parquet:0:1"


def test_columns_that_are_missing(tmp_path):
    path = write(tmp_path / "0.parquet", {"pixels": [b"a"], "caption": ["a"]})
    with pytest.raises(DataError, match=r"no column of pictures; there are pixels, caption: name them by \?image="):
        open_source(f"parquet:{path}")
    assert open_source(f"parquet:{path}?image=pixels")[0].image == b"a"
    with pytest.raises(DataError, match=r"no 'pixel' for \?image=; there are pixels, caption"):
        open_source(f"parquet:{path}?image=pixel")
    write(tmp_path / "1.parquet", {"pixels": [b"a"], "text": ["a"]})
    with pytest.raises(DataError, match=r"1\.parquet: no column 'caption', which .*0\.parquet has"):
        open_source(f"parquet:{tmp_path}/*.parquet?image=pixels")


def test_damaged_files(two, tmp_path):
    (tmp_path / "2.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match=r"2\.parquet is no Parquet file"):
        open_source(two)
    os.remove(tmp_path / "2.parquet")
    source = open_source(two)
    data = bytearray((tmp_path / "1.parquet").read_bytes())
    column = pq.read_metadata(tmp_path / "1.parquet").row_group(0).column(1)
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 20] = b"\xaa" * 20
    (tmp_path / "1.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"1\.parquet was overwritten"):
        source[12]
    assert source[2].captions == ("text 2",)
    again = open_source(two)  # its footer is whole
    assert bad(again, 12) == "unreadable"


def test_in_a_bucket(two, tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/0.parquet", (tmp_path / "0.parquet").read_bytes())
    try:
        assert open_source("parquet:memory://bucket/*.parquet")[9].captions == ("text 9",)
    finally:
        system.rm("/bucket", recursive=True)


def test_without_pyarrow(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # importing it then fails as if it were not there
    with pytest.raises(DataError, match=r"Parquet files need pyarrow .*pip install 'coca_jax\[parquet\]'"):
        open_source(two)


def test_a_file_at_the_top():
    """Paths beside /x.parquet are under /."""
    assert files.inside("/", "a/b.jpg", "x") == "/a/b.jpg"
