"""Folders of pictures, with files of captions as people write them."""

from __future__ import annotations

import os
import pickle

import fsspec
import pytest

from coca_jax import pictures
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        (root / name).write_bytes(name.encode())
    return root


def bad(source, index: int) -> tuple[str, str]:
    with pytest.raises(BadExample) as error:
        source[index]
    assert "\n" not in str(error.value)
    return error.value.reason, str(error.value)


def everything(source) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(source[i].image, source[i].captions) for i in range(len(source))]


EXPECTED = [(b"a.jpg", ("one, two", "three")), (b"sub/c.webp", ("ü four",))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", 'file_name,text\na.jpg,"one, two"\nsub/c.webp,ü four\na.jpg,three\n'),
        ("captions.tsv", "filepath\ttitle\na.jpg\tone, two\nsub/c.webp\tü four\na.jpg\tthree\n"),
        ("captions.csv", '\ufeffImage , Caption\r\na.jpg,"one, two"\r\nsub/c.webp,ü four\r\na.jpg,three\r\n'),
        ("metadata.csv", 'id,file_name,text\n1,a.jpg,"one, two"\n2,sub/c.webp,ü four\n3,a.jpg,three\n'),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "text": ["one, two", "three", ""]}\n\n'
            '{"text": "ü four", "file_name": "sub/c.webp"}',
        ),
        (
            "captions.jsonl",
            '{"image": "a.jpg", "captions": ["one, two", "three"]}\n{"image": "sub/c.webp", "captions": "ü four"}\n',
        ),
    ],
)
def test_files_of_captions(folder, name, content):
    (folder / name).write_bytes(content.encode())
    source = open_source(f"folder:{folder}")
    assert everything(source) == EXPECTED
    assert everything(pickle.loads(pickle.dumps(source))) == EXPECTED
    assert everything(open_source(f"folder:{folder}/?captions={name}")) == EXPECTED


def test_columns_by_option(folder, tmp_path):
    (tmp_path / "other.csv").write_text("where,says,kind,text\na.jpg,one,x,no\n")
    source = open_source(f"folder:{folder}?captions={tmp_path}/other.csv&image=where&caption=says&label=kind")
    assert (source[0].captions, source[0].label) == (("one",), "x")
    with pytest.raises(
        DataError, match=r"no column of pictures; there are where, says, kind, text: name them by \?image="
    ):
        open_source(f"folder:{folder}?captions={tmp_path}/other.csv")
    with pytest.raises(DataError, match=r"no 'say' for \?caption=; there are where, says"):
        open_source(f"folder:{folder}?captions={tmp_path}/other.csv&image=where&caption=say")
    with pytest.raises(DataError, match=r"no file .*none\.csv"):
        open_source(f"folder:{folder}?captions=none.csv")


def test_bad_lines_are_bad_examples_with_their_numbers(folder):
    content = b"image,caption\na.jpg,good\n,no file\nb.png,caf\xe9\nmissing.jpg,gone\n"
    (folder / "captions.csv").write_bytes(content + b'sub/c.webp,\n"sub/c.webp","two\nlines"\nsub,a folder\n')
    source = open_source(f"folder:{folder}")
    assert len(source) == 6
    assert source[0].captions == ("good",)
    found = [bad(source, i) for i in (1, 2, 3, 5)]
    assert [reason for reason, _ in found] == ["unreadable", "encoding", "unreadable", "unreadable"]
    assert [f"captions.csv line {n}" in text for n, (_, text) in zip((3, 4, 5, 9), found, strict=True)] == [True] * 4
    assert source[4].captions == ("two\nlines",)


def test_bad_lines_of_json(folder):
    deep = b'{"image": ' + b"[" * 100_000
    lines = [
        b'{"image": "a.jpg", "text": "good"}',
        b"{",
        b"\xff",
        b"[1]",
        deep,
        b'{"image": "b.png"}',
        b'{"text": "no file"}',
    ]
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines))
    source = open_source(f"folder:{folder}")
    found = [bad(source, i) for i in range(1, 7)]
    reasons = ["unreadable", "encoding", "unreadable", "unreadable", "no_caption", "unreadable"]
    assert [reason for reason, _ in found] == reasons
    assert all(f"captions.jsonl line {i + 2}" in text for i, (_, text) in enumerate(found))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.jpg", "sub/../../secret.jpg", "~/x.jpg", "https://x.org/a.jpg"]
)
def test_paths_that_leave_the_folder(folder, tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "captions.csv").write_text(f"image,caption\na.jpg,x\n{name},secret\n")
    with pytest.raises(DataError, match=r"captions\.csv line 3: .*(leaves the folder|is an address)"):
        open_source(f"folder:{folder}")


def test_links_that_leave_the_folder(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "out" / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "out")
    (folder / "inside.jpg").symlink_to(folder / "a.jpg")
    (folder / "captions.csv").write_text("image,caption\nlink.jpg,x\nlinked/secret.jpg,x\ninside.jpg,x\n")
    source = open_source(f"folder:{folder}")
    for i in (0, 1):
        with pytest.raises(DataError, match=rf"captions\.csv line {i + 2}: .*is a link that leaves the folder"):
            source[i]
    assert source[2].image == b"a.jpg"


def test_a_pipe_is_no_picture(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "captions.csv").write_text("image,caption\npipe.jpg,x\n")
    assert bad(open_source(f"folder:{folder}"), 0)[0] == "unreadable"  # and does not wait for a writer


def test_files_that_cannot_be_read_as_captions(folder):
    (folder / "captions.csv").write_bytes(b"")
    with pytest.raises(DataError, match="holds no records"):
        open_source(f"folder:{folder}")
    with pytest.raises(DataError, match=r"read from \.csv, .* and \.parquet files"):
        open_source(f"folder:{folder}?captions=a.jpg")


@pytest.fixture
def classes(tmp_path):
    root = tmp_path / "classes"
    for name in ("n01/1.jpg", "n01/deep/2.JPG", "n02/3.png", "n02/notes.txt", "n02/._3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_a_folder_for_each_class(classes, tmp_path):
    source = open_source(f"folder:{classes}")
    assert [source[i].label for i in range(len(source))] == ["n01", "n01", "n02"]
    assert (source[1].key, source[1].captions) == ("n01/deep/2.JPG", ("a photo of a n01.",))
    (tmp_path / "names.json").write_text('{"n01": ["tench", "Tinca tinca"], "n02": "goldfish"}')
    named = open_source(f"folder:{classes}?classes={tmp_path}/names.json&template=a {{}}.&template=the {{}}, drawn")
    assert (named[2].label, named[2].captions) == ("goldfish", ("a goldfish.", "the goldfish, drawn"))
    assert named[0].captions == ("a tench.", "a Tinca tinca.", "the tench, drawn", "the Tinca tinca, drawn")
    assert named.class_names == {"tench": ["tench", "Tinca tinca"], "goldfish": ["goldfish"]}
    assert named.fingerprint() != source.fingerprint() == open_source(f"folder:{classes}").fingerprint()
    (classes / "0.jpg").write_bytes(b"0")
    with_one_outside = open_source(f"folder:{classes}")
    assert bad(with_one_outside, 0)[0] == "no_caption"
    assert with_one_outside.fingerprint() != source.fingerprint()


def test_every_file_that_looks_like_an_image_is_found_in_a_tree(tmp_path):
    kinds = [suffix.removeprefix(".") for suffix in pictures.SUFFIXES]
    assert {"jpg", "tif", "tiff", "avif", "heic", "jxl", "svg", "dng"} < set(kinds)
    for kind in kinds:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"0.{kind.upper()}").write_bytes(b"i")
    source = open_source(f"folder:{tmp_path}")
    assert [source[i].label for i in range(len(source))] == sorted(kinds)


def test_a_class_that_is_a_link_is_told(classes, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.jpg").write_bytes(b"4")
    os.symlink(tmp_path / "elsewhere", classes / "n03")
    os.symlink(classes, classes / "loop")
    source = open_source(f"folder:{classes}")
    assert {source[i].label for i in range(len(source))} == {"n01", "n02"}
    assert {str(classes / name) for name in ("n03", "loop")} == {record.args[0] for record in caplog.records}


def test_a_folder_without_captions_or_classes(folder, tmp_path):
    (folder / "sub" / "c.webp").unlink()
    with pytest.raises(DataError, match=r"have neither captions .captions.csv.* nor a folder for each class"):
        open_source(f"folder:{folder}")
    with pytest.raises(DataError, match=r"\?caption= names a column"):
        open_source(f"folder:{folder}?caption=x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no jpg, jpeg, jpe, jfif, png, webp, gif, bmp, tif, tiff, avif, heic, .* file"
    ):
        open_source(f"folder:{tmp_path}/empty")
    with pytest.raises(DataError, match=r"no folder .*none"):
        open_source(f"folder:{tmp_path}/none")


def test_in_a_bucket():
    system = fsspec.filesystem("memory")
    system.pipe(
        {
            "/set/captions.csv": b"image,caption\nx/a.jpg,one\n",
            "/set/x/a.jpg": b"a",
            "/cls/k/b.png": b"b",
            "/cls/l/c.png": b"c",
        }
    )
    try:
        assert everything(open_source("folder:memory://set")) == [(b"a", ("one",))]
        assert everything(open_source("folder:memory://cls")) == [
            (b"b", ("a photo of a k.",)),
            (b"c", ("a photo of a l.",)),
        ]
    finally:
        system.rm("/set", recursive=True)
        system.rm("/cls", recursive=True)


def test_fingerprint_knows_other_captions(folder):
    found = set()
    for text in ("one", "two", "one"):
        (folder / "captions.csv").write_text(f"image,caption\na.jpg,{text}\n")
        found.add(open_source(f"folder:{folder}").fingerprint())
    assert len(found) == 2
