"""Karpathy's splits, from small files of their two forms: COCO's, with folders, and Flickr's, without."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from coca_jax.data import sources
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import files


def image(name: str, split: str, captions: list[str], number: int, **more: Any) -> dict[str, Any]:
    """An entry as those files have it, with all that is not read."""
    sentences = [
        {"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": number, "sentid": 10 * number + at}
        for at, text in enumerate(captions)
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    return {"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": name} | more


@pytest.fixture
def coco(tmp_path: pathlib.Path) -> pathlib.Path:
    images = [
        image("COCO_val2014_000000391895.jpg", "test", ["A man.", "A moped. ", "A road."], 0, filepath="val2014"),
        image("COCO_train2014_000000000009.jpg", "train", ["Bread."], 1, filepath="train2014", cocoid=9),
        image("COCO_val2014_000000000042.jpg", "restval", ["Shoes."], 2, filepath="val2014"),
        image("COCO_val2014_000000000073.jpg", "test", ["A motorbike.", "", "Two."], 3, filepath="val2014"),
    ]
    for entry in images:
        file = tmp_path / entry["filepath"] / entry["filename"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(entry["filename"].encode())
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_a_split_of_coco(coco: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = sources.open_source(f"karpathy:{coco}?split=test")
    assert len(found) == 2
    assert found[0].captions == ("A man.", "A moped.", "A road.") and found[1].captions == ("A motorbike.", "Two.")
    assert found[0].image == b"COCO_val2014_000000391895.jpg" and found[1].key.startswith("val2014/COCO")
    trained = sources.open_source(f"karpathy:{coco}?split=train,restval")
    assert [trained[i].captions for i in range(2)] == [("Bread.",), ("Shoes.",)]
    first = sources.open_source(f"karpathy:{coco}?split=test&captions=2")
    assert [first[i].captions for i in range(2)] == [("A man.", "A moped."), ("A motorbike.", "Two.")]
    assert len({s.fingerprint() for s in (found, trained, first)}) == 3
    # The annotations lie elsewhere.
    moved = tmp_path / "annotations" / "d.json"
    moved.parent.mkdir()
    coco.rename(moved)
    again = sources.open_source(f"karpathy:{moved}?split=test&root={tmp_path}")
    assert again[0] == found[0] and again.fingerprint() == found.fingerprint()


def test_flickr_has_no_folders(tmp_path: pathlib.Path) -> None:
    (tmp_path / "1000092795.jpg").write_bytes(b"x")
    images = [image("1000092795.jpg", "val", [f"Caption {n}." for n in range(5)], 0), image("2.jpg", "val", ["B."], 1)]
    images.append(image("3.jpg", "val", [], 2))
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    found = sources.open_source(f"karpathy:{tmp_path}/dataset_flickr30k.json?split=val")
    assert len(found) == 3 and len(found[0].captions) == 5
    with pytest.raises(BadExample, match=r"'2\.jpg': .*/2\.jpg cannot be read") as error:
        found[1]
    assert error.value.reason == "unreadable"
    with pytest.raises(BadExample, match=r"'3\.jpg' has no sentence"):
        found[2]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, "split=test", "cannot be read"),
        ("{", "split=test", "is not JSON"),
        ("[]", "split=test", "has no list `images`"),
        ('{"images": []}', "split=test", "has no list `images`"),
        (
            '{"images": [{"split": "test", "filename": 3, "sentences": []}]}',
            "split=test",
            "0 has no usable `file",
        ),
        ('{"images": [7]}', "split=test", "image 0 has no usable `split`"),
        ("good", "split=dev", "no split 'dev' in .*d.json; there are test, val"),
        ("good", "captions=2", r"say which split: \?split=NAME; there are test, val"),
        ("good", "split=test&captions=none", "captions=none: write how many"),
        ("good", "splits=test", "no option 'splits'; did you mean split"),
        ("leaves", "split=test", "leaves the folder"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: pathlib.Path, content: str | None, options: str, message: str) -> None:
    if content in ("good", "leaves"):
        name = "a.jpg" if content == "good" else "../a.jpg"
        content = json.dumps({"images": [image(name, split, ["A."], 0) for split in ("test", "val")]})
    if content is not None:
        (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        sources.open_source(f"karpathy:{tmp_path}/d.json?{options}")
    assert "\n" not in str(error.value)


def test_a_file_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"images": [{"filename": "0.jpg", "split": "test", "sentences": [{"raw": "a"}]}]}'
    monkeypatch.setattr(files, "read", lambda *_, **__: content)
    monkeypatch.setattr(files, "picture", lambda root, relative, where: f"{root} {relative}".encode())
    specs = {name: f"karpathy:{name}?split=test" for name in ("/x.json", "x.json")}
    found = {name: sources.open_source(spec)[0].image for name, spec in specs.items()}
    assert found == {"/x.json": b"/ 0.jpg", "x.json": b". 0.jpg"}
