"""Which members of a tar shard make a sample, and that no image is left out without being counted and named."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
import pytest

from coca_jax.data.prepare import describe
from coca_jax.data.records import BadExample, Record
from coca_jax.data.sources import open_source, tar_index, tar_samples
from tests.data.conftest import encoded
from tests.data.sources import tars


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCA_JAX_CACHE", str(tmp_path / "cache"))


def members(names: Sequence[str]) -> list[tuple[str, bytes]]:
    """Members whose content is their name; of a json the field `caption` is."""
    return [(name, b'{"caption": "%s"}' % name.encode() if name.endswith("json") else name.encode()) for name in names]


def read(path: pathlib.Path, options: str = "") -> tuple[list[tuple[str, str, tuple[str, ...]]], list[str]]:
    """Key, image and captions of each record, those of a bad one (reason, message, ()); and the remarks."""
    source = open_source(f"webdataset:{path}{options}")
    found = []
    for number in range(len(source)):
        try:
            record: Record = source[number]
            found.append((record.key.partition(":")[2], record.image.decode(), record.captions))
        except BadExample as error:
            found.append((error.reason, str(error), ()))
    return found, list(getattr(source, "remarks", ()))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        pytest.param(
            ["photo 2.0 final.jpg", "photo 2.0 final.txt", "photo 2.1 final.jpg", "photo 2.1 final.txt"],
            [("photo 2.0 final", "photo 2.0 final.jpg", "photo 2.0 final.txt"),
             ("photo 2.1 final", "photo 2.1 final.jpg", "photo 2.1 final.txt")],
            id="a dot in every key",
        ),
        pytest.param(
            ["site.example_0.jpg", "site.example_0.txt", "site_1.jpg", "site_1.txt"],
            [("site.example_0", "site.example_0.jpg", "site.example_0.txt"), ("site_1", "site_1.jpg", "site_1.txt")],
            id="a dot in some keys",
        ),
        pytest.param(
            ["s0.input.jpg", "s0.output.txt", "s1.input.jpg", "s1.output.txt"],
            [("s0", "s0.input.jpg", "s0.output.txt"), ("s1", "s1.input.jpg", "s1.output.txt")],
            id="the parts of a sample have names",
        ),
        pytest.param(["s0.img.PNG", "s0.txt"], [("s0", "s0.img.PNG", "s0.txt")], id="the image alone has a dot"),
        pytest.param(["s0.jpg", "s0.caption.txt"], [("s0", "s0.jpg", "s0.caption.txt")], id="the text alone has a dot"),
        pytest.param(
            ["a/b.c/x.y.jpg", "a/b.c/x.y.txt", "./v1.5/x.y.jpg", "./v1.5/x.y.txt"],
            [("a/b.c/x.y", "a/b.c/x.y.jpg", "a/b.c/x.y.txt"), ("./v1.5/x.y", "./v1.5/x.y.jpg", "./v1.5/x.y.txt")],
            id="folders with dots, one name in two folders",
        ),
        pytest.param(
            ["1.jpg", "2.jpg", "3.jpg", "1.txt", "2.txt", "3.txt"],
            [(n, f"{n}.jpg", f"{n}.txt") for n in "123"],
            id="all images first",
        ),
        pytest.param(
            ["2.txt", "1.txt", "1.jpg", "2.jpg"],
            [("1", "1.jpg", "1.txt"), ("2", "2.jpg", "2.txt")],
            id="all texts first",
        ),
        pytest.param(
            ["a 1.0.jpg", "b.c.jpg", "s.in.jpg", "a 1.0.txt", "b.c.txt", "s.out.txt"],
            [("a 1.0", "a 1.0.jpg", "a 1.0.txt"), ("b.c", "b.c.jpg", "b.c.txt"), ("s", "s.in.jpg", "s.out.txt")],
            id="dots, and all images first",
        ),
        pytest.param(
            ["images/1.jpg", "images/2.jpg", "labels/1.txt"],
            [("no_caption", "", ""), ("no_caption", "", ""), ("empty", "", "")],
            id="folders are a part of the key",
        ),
    ],
)  # fmt: skip
def test_samples_are_put_together(tmp_path: pathlib.Path, names: list[str], wanted: list[tuple[str, str, str]]) -> None:
    found, remarks = read(tars.write(tmp_path / "a.tar", members(names)))
    assert len(found) == len(wanted)
    for (key, image, captions), (wanted_key, wanted_image, caption) in zip(found, wanted, strict=True):
        assert key == wanted_key
        if wanted_image:
            assert (image, captions) == (wanted_image, (caption,))
    assert bool(remarks) == bool(wanted[0][1])
    assert all("\n" not in remark for remark in remarks)


@pytest.mark.parametrize(
    ("names", "wanted", "remark"),
    [
        (
            ["a.jpg", "a.seg.png", "a.txt", "b.seg.png", "b.txt"],
            [("a", "a.jpg", ("a.txt",)), ("empty", "", ())],
            "2 files that look like images are beside the image of their sample, which alone is read; e.g. 'a.seg.png'",
        ),
        (["a.heic", "a.jpg", "a.txt"], [("a", "a.jpg", ("a.txt",))], "1 files that look like images are beside"),
        (["a.png", "a.jpg", "a.txt"], [("a", "a.png", ("a.txt",))], "e.g. 'a.jpg'"),
        (["a.left.jpg", "a.right.jpg", "a.txt"], [("a", "a.left.jpg", ("a.txt",))], "1 files that look like images"),
        (
            ["._a.jpg", "a.jpg", "a.txt", "__MACOSX/a.jpg", "__MACOSX/._a.jpg", "b/._v1.2.jpg"],
            [("a", "a.jpg", ("a.txt",))],
            "4 files that look like images are hidden files (._*, __MACOSX), which are not read; e.g. '._a.jpg'",
        ),
        (["a.cap", "a.jpg", "a.txt"], [("a", "a.jpg", ("a.txt",))], ""),
        (["a.cap", "a.JPG"], [("a", "a.JPG", ("a.cap",))], ""),
        (["a.jpg", "a.json"], [("a", "a.jpg", ("a.json",))], ""),
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], [("a", "a.jpg", ("a.txt",))] * 2, ""),
        (["a.jpg", "a.txt", "a.txt"], [("a", "a.jpg", ("a.txt",)), ("empty", "", ())], ""),
    ],
)
def test_an_image_that_is_not_read_is_counted_and_named(
    tmp_path: pathlib.Path, names: list[str], wanted: list[tuple[str, str, tuple[str, ...]]], remark: str
) -> None:
    found, remarks = read(tars.write(tmp_path / "a.tar", members(names)))
    assert [(key, image if captions else "", captions) for key, image, captions in found] == wanted
    assert remark in "; ".join(remarks)
    assert bool(remark) == bool(remarks)


def test_links_and_sparse_files_that_look_like_images_are_counted_and_never_followed(tmp_path: pathlib.Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members(["a.jpg", "a.txt"]):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind, target in (("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("c.png", tarfile.LNKTYPE, "a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        info = tarfile.TarInfo("d.1.jpg")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    found, remarks = read(tmp_path / "a.tar")
    assert found == [("a", "a.jpg", ("a.txt",))]
    assert remarks == [
        "2 files that look like images are links or sparse files, which are not read: write them as plain files "
        "(tar --hard-dereference -h); e.g. 'b.jpg'"
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_with_dots(tmp_path: pathlib.Path, form: int) -> None:
    key = "d" * 80 + "/" + "v1." * (20 if form == tarfile.USTAR_FORMAT else 60) + "x"
    found, _ = read(tars.write(tmp_path / "a.tar", members([f"{key}.jpg", f"{key}.txt"]), form))
    assert found == [(key, f"{key}.jpg", (f"{key}.txt",))]


def test_describe_and_the_log_say_what_was_put_together_once_for_all_shards(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        contents = [
            (f"v1.{number}.jpg", encoded(np.zeros((8, 8, 3), np.uint8), "JPEG")),
            (f"v1.{number}.txt", b"a card"),
            ("._x.jpg", b""),
        ]
        tars.write(tmp_path / f"{number}.tar", contents)
    page = describe.text(describe.describe(f"webdataset:{tmp_path}/{{0..1}}.tar", progress=False), 76)
    for said in ("2 samples have dots in their names", "2 files that look like images are hidden files"):
        assert said in page
        assert sum(said in record.getMessage() for record in caplog.records) == 1
    assert "0 of 2 cannot be used" in page


def test_shards_that_the_first_dot_makes_whole_keep_their_rows(tmp_path: pathlib.Path) -> None:
    """The rows are those of the rule itself, applied to names that it was made for."""
    names = [f"{n:03}.{end}" for n in range(50) for end in ("jpg", "json", "seg.png", "txt", "__meta__")]
    path = tars.write(tmp_path / "a.tar", members(names))
    shard = tar_index.build(tar_index.files.look(str(path)))
    assert shard.count == 50 and shard.counts == {tar_samples.BESIDE: (50, "000.seg.png")}
    for number in range(50):
        header = tar_index.row(shard, number)["header"].tolist()
        assert [bool(x) for x in header] == [True, True, True, False]
    assert [key for key, _, _ in read(path)[0]] == [f"{n:03}" for n in range(50)]
