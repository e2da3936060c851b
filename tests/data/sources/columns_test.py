"""What the columns of Parquet files are taken for: as Hugging Face, pandas and others write them."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import open_source, parquet

IMAGES = [{"bytes": b"image %d" % i, "path": None} for i in range(3)]


def source(path: pathlib.Path, columns: dict[str, Any], options: str = "", features: Any = None, **written: Any) -> Any:
    table = pa.table({"image": IMAGES} | columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = path / f"{len(list(path.iterdir()))}.parquet"
    pq.write_table(table, file, **written)
    return open_source(f"parquet:{file}{options}")


def read(opened: Any) -> list[Record]:
    return [opened[i] for i in range(len(opened))]


def captions(opened: Any) -> list[tuple[str, ...]]:
    return [record.captions for record in read(opened)]


CLASSES = {"names": ["golden_retriever", "cat", "fire-truck"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    "features",
    [
        {"label": CLASSES},
        {"label": CLASSES, "image": {"_type": "Image"}, "other": 7},
    ],
)
def test_numbers_of_a_class_label_are_its_names(tmp_path: pathlib.Path, features: Any) -> None:
    opened = source(tmp_path, {"label": [2, 0, 1]}, features=features)
    assert [record.label for record in read(opened)] == ["fire-truck", "golden_retriever", "cat"]
    assert captions(opened)[:2] == [("a photo of a fire truck.",), ("a photo of a golden retriever.",)]
    names = {"golden_retriever": ["golden retriever"], "cat": ["cat"], "fire-truck": ["fire truck"]}
    assert opened.class_names == names
    plain = source(tmp_path, {"label": [2, 0, 1]})
    assert plain.fingerprint() != opened.fingerprint()


@pytest.mark.parametrize("kind", ["Sequence", "List", "LargeList", "list"])
def test_a_list_of_one_class_label_is_that_label(tmp_path: pathlib.Path, kind: str) -> None:
    feature = [CLASSES] if kind == "list" else {"_type": kind, "feature": CLASSES}
    opened = source(tmp_path, {"labels": [[1], [0, 1], []]}, features={"labels": feature})
    assert opened[0].captions == ("a photo of a cat.",)
    for number, said in ((1, "2 labels and no caption"), (2, "no caption")):
        with pytest.raises(BadExample, match=said):
            opened[number]


def test_a_column_that_is_a_class_label_is_the_label_whatever_it_is_called(tmp_path: pathlib.Path) -> None:
    opened = source(tmp_path, {"breed": [0, -1, 1], "id": [7, 8, 9]}, features={"breed": CLASSES})
    assert opened[0].label == "golden_retriever" and opened[2].label == "cat"
    with pytest.raises(BadExample, match="no caption"):  # Hugging Face's -1: not labelled
        opened[1]


def test_of_several_labels_one_is_chosen_and_said(tmp_path: pathlib.Path) -> None:
    coarse = {"names": ["animal", "thing"], "_type": "ClassLabel"}
    columns = {"coarse_label": [0, 1, 0], "fine_label": [0, 2, 1]}
    opened = source(tmp_path, columns, features={"coarse_label": coarse, "fine_label": CLASSES})
    assert opened[1].label == "fire-truck"
    assert opened.remarks == ["labels are read from the column fine_label; there are also coarse_label: ?label="]
    other = source(tmp_path, columns, "?label=coarse_label", {"coarse_label": coarse, "fine_label": CLASSES})
    assert (other[1].captions, list(other.remarks)) == (("a photo of a thing.",), [])


def test_names_that_are_given_are_by_number(tmp_path: pathlib.Path) -> None:
    (tmp_path / "names.txt").write_text("dog\nhouse cat\nfire engine\n")
    opened = source(tmp_path, {"label": [2, 0, 1]}, f"?classes={tmp_path}/names.txt", {"label": CLASSES})
    assert captions(opened) == [("a photo of a fire engine.",), ("a photo of a dog.",), ("a photo of a house cat.",)]


def test_files_that_number_their_classes_in_another_way_are_not_one_source(tmp_path: pathlib.Path) -> None:
    source(tmp_path, {"label": [0, 0, 0]}, features={"label": CLASSES})
    source(tmp_path, {"label": [0, 0, 0]}, features={"label": CLASSES | {"names": ["cat", "dog", "x"]}})
    with pytest.raises(DataError, match=r"1\.parquet: its classes have other names than those of .*0\.parquet"):
        open_source(f"parquet:{tmp_path}/*.parquet")


@pytest.mark.parametrize("broken", [b"", b"[", b"[1]", b'{"info": null}', b'{"info": {"features": [3]}}', b"\xff"])
def test_metadata_that_cannot_be_read_are_none(tmp_path: pathlib.Path, broken: bytes) -> None:
    table = pa.table({"image": IMAGES, "caption": ["a", "b", "c"]}).replace_schema_metadata({"huggingface": broken})
    pq.write_table(table, tmp_path / "0.parquet")
    assert captions(open_source(f"parquet:{tmp_path}/0.parquet")) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("values", [[True, False, None], [0, 1, 2], [0.0, 1.0, float("nan")]])
def test_labels_without_names_make_no_caption(tmp_path: pathlib.Path, values: list[Any]) -> None:
    opened = source(tmp_path, {"label": values})
    assert opened[0].captions == opened[1].captions == ()


TEXTS = ["a red card", "two", "three"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array([text.encode() for text in TEXTS], pa.large_binary()),
        pa.array([text.encode() for text in TEXTS], pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([[text] for text in TEXTS]),
        pa.array([[text] for text in TEXTS], pa.large_list(pa.large_string())),
        pa.array([[[text, None], []] for text in TEXTS]),
        pa.array([{"raw": text, "tokens": text.split(), "sentid": 3} for text in TEXTS]),
        pa.array([[{"raw": text, "sentid": 3}] for text in TEXTS]),
        pa.array([{"raw": [text], "sentid": [3]} for text in TEXTS]),  # a Sequence of a dict
        pa.array([{"en": text, "score": 0.5} for text in TEXTS]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_caption_is_found_in_what_holds_text(tmp_path: pathlib.Path, column: pa.Array) -> None:
    for name in ("caption", "sentences"):
        assert captions(source(tmp_path, {name: column})) == [(text,) for text in TEXTS]


@pytest.mark.parametrize("kind", ["struct", "list", "map"])
def test_a_language_is_chosen(tmp_path: pathlib.Path, kind: str) -> None:
    both = [{"en": text, "de": f"de {text}"} for text in TEXTS]
    columns: dict[str, Any] = {"caption": both}
    if kind == "list":
        columns = {"caption": [[one] for one in both]}
    if kind == "map":
        columns = {"caption": pa.array([list(one.items()) for one in both], pa.map_(pa.string(), pa.string()))}
    assert captions(source(tmp_path, columns, "?caption=caption.de")) == [(f"de {text}",) for text in TEXTS]
    assert captions(source(tmp_path, columns, "?caption=caption.de,caption.en"))[1] == ("de two", "two")
    said = r"write \?caption=caption\.KEY" if kind == "map" else r"\(en, de\): \?caption=caption\.en or \?caption=capt"
    with pytest.raises(DataError, match=said):
        source(tmp_path, columns)
    if kind != "map":
        with pytest.raises(DataError, match=r"no 'caption\.fr' for \?caption=; there are image, caption\.en, cap"):
            source(tmp_path, columns, "?caption=caption.fr")


def test_several_columns_are_several_captions(tmp_path: pathlib.Path) -> None:
    columns = {"caption_a": ["a", "b", None], "caption_b": ["c", None, "d"], "caption_length": [1, 1, 1]}
    assert captions(source(tmp_path, columns, "?caption=caption_a,caption_b")) == [("a", "c"), ("b",), ("d",)]
    with pytest.raises(DataError, match=r"name them by \?caption=caption_a,caption_b \(or \?label=\)"):
        source(tmp_path, columns)
    numbered = {f"caption_{i}": [f"{i} {text}" for text in TEXTS] for i in range(5)}
    assert captions(source(tmp_path, numbered))[1] == tuple(f"{i} two" for i in range(5))


@pytest.mark.parametrize(
    ("column", "kind"), [([2024, 7, 1], "int64"), ([True, False, True], "bool"), ([0.5, 1.0, 2.0], "double")]
)
def test_what_is_no_text_is_no_caption(tmp_path: pathlib.Path, column: list[Any], kind: str) -> None:
    with pytest.raises(DataError, match=f"the column 'text' holds {kind}, which is no caption: name one with texts"):
        source(tmp_path, {"text": column})
    with pytest.raises(DataError, match=f"the column 'text' holds {kind}"):
        source(tmp_path, {"text": column, "title": TEXTS}, "?caption=text")
    assert captions(source(tmp_path, {"text": column, "title": TEXTS}))[1] == ("two",)  # another one is called so


def test_what_stands_for_a_missing_text_is_no_caption(tmp_path: pathlib.Path) -> None:
    opened = source(tmp_path, {"caption": [["nan", "a"], ["None"], ["<NA>", " "]]})
    assert opened[0].captions == ("a",)
    for number in (1, 2):
        with pytest.raises(BadExample, match="no caption"):
            opened[number]


def test_a_list_of_images_are_the_frames_of_a_clip(tmp_path: pathlib.Path) -> None:
    clips = [[IMAGES[0], IMAGES[1]], [IMAGES[2]], []]
    opened = source(tmp_path, {"image": clips, "caption": TEXTS})
    assert (opened[0].image, opened[0].frames) == (b"image 0", (b"image 1",))
    assert (opened[1].image, opened[1].frames) == (b"image 2", ())
    with pytest.raises(BadExample, match="has no picture"):
        opened[2]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_of_all_kinds_of_bytes(tmp_path: pathlib.Path, kind: pa.DataType) -> None:
    opened = source(tmp_path, {"image": pa.array([b"a", b"b", b"c"], kind), "caption": TEXTS})
    assert [record.image for record in read(opened)] == [b"a", b"b", b"c"]


def test_pixels_and_base64_are_refused_by_what_they_are(tmp_path: pathlib.Path) -> None:
    text = pa.array(["a", "b", "c"])
    for pixels in ([[1, 2], [3], []], [[[0.5]], [], []], [1, 2, 3]):
        with pytest.raises(DataError, match=r"the column 'image' holds (int64|double), which is no image"):
            source(tmp_path, {"image": pixels, "text": text})
    opened = source(tmp_path, {"image": ["/9j/" + "A" * 300, "iVBORw0KGgo" + "A" * 300, "a.jpg"], "text": text})
    for index in (0, 1):
        with pytest.raises(DataError, match="is an image in base64, which is not read: write its bytes") as error:
            opened[index]
        assert len(str(error.value)) < 300
    with pytest.raises(BadExample, match=r"a\.jpg cannot be read"):
        opened[2]


def test_an_image_column_is_known_by_its_type(tmp_path: pathlib.Path) -> None:
    table = pa.table({"photo": IMAGES, "caption": TEXTS})
    pq.write_table(table, tmp_path / "0.parquet")
    assert open_source(f"parquet:{tmp_path}/0.parquet")[1].image == b"image 1"


def test_a_column_with_a_dot_in_its_name(tmp_path: pathlib.Path) -> None:
    opened = source(tmp_path, {"text.en": TEXTS, "text": [{"en": "x"}] * 3}, "?caption=text.en")
    assert captions(opened)[0] == ("a red card",)


def test_a_large_row_group_is_read_in_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_WHOLE", 1 << 16)
    monkeypatch.setattr(parquet, "_PART", 1 << 14)
    images = [os.urandom(1000) for _ in range(400)]
    opened = source(tmp_path, {"image": images, "caption": [f"text {i}" for i in range(400)]}, row_group_size=300)
    assert "row groups unpack to 0.0 GiB: a random record costs seconds" in opened.remarks[0]
    for order in (range(400), (399, 3, 250, 2, 299, 300, 0, 301)):
        assert [opened[i].image for i in order] == [images[i] for i in order]
    kept = opened.source._local.kept
    assert max(part.table.num_rows for part in kept.values()) <= 100
