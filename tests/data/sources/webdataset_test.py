"""Tar shards: real ones, cut ones, changed ones, hostile ones."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import pickle
import random
import shutil
import tarfile
import threading

import fsspec
import msgpack
import pytest

from coca_jax import cache
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import files, open_source, tar_index, tar_samples
from coca_jax.data.sources.base import IMAGE_EXTENSIONS
from tests.data.sources import tars

SUFFIX = tar_index.SUFFIX


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COCA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        tars.write(folder / f"{i:05d}.tar", tars.samples(10 * i, 10))
    return folder


def reason(source, index: int) -> str:
    with pytest.raises(BadExample) as error:
        source[index]
    assert "\n" not in str(error.value) and ".tar" in str(error.value)
    return error.value.reason


def test_any_sample_is_at_hand(shards):
    source = open_source(f"webdataset:{shards}/{{00000..00002}}.tar")
    assert len(source) == 30
    order = list(range(30))
    random.Random(0).shuffle(order)
    for i in order:
        record = source[i]
        assert record.image == b"picture %d" % i * 100
        assert record.captions == (f"text {i}",)
        assert record.key == f"{i // 10:05d}.tar:{i:09d}"
    assert source[-1] == source[29]
    with pytest.raises(IndexError):
        source[30]


def test_patterns(shards):
    everything = open_source(f"webdataset:{shards}/*.tar")
    assert len(open_source(f"webdataset:{shards}/0000[12].tar")) == 20
    assert open_source(f"webdataset:{shards}/00002.tar,{shards}/00000.tar")[0].captions == ("text 20",)
    assert len(open_source(f"webdataset:{shards}/0000{{0,2}}.tar")) == 20
    assert len(open_source(f"webdataset:{shards}/*")) == len(everything)  # the indices beside them are no shards
    with pytest.raises(DataError, match=r"no file matches .*00003\.tar"):
        open_source(f"webdataset:{shards}/{{00000..00003}}.tar")
    with pytest.raises(DataError, match=r"it is a folder: write .*/\*"):
        open_source(f"webdataset:{shards}")
    with pytest.raises(DataError, match=r"00001\.tar is there twice"):
        open_source(f"webdataset:{shards}/*.tar,{shards}/00001.tar")


def test_wildcards_for_folders_are_the_same_on_a_disk_and_in_a_bucket(tmp_path):
    store = fsspec.filesystem("memory")
    for number, name in enumerate(("0.tar", "x/1.tar", "x/y/2.tar")):
        content = tars.tar(tars.samples(number, 1))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        store.pipe(f"/deep/{name}", content)
    found = [open_source(f"webdataset:{root}/**/*.tar") for root in (tmp_path, "memory://deep")]
    for source in found:
        assert [source[i].captions for i in range(len(source))] == [("text 0",), ("text 1",), ("text 2",)]
    store.rm("/deep", recursive=True)


def test_captions_and_labels_from_the_json(shards, tmp_path):
    location = f"webdataset:{shards}/00000.tar"
    assert open_source(f"{location}?caption=caption")[4].captions == ("json 4",)
    assert open_source(f"{location}?caption=alt,none,caption")[4].captions == ("one 4", "two 4", "json 4")
    (tmp_path / "names.txt").write_text("cat\ndog\nfish\n")
    labelled = open_source(f"{location}?label=class&classes={tmp_path}/names.txt&template=a {{}}.")
    assert (labelled[4].label, labelled[4].captions) == ("dog", ("a dog.",))
    assert open_source(f"{location}?label=class")[4].captions == ("text 4",)  # its own caption stays
    assert len({open_source(location + o).fingerprint() for o in ("", "?caption=alt", "?caption=caption")}) == 3


def test_cls_members(tmp_path):
    path = tars.write(tmp_path / "a.tar", [("0.jpg", b"i"), ("0.cls", b"7\n"), ("1.JPEG", b"j"), ("1.cls", b"8")])
    source = open_source(f"webdataset:{path}")
    assert [(source[i].label, source[i].captions) for i in (0, 1)] == [
        ("7", ()),
        ("8", ()),
    ]


@pytest.mark.parametrize("extension", [*IMAGE_EXTENSIONS, "PNG"])
def test_kinds_of_pictures(tmp_path, extension):
    path = tars.write(tmp_path / "a.tar", [(f"a/b.c/key.{extension}", b"i"), ("a/b.c/key.txt", b"t"), ("a/x.md", b"-")])
    source = open_source(f"webdataset:{path}")
    assert (len(source), source[0].image, source[0].key) == (1, b"i", "a.tar:a/b.c/key")


def test_keys_that_come_again_are_samples_of_their_own(tmp_path):
    members = [("0.jpg", b"a"), ("0.txt", b"one"), ("0.jpg", b"b"), ("0.txt", b"two")]
    members += [("1.jpg", b"c"), ("1.png", b"-"), ("1.txt", b"three"), ("1.txt", b"no picture")]
    source = open_source(f"webdataset:{tars.write(tmp_path / 'a.tar', members)}")
    assert len(source) == 4
    assert [(source[i].image, source[i].captions) for i in range(3)] == [
        (b"a", ("one",)),
        (b"b", ("two",)),
        (b"c", ("three",)),
    ]
    assert reason(source, 3) == "empty"


def test_bad_samples_keep_their_places(tmp_path):
    members = [
        *(("0.jpg", b"i"), ("0.txt", b"t")),
        *(("1.txt", b"no picture"), ("2.jpg", b"no caption"), ("3.jpg", b"i"), ("3.txt", b"caf\xe9")),
        *(
            ("4.jpg", b"i"),
            ("4.txt", b" \n"),
            ("5.json", b"{"),
            ("5.jpg", b"i"),
            ("6.jpg", b"i"),
            ("6.txt", "ü\n".encode()),
        ),
        *(
            ("7.json", b"[" * 100_000),
            ("7.jpg", b"i"),
            ("8.jpg", b"far" * 30_000),
            ("8.extra", b"." * 200_000),
            ("8.txt", b"8"),
        ),
    ]
    path = tars.write(tmp_path / "a.tar", members)
    source = open_source(f"webdataset:{path}")
    assert len(source) == 9
    assert [reason(source, i) for i in (1, 2, 3, 4)] == ["empty", "no_caption", "encoding", "no_caption"]
    assert (source[0].captions, source[6].captions) == (("t",), ("ü",))
    assert (source[8].captions, source[8].image) == (("8",), b"far" * 30_000)
    by_json = open_source(f"webdataset:{path}?caption=caption")
    assert [reason(by_json, i) for i in (0, 5, 7)] == ["no_caption", "unreadable", "unreadable"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_data(tmp_path, monkeypatch, format):
    """Absolute names, .., long names and names that are not UTF-8 are read as any other; nothing is written."""
    monkeypatch.chdir(tmp_path)
    long = "" if format == tarfile.USTAR_FORMAT else "very/" * 60
    keys = ["/etc/passwd", "../../up", f"{long}long/key", "na\udcffme", "line\nend", "C:\\windows\\x"]
    members = [(f"{key}.{end}", f"{key}{end}".encode(errors="replace")) for key in keys for end in ("png", "txt")]
    path = tars.write(tmp_path / "a.tar", members, format)
    before = set(tmp_path.rglob("*"))
    source = open_source(f"webdataset:{path}")
    assert len(source) == len(keys)
    for i, key in enumerate(keys):
        assert source[i].image == f"{key}png".encode(errors="replace")
        assert (
            source[i].key.encode() == f"a.tar:{key}".encode(errors="surrogateescape").decode(errors="replace").encode()
        )
    assert set(tmp_path.rglob("*")) - before == {tmp_path / f"a.tar{SUFFIX}"}


def test_links_devices_and_folders_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    tars.write(tmp_path / "b.tar", tars.samples(0, 1))
    source = open_source(f"webdataset:{tmp_path}/*.tar")
    assert (len(source), source[0].captions) == (1, ("text 0",))


def test_truncated(tmp_path, caplog):
    data = tars.tar(tars.samples(0, 5))
    each = len(tars.tar(tars.samples(0, 1)).rstrip(b"\0")) // 512 * 512 + 512  # bytes of a sample, all as long
    assert data[3 * each : 3 * each + 13] == b"000000003.jpg"
    (tmp_path / "cut.tar").write_bytes(data[: 3 * each + 900])
    tars.write(tmp_path / "whole.tar", tars.samples(0, 5))
    source = open_source(f"webdataset:{tmp_path}/*.tar")
    assert len(source) == 4 + 5
    assert [source[i].captions for i in range(3)] == [(f"text {i}",) for i in range(3)]
    assert reason(source, 3) == "truncated"
    assert source[4].captions == ("text 0",)
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1 and "cut.tar is damaged" in warnings[0] and "3 samples before are whole" in warnings[0]
    again = pickle.loads(pickle.dumps(open_source(f"webdataset:{tmp_path}/cut.tar")))  # the index remembers
    assert reason(again, 3) == "truncated"


def test_every_cut_is_a_bad_example_or_none(tmp_path):
    """However a shard is cut, what is left of it is read right, and the last sample is right or "truncated"."""
    data = tars.tar(tars.samples(0, 3))
    for length in range(512, len(data), 256):
        (tmp_path / "a.tar").write_bytes(data[:length])
        try:
            source = open_source(f"webdataset:{tmp_path}/a.tar")
        except DataError as error:
            assert "holds no records" in str(error)
            continue
        for i in range(len(source)):
            try:
                assert source[i].image == b"picture %d" % i * 100
                assert source[i].captions == (f"text {i}",)
            except BadExample as error:
                assert (error.reason, i) == ("truncated", len(source) - 1)


def test_no_tar_files(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"text" * 1000)
    with pytest.raises(DataError, match=r"text\.tar is no tar file"):
        open_source(f"webdataset:{tmp_path}/text.tar")
    (tmp_path / "a.tar").write_bytes(gzip.compress(tars.tar(tars.samples(0, 1))))
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar has no bytes: download it again"):
        open_source(f"webdataset:{tmp_path}/empty.tar")
    with pytest.raises(DataError, match=r"a\.tar is packed with gzip.*unpack it"):
        open_source(f"webdataset:{tmp_path}/a.tar")
    tars.write(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="holds no records"):
        open_source(f"webdataset:{tmp_path}/empty.tar")


@pytest.mark.parametrize("how", ["in place", "moved over", "shorter", "gone"])
def test_a_shard_overwritten_while_open(shards, how):
    source = open_source(f"webdataset:{shards}/*.tar")
    assert source[12].captions == ("text 12",)
    path = shards / "00001.tar"
    other = tars.tar(tars.samples(50, 10))
    if how == "in place":
        path.write_bytes(other)  # of the same size
        os.utime(path, ns=(1, 1))  # not the clock's: its ticks may be longer than the test
    elif how == "moved over":
        (shards / "new").write_bytes(other)
        os.replace(shards / "new", path)
    elif how == "shorter":
        path.write_bytes(other[:5000])
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"00001\.tar (was overwritten|cannot be read any more)") as error:
        source[12]
    assert not isinstance(error.value, BadExample)
    assert source[2].captions == ("text 2",)
    if how != "gone":  # opened again it is what it is now
        assert open_source(f"webdataset:{shards}/*.tar")[10].captions == ("text 50",)


def test_overwritten_behind_the_clock(shards):
    """Even where size and time are the same, what is read must be the member that the index tells of."""
    source = open_source(f"webdataset:{shards}/00000.tar")
    path = shards / "00000.tar"
    then = path.stat()
    path.write_bytes(path.read_bytes()[512:] + bytes(512))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    with pytest.raises(DataError, match=r"00000\.tar was overwritten"):
        source[3]


def test_the_index_is_made_once_and_checked(shards, monkeypatch):
    open_source(f"webdataset:{shards}/*.tar")
    made = []
    rows = tar_index._rows

    def make(file):
        made.append(file.name)
        return rows(file)

    monkeypatch.setattr(tar_index, "_rows", make)
    source = open_source(f"webdataset:{shards}/*.tar")
    assert not made and len(source) == 30
    tars.write(shards / "00001.tar", tars.samples(60, 4))
    changed = open_source(f"webdataset:{shards}/*.tar")
    assert made == ["00001.tar"] and len(changed) == 24 and changed[11].captions == ("text 61",)
    assert changed.fingerprint() != source.fingerprint()
    for damage in (b"", b"\0" * 5000, (shards / f"00000.tar{SUFFIX}").read_bytes()[:-1]):
        made.clear()
        (shards / f"00000.tar{SUFFIX}").write_bytes(damage)
        assert open_source(f"webdataset:{shards}/00000.tar")[9].captions == ("text 9",)
        assert made == ["00000.tar"]


def test_an_index_that_lies_is_not_believed(shards):
    """It lies beside the data and may be as hostile as they are."""
    path = shards / f"00000.tar{SUFFIX}"
    open_source(f"webdataset:{shards}/00000.tar")
    good = path.read_bytes()
    for field, value in (("offset", 2**63), ("offset", 100), ("size", 2**32 - 1), ("header", 2**32 - 1), ("size", 5)):
        rows = bytearray(good)
        view = tar_index.np.frombuffer(rows, tar_index.ROW, offset=tar_index._HEAD)
        view[field][3][tar_samples.IMAGE] = value
        path.write_bytes(rows)
        source = open_source(f"webdataset:{shards}/00000.tar")
        with pytest.raises(DataError):
            source[3]
        assert source[4].captions == ("text 4",)


def test_folders_that_cannot_be_written(shards, own_cache):
    """Then the index lies in the cache folder; when that is no folder either, one line says so."""
    for i in range(3):
        (shards / f"0000{i}.tar{SUFFIX}").mkdir()
    source = open_source(f"webdataset:{shards}/*.tar")
    assert source[29].captions == ("text 29",)
    assert len(list(own_cache.rglob(f"*{SUFFIX}"))) == 3
    shutil.rmtree(own_cache)
    own_cache.write_text("a file")
    with pytest.raises(DataError, match=r"index can be written nowhere.*set COCA_JAX_CACHE"):
        open_source(f"webdataset:{shards}/*.tar")


def test_the_index_holds_no_pickle(shards):
    open_source(f"webdataset:{shards}/00000.tar")
    data = (shards / f"00000.tar{SUFFIX}").read_bytes()
    head = msgpack.unpackb(data[12 : 12 + int.from_bytes(data[8:12], "little")])
    assert (head["count"], head["problem"]) == (10, "")
    assert len(data) == tar_index._HEAD + 64 * 10


def test_many_threads_and_few_open_files(shards, monkeypatch):
    source = open_source(f"webdataset:{shards}/*.tar")
    monkeypatch.setattr(files, "HANDLES", files.Handles(2))  # of six: tar files and indices
    wrong = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            i = draw.randrange(30)
            if source[i].captions != (f"text {i}",):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pickle(shards):
    source = open_source(f"webdataset:{shards}/*.tar")
    source[0]
    other = pickle.loads(pickle.dumps(source))
    assert [other[i] for i in range(30)] == [source[i] for i in range(30)]
    assert (other.fingerprint(), other.name) == (source.fingerprint(), source.name)


@pytest.mark.slow
def test_processes_make_many_indices(tmp_path, monkeypatch):
    from coca_jax.data.sources import webdataset

    monkeypatch.setattr(webdataset, "_PROCESSES_FROM", 32)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for i in range(32):
        tars.write(tmp_path / f"{i:02d}.tar", tars.samples(i, 1))
    source = open_source(f"webdataset:{tmp_path}/*.tar")
    assert [source[i].captions for i in range(32)] == [(f"text {i}",) for i in range(32)]


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.pipe({f"/bucket/{i:05d}.tar": tars.tar(tars.samples(10 * i, 10)) for i in range(2)})
    yield system
    system.rm("/bucket", recursive=True)


def test_in_a_bucket(bucket, monkeypatch, own_cache):
    source = open_source("webdataset:memory://bucket/*.tar")
    assert len(source) == 20 and source[0].key == "00000.tar:000000000"
    assert len(open_source("webdataset:memory://bucket/{00000..00001}.tar")) == 20
    asked = []
    ranged = type(bucket).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        asked.append((start, end))
        return ranged(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(bucket), "cat_file", cat_file)
    assert source[15].captions == ("text 15",)
    (span,) = asked  # one request, for the sample alone
    assert span[1] - span[0] < 5000
    # Other hosts find the index beside the shard, and do not read the shard for it.
    shutil.rmtree(own_cache)
    monkeypatch.setattr(tar_index, "_rows", None)
    assert open_source("webdataset:memory://bucket/*.tar")[19].captions == ("text 19",)
    bucket.pipe("/bucket/00000.tar", tars.tar(tars.samples(70, 10)))
    with pytest.raises(DataError, match=r"memory://.*00000\.tar was overwritten"):
        pickle.loads(pickle.dumps(source))[3]


def test_a_cache_of_one_folder_serves_sets_of_equal_names(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        tars.write(tmp_path / name / "0.tar", tars.samples(ord(name), 1))
        (tmp_path / name / f"0.tar{SUFFIX}").mkdir()
    found = [open_source(f"webdataset:{tmp_path}/{name}/0.tar")[0].captions for name in "ab"]
    assert found == [("text 97",), ("text 98",)]
    assert len(list(cache.folder().rglob(f"*{SUFFIX}"))) == 2


def test_shards_of_one_name_have_keys_of_their_own(tmp_path):
    for name in ("x/a", "x/b"):
        (tmp_path / name).mkdir(parents=True)
        tars.write(tmp_path / name / "00000.tar", tars.samples(0, 1))
    source = open_source(f"webdataset:{tmp_path}/x/*/00000.tar")
    assert [source[i].key for i in (0, 1)] == ["a/00000.tar:000000000", "b/00000.tar:000000000"]


def test_a_shard_whose_name_is_not_utf_8_can_be_used(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")
    pathlib.Path(path).write_bytes(tars.tar(tars.samples(0, 1)))
    key = open_source(f"webdataset:{path}")[0].key
    assert key == "caf\ufffd.tar:000000000"


def test_options_are_checked(shards):
    with pytest.raises(DataError, match=r"no option 'captions'; did you mean caption\? webdataset has caption, label"):
        open_source(f"webdataset:{shards}/*.tar?captions=x")
    with pytest.raises(DataError, match="option 'caption' is given 2 times"):
        open_source(f"webdataset:{shards}/*.tar?caption=a&caption=b")
    with pytest.raises(DataError, match="'caption' is no option: write name=value"):
        open_source(f"webdataset:{shards}/*.tar?label=a&caption")


def test_json_of_img2dataset_without_caption(tmp_path):
    fields = json.dumps({"caption": None, "url": "u", "error_message": None}).encode()
    path = tars.write(tmp_path / "a.tar", [("0.jpg", b"i"), ("0.json", fields)])
    assert reason(open_source(f"webdataset:{path}?caption=caption"), 0) == "no_caption"
