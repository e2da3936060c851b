"""Files of captions as people and programs write them: no row that names an image vanishes."""

from __future__ import annotations

import json
import pathlib
import time
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import Source, open_source

NAMES = ("a.jpg", "b.jpg", "c.jpg")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for name in (*NAMES, "sub/d.jpg"):
        (root / name).write_bytes(name.encode())
    return root


def remarks(source: Source) -> str:
    return "\n".join(getattr(source, "remarks", ()))


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {source[i].key: source[i].captions for i in range(len(source))}


THREE = {name: (f"a {name[0]}, card",) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "filepath\ttitle\n{0}\ta a, card\n{1}\ta b, card\n{2}\ta c, card\n", "a tab"),  # open_clip
        ("captions.csv", "image;caption\n{0};a a, card\n{1};a b, card\n{2};a c, card\n", "a semicolon"),
        ("captions.tsv", "image,caption\n{0},\"a a, card\"\n{1},\"a b, card\"\n{2},\"a c, card\"\n", "a comma"),
        ("captions.csv", "image_name| n| comment\n{0}| 0| a a, card\n{1}| 0| a b, card\n{2}|0|a c, card\n", "a pipe"),
        ("captions.csv", "{0},\"a a, card\"\n{1},\"a b, card\"\n{2},\"a c, card\"\n", "no header: column 1"),
        ("captions.tsv", "1\t{0}\ta a, card\n2\t{1}\ta b, card\n3\t{2}\ta c, card\n", "column 2 is the image"),
        ("captions.txt", "{0}#0\ta a, card\n{1}#0\ta b, card\n{2}#0\ta c, card\n", "no header"),  # Flickr8k.token.txt
        ("captions.csv", "FILE NAME,Caption\r\n{0},\"a a, card\"\r\n\r\n{1},\"a b, card\"\r\n{2},\"a c, card\"", ""),
        ("captions.csv", "img,sentence\r{0},\"a a, card\"\r{1},\"a b, card\"\r{2},\"a c, card\"\r", ""),
        ("captions.csv", "image,caption\n{0},a a, card\n{1},a b, card\n{2},a c, card\n", "3 rows with too many fields"),
        ("captions.csv", "image,caption,,\n{0},\"a a, card\",,\n{1},\"a b, card\",,\n{2},\"a c, card\",,\n", ""),
        ("captions.csv", "sep=;\r\nimage;caption\n{0};a a, card\n{1};a b, card\n{2};a c, card\n", "semi"),  # Excel
        ("captions.csv", "image,caption\n.\\{0},\"a a, card\"\nC:\\x\\{1},\"a b, card\"\n/y/{2},\"a c, card\"\n", ""),
    ],
)  # fmt: skip
def test_separators_headers_and_line_ends_are_recognized(
    folder: pathlib.Path, name: str, content: str, said: str
) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        (folder / name).write_bytes(content.format(*NAMES).encode(encoding))
        source = open_source(f"folder:{folder}")
        assert captions(source) == THREE, encoding
        assert said in remarks(source)
        assert "1 image that no row names (sub/d.jpg): not read" in remarks(source)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_a_quotation_mark_swallows_no_row(folder: pathlib.Path, separator: str) -> None:
    """A quotation is one where it begins and ends its field; it may hold line ends, but no other image's row."""
    rows = [
        ("image", "caption"),
        ("a.jpg", '"Stop" sign on a card'),
        ("b.jpg", '"left open'),
        ("c.jpg", '5" screen'),
        ("sub/d.jpg", '"said ""no"" to\nthe ' + separator + ' end"'),
    ]
    (folder / "captions.csv").write_text("\n".join(separator.join(row) for row in rows) + "\n")
    assert captions(open_source(f"folder:{folder}")) == {
        "a.jpg": ('"Stop" sign on a card',),
        "b.jpg": ('"left open',),
        "c.jpg": ('5" screen',),
        "sub/d.jpg": (f'said "no" to\nthe {separator} end',),
    }


def test_long_fields_and_zero_bytes_cost_no_file(folder: pathlib.Path) -> None:
    long = "word " * 50_000
    (folder / "captions.csv").write_text(f"image,caption,Caption\na.jpg,{long},two\nb.jpg,o\0ne,two\nc.jpg,one\n")
    source = open_source(f"folder:{folder}")
    assert captions(source) == {"a.jpg": (long, "two"), "b.jpg": ("one", "two"), "c.jpg": ("one",)}
    assert "1 row with too few fields, e.g. line 4" in remarks(source)


def test_a_line_of_many_megabytes_is_one_bad_example(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text(f"image,caption\na.jpg,{'x' * (5 << 20)}\nb.jpg,two\n")
    source = open_source(f"folder:{folder}")
    with pytest.raises(BadExample, match=r"captions\.csv line 2: the line is longer than 4 MiB"):
        source[0]
    assert source[1].captions == ("two",)


def test_an_open_quotation_costs_no_more_than_its_lines(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text('image,caption\na.jpg,"' + "left open\n" * 3_000 + "b.jpg,two\n")
    source = open_source(f"folder:{folder}")
    assert source[0].captions == ('"left open',)
    assert source[len(source) - 1].captions == ("two",)
    assert "rows with too few fields" in remarks(source)


def test_marks_that_never_close_cost_little_time(folder: pathlib.Path) -> None:
    """Each opens what may be a quotation of many lines, or a field among very many."""
    empty = '"",' * 50_000
    many = "".join(f'{n}.jpg,"open\n' for n in range(3_000))
    (folder / "captions.csv").write_text(f"image,caption\n{many}a.jpg,{empty}x\n")
    started = time.process_time()
    source = open_source(f"folder:{folder}")
    assert time.process_time() - started < 5
    assert source[len(source) - 1].key == "a.jpg"


def test_absolute_paths_inside_the_folder(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text(f"image,caption\n{folder}/a.jpg,one\n{folder}/sub/d.jpg,two\n")
    assert captions(open_source(f"folder:{folder}")) == {"a.jpg": ("one",), "sub/d.jpg": ("two",)}


def test_a_tilde_is_the_home(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "texts.csv").write_text("image,caption\na.jpg,one\n")
    (folder.parent / "names.txt").write_text("x\n")
    for spec in (
        *("folder:~/set?captions=~/texts.csv", "folder:~/texts.csv?root=~/set"),
        "folder:~/set?captions=~/texts.csv&classes=~/names.txt",
    ):
        assert captions(open_source(spec)) == {"a.jpg": ("one",)}


TWO = {"a.jpg": ("one", "two"), "b.jpg": ("three",)}


@pytest.mark.parametrize(
    "found",
    [
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],  # COCO's captions_*.json
            "annotations": [{"image_id": i, "caption": c} for i, c in ((7, "one"), (8, "three"), (7, "two"))],
        },
        [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}],
        [{"img": "a.jpg", "sentences": [{"raw": "one"}, {"raw": "two"}]}, {"img": "b.jpg", "sentences": ["three"]}],
        {"a.jpg": ["one", "two"], "b.jpg": "three"},
        {"image": ["a.jpg", "b.jpg"], "caption": [["one", "two"], "three"]},
        {"version": 1, "data": [{"image": "a", "captions": ["one", "two"]}, {"image": "b", "captions": ["three"]}]},
    ],
)  # fmt: skip
def test_forms_of_json(folder: pathlib.Path, found: object) -> None:
    (folder / "texts.json").write_text(json.dumps(found))
    assert captions(open_source(f"folder:{folder}")) == TWO  # recognized by what it holds
    assert captions(open_source(f"folder:{folder}?captions=texts.json")) == TWO


def test_json_by_its_content_and_not_by_its_name(folder: pathlib.Path) -> None:
    rows = [{"image": image, "caption": list(texts)} for image, texts in TWO.items()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in (
        ("json", lines),
        ("jsonl", json.dumps(rows)),
        ("jsonl", f"\ufeff\n{json.dumps(rows, indent=1)}"),
    ):
        path = folder / f"captions.{name}"
        path.write_text(text)
        assert captions(open_source(f"folder:{folder}")) == TWO
        path.unlink()


def test_several_labels_in_one_field_are_no_name(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text("image,label\na.jpg,\"['cat', 'dog']\"\nb.jpg,\"['red_fox']\"\n")
    source = open_source(f"folder:{folder}")
    with pytest.raises(BadExample, match=r"has 2 labels and no caption: name a column with one by \?label="):
        source[0]
    assert (source[1].label, source[1].captions) == ("red_fox", ("a photo of a red fox.",))


@pytest.mark.parametrize(
    "row",
    [
        '"[""one"", ""two""]"',  # JSON: Flickr30k's flickr_annotations_30k.csv
        "\"['one', 'two']\"",  # Python
        "\"['one' 'two']\"",  # NumPy
        "\"['o\\x6ee', 'two', '']\"",
    ],
)
def test_a_list_of_captions_in_print_is_several_captions(folder: pathlib.Path, row: str) -> None:
    (folder / "captions.csv").write_text(f"image,captions\na.jpg,{row}\nb.jpg,\"['three']\"\n")
    assert captions(open_source(f"folder:{folder}")) == TWO
    (folder / "captions.csv").write_text("image,caption\na.jpg,[one] and 'two'\nb.jpg,\"['three'], ['x']\"\n")
    assert captions(open_source(f"folder:{folder}"))["a.jpg"] == ("[one] and 'two'",)  # brackets alone are text
    assert captions(open_source(f"folder:{folder}"))["b.jpg"] == ("['three'], ['x']",)


def test_names_in_the_other_form_of_unicode(folder: pathlib.Path) -> None:
    (folder / unicodedata.normalize("NFD", "caf\u00e9.jpg")).write_bytes(b"i")  # as a Mac's archive has it
    (folder / "captions.csv").write_text("image,caption\ncaf\u00e9.jpg,one\na.jpg,N/A\n")
    source = open_source(f"folder:{folder}")
    assert source[0].captions == ("one",)
    with pytest.raises(BadExample, match="has no caption"):
        source[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("3", "is no file of captions"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}', "none of its annotations"),
        ('{"images": [{"filename": "a.jpg", "sentences": []}]}', "write karpathy:"),
        ('[{"name": "a.jpg", "caption": "x"}]', "no column of pictures; there are name, caption"),
    ],
)
def test_json_of_another_kind_is_explained(folder: pathlib.Path, text: str, message: str) -> None:
    (folder / "texts.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_source(f"folder:{folder}?captions=texts.json")
    assert "\n" not in str(error.value)


def test_several_columns_of_captions(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text("image,caption_1,caption_2,note\na.jpg,one,two,x\nb.jpg,three,,y\n")
    assert captions(open_source(f"folder:{folder}")) == TWO
    assert captions(open_source(f"folder:{folder}?caption=note,Caption_1"))["a.jpg"] == ("x", "one")


def test_a_split_is_chosen_by_its_column(folder: pathlib.Path) -> None:
    (folder / "captions.csv").write_text("image,caption,split\na.jpg,one,train\nb.jpg,two,val\nc.jpg,three,test\n")
    assert list(captions(open_source(f"folder:{folder}?split=validation"))) == ["b.jpg"]
    assert "all splits are read (test, train, val)" in remarks(open_source(f"folder:{folder}"))
    with pytest.raises(DataError, match=r"no split 'x' in .*; there are test, train, val"):
        open_source(f"folder:{folder}?split=x")


def test_metadata_of_hugging_face_as_parquet(folder: pathlib.Path) -> None:
    table = pyarrow.table({"image_file_name": list(NAMES), "text": [["one", "two"], ["three"], None]})
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    source = open_source(f"folder:{folder}")
    assert [source[i].captions for i in (0, 1)] == [("one", "two"), ("three",)]
    with pytest.raises(BadExample, match="has no caption"):
        source[2]
