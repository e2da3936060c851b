"""Folders of images as tools and people leave them: what is read, what is not, and what is refused."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import Source, open_source


def write(root: pathlib.Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return f"folder:{root}"


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {source[i].key: source[i].captions for i in range(len(source))}


def remarks(source: Source) -> str:
    return "\n".join(getattr(source, "remarks", ()))


def refusal(spec: str) -> str:
    with pytest.raises(DataError) as error:
        open_source(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_files_of_img2dataset(tmp_path) -> None:
    spec = write(
        tmp_path,
        {
            **{f"0000{n}/0000{n}0000{i}.jpg": "i" for n in range(2) for i in range(2)},
            **{f"0000{n}/0000{n}0000{i}.txt": f"card {n} {i}\n" for n in range(2) for i in range(2)},
            **{f"0000{n}/0000{n}0000{i}.json": '{"caption": "no"}' for n in range(2) for i in range(2)},
            "00000_stats.json": "{}",
            "00001/000010007.txt": "its image was lost",
            "00001/000010008.jpg": "its text was lost",
        },
    )
    source = open_source(spec)
    assert [(source[i].captions, source[i].label) for i in range(len(source))] == [
        ((f"card {n} {i}",), "") for n in range(2) for i in range(2)
    ]
    assert "1 image without a text beside it (00001/000010008.jpg): not read" in remarks(source)
    assert "2 texts without an image (00000_stats.json, 00001/000010007.txt): not read" in remarks(source)


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        *(("txt", "a card"), ("caption", "\ufeffa card\n"), ("json", '{"text": "a card"}')),
        ("json", '{"captions": ["a card"], "width": 3}'),
    ],
)
def test_texts_beside_images(tmp_path, ending: str, text: str) -> None:
    flat = write(tmp_path / "flat", {"a.jpg": "a", f"a.{ending}": text, "b.jpg": "b", f"b.{ending}": ""})
    source = open_source(flat)
    assert source[0].captions == ("a card",)
    with pytest.raises(BadExample, match=r"has no caption|is not JSON"):
        source[1]
    names = ("cat/a", "dog/deep/b")
    nested = write(tmp_path / "nested", {f"{n}.{e}": t for n in names for e, t in (("JPG", "i"), (ending, text))})
    source = open_source(nested)
    assert [(source[i].captions, source[i].label) for i in (0, 1)] == [(("a card",), "cat"), (("a card",), "dog")]


def test_annotations_of_objects_are_no_captions(tmp_path) -> None:
    yolo, named = "0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1\n", "car 0.5 0.5 0.1 0.1\n"
    kitti = "Car 0.00 0 -1.57 387.63 181.54 423.81 203.12 1.5 1.6 4.4 -16.5 2.4 58.5 -1.6\n"
    for text in (yolo, named, kitti, "1.0e+02,20,30,40,50,60,70,80,plane,0"):
        assert "hold no words, e.g. a.txt" in refusal(write(tmp_path, {"a.jpg": "a", "a.txt": text}))
    assert len(open_source(write(tmp_path, {"a.txt": "numbers 1, 2, 3 and 4 on a wall"}))) == 1


def test_texts_are_found_by_other_endings_and_beside_empty_ones(tmp_path) -> None:
    files = {"a.jpg": "i", "a.TXT": "one", "b.JPG": "i", "b.JPG.txt": "two", "c.png": "i", "c.Caption": "three"}
    source = open_source(write(tmp_path / "a", files))
    assert captions(source) == {"a.jpg": ("one",), "b.JPG": ("two",), "c.png": ("three",)}
    files = {f"{n}.{end}": "a card" if n > 5 else "" for n in range(9) for end in ("jpg", "txt")}
    assert len(open_source(write(tmp_path / "b", files))) == 9


def _classes(*parts: str) -> dict[str, str]:
    return {f"{part}/{name}.jpg": "i" for part in parts for name in "ab"}


def test_folders_of_splits(tmp_path) -> None:
    spec = write(tmp_path, _classes("train/cat", "train/dog", "Val/cat", "Val/dog", "test2017/cat", "test2017/dog"))
    source = open_source(spec)
    assert {source[i].captions for i in range(len(source))} == {("a photo of a cat.",), ("a photo of a dog.",)}
    assert all(source[i].key.startswith("train/") for i in range(len(source)))
    assert "split train is read, Val, test2017 not: ?split=NAME chooses" in remarks(source)
    for name, keys in (("validation", "Val"), ("val", "Val"), ("test", "test2017"), ("test2017", "test2017")):
        chosen = open_source(f"{spec}?split={name}")
        assert {chosen[i].key.partition("/")[0] for i in range(len(chosen))} == {keys}
    assert len(open_source(f"{spec}?split=train,val")) == 8
    assert len({open_source(f"{spec}?split={name}").fingerprint() for name in ("train", "val", "test")}) == 3
    assert "no split 'dev2'" in (text := refusal(f"{spec}?split=dev2")) and "Val, test2017, train" in text


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train_images", "test_images"),
        ("TrainSet", "TestSet"),
        ("seg_train", "seg_test"),
        ("images_train", "images_val"),
    ],
)
def test_splits_are_told_by_a_word_of_their_folder(tmp_path, train: str, test: str) -> None:
    spec = write(tmp_path / "x", _classes(f"{train}/cat", f"{train}/dog", f"{test}/cat"))
    assert {key.partition("/")[0] for key in captions(open_source(spec))} == {train}
    assert "have neither captions" in refusal(write(tmp_path / "y", _classes(train, test)))
    assert "have neither captions" in refusal(write(tmp_path / "z", _classes("trainA", "trainB", "testA")))
    source = open_source(write(tmp_path / "words", _classes("contest", "training shoes", "trainer")))
    assert {source[i].label for i in range(len(source))} == {"contest", "training shoes", "trainer"}


def test_one_file_for_folders_of_splits(tmp_path) -> None:
    rows = "file_name,text\ntrain/a.jpg,one\ntrain/b.jpg,two\ntest/a.jpg,three\n"
    spec = write(tmp_path, {**_classes("train", "test"), "metadata.csv": rows})
    assert len(open_source(spec)) == 3 and "all splits are read (test, train)" in remarks(open_source(spec))
    assert captions(open_source(f"{spec}?split=test")) == {"test/a.jpg": ("three",)}


def test_a_train_among_other_classes_is_a_class(tmp_path) -> None:
    source = open_source(write(tmp_path, _classes("train", "car", "plane")))
    assert {source[i].label for i in range(len(source))} == {"train", "car", "plane"}
    assert "say which split by ?split=NAME: in" in refusal(write(tmp_path / "x", _classes("val/cat", "test/cat")))


def test_metadata_in_splits_and_below(tmp_path) -> None:
    rows = "file_name,text\nx/a.jpg,one\nx/b.jpg,two\n"
    spec = write(
        tmp_path / "s", {**_classes("train/x", "test/x"), "train/metadata.csv": rows, "test/metadata.csv": rows}
    )
    assert captions(open_source(spec)) == {"train/x/a.jpg": ("one",), "train/x/b.jpg": ("two",)}
    lines = "\n".join(json.dumps({"file_name": f"{name}.jpg", "text": name}) for name in "ab")
    spec = write(tmp_path / "n", {**_classes("x", "y/z"), "x/metadata.jsonl": lines, "y/z/metadata.jsonl": lines})
    assert captions(open_source(spec)) == {f"{p}/{n}.jpg": (n,) for p in ("x", "y/z") for n in "ab"}


def test_hidden_files_are_no_classes_and_no_images(tmp_path) -> None:
    hidden = (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "red/.ipynb_checkpoints", "$RECYCLE.BIN")
    files = {**_classes("red", "green", *hidden), "red/._a.jpg": "i", "Thumbs.db": "x", ".DS_Store": "x"}
    source = open_source(write(tmp_path, files))
    assert {source[i].key for i in range(len(source))} == {f"{c}/{n}.jpg" for c in ("red", "green") for n in "ab"}
    assert "7 hidden files or folders ($RECYCLE.BIN, .ipynb_checkpoints, .thumbnails, ...): passed over" in remarks(
        source
    )


@pytest.mark.parametrize(
    ("images", "name", "content"),
    [
        ("Images", "captions.txt", "image,caption\na.jpg,one\na.jpg,\"two, or\"\nb.jpg,three\n"),  # Kaggle's Flickr8k
        ("Flicker8k_Dataset", "Flickr8k_text/Flickr8k.token.txt", "a.jpg#0\tone\na.jpg#1\ttwo, or\nb.jpg#0\tthree\n"),
        ("flickr30k_images", "results.csv", "image| n| comment\na.jpg| 0| one\na.jpg| 1| two, or\nb.jpg| 0| three"),
        ("photos", "my texts.csv", "path,description\na.jpg,one\na.jpg,\"two, or\"\nb.jpg,three\n"),
        ("2019/07", "labels.jsonl", '{"img": "a", "text": ["one", "two, or"]}\n{"img": "b", "text": "three"}\n'),
    ],
)  # fmt: skip
def test_a_file_of_captions_beside_its_folder_of_images(tmp_path, images: str, name: str, content: str) -> None:
    files = {**_classes(images), name: content, "readme.txt": "These are,\nmany images\n"}
    files["Flickr8k_text/Flickr8k.lemma.token.txt" if "token" in name else "x.txt"] = content.replace("one", "1")
    if "token" not in name:
        del files["x.txt"]
    expected = {f"{images}/a.jpg": ("one", "two, or"), f"{images}/b.jpg": ("three",)}
    spec = write(tmp_path, files)
    assert captions(open_source(spec)) == expected
    assert captions(open_source(f"{spec}?captions={name}")) == expected
    elsewhere = pathlib.Path(write(tmp_path / "elsewhere", {"c.csv": "image,caption\na.jpg,one\n"}).partition(":")[2])
    for again in (f"folder:{elsewhere}?root={tmp_path}/{images}", f"folder:{elsewhere}/c.csv?root={tmp_path}/{images}"):
        assert captions(open_source(again)) == {"a.jpg": ("one",)}
    assert "name their folder by ?root=FOLDER" in refusal(f"folder:{elsewhere}?captions=c.csv")


def test_coco_as_it_is_unpacked(tmp_path) -> None:
    def annotations(name: str) -> str:
        found = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": f"of {name}"}]}
        return json.dumps(found)

    spec = write(
        tmp_path,
        {
            **{"train2017/1.jpg": "i", "val2017/2.jpg": "i"},
            "annotations/captions_train2017.json": annotations("1.jpg"),
            "annotations/captions_val2017.json": annotations("2.jpg"),
            "annotations/instances_train2017.json": annotations("1.jpg").replace("caption", "category_id"),
        },
    )
    assert captions(open_source(spec)) == {"train2017/1.jpg": ("of 1.jpg",)}
    assert captions(open_source(f"{spec}?split=val")) == {"val2017/2.jpg": ("of 2.jpg",)}


def test_tables_that_are_splits(tmp_path) -> None:
    files = {f"{split}.csv": f"image,caption\n{name}.jpg,{split}\n" for split, name in (("train", "a"), ("test", "b"))}
    spec = write(tmp_path, {"a.jpg": "i", "b.jpg": "i", **files})
    assert captions(open_source(spec)) == {"a.jpg": ("train",)}
    assert captions(open_source(f"{spec}?split=test")) == {"b.jpg": ("test",)}
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").rename(tmp_path / f"captions_{split}2014.csv")
    assert captions(open_source(f"{spec}?split=test")) == {"b.jpg": ("test",)}
    (tmp_path / "captions_train2014.csv").rename(tmp_path / "one.csv")
    (tmp_path / "captions_test2014.csv").rename(tmp_path / "test.csv")
    assert "say which, ?captions=one.csv" in refusal(spec)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("Images",), "lie in one folder, 'Images', which is no class without another"),
        (("2021-05", "2021-06"), "whose names are no words, e.g. '2021-05'"),
        (("00000", "00001"), "name them by ?classes=FILE"),
        (("n01440764", "n01443537"), "name them by ?classes=imagenet"),
        (("pets/cat", "pets/dog", "wild/fox"), "folders within folders, e.g. 'pets/cat/a.jpg': which is the class?"),
        (("images/00", "images/01"), "lie in one folder, 'images'"),
        (("set/data/cat", "set/data/dog"), "/set/data; found"),
        (("images", "masks"), "named for files and not for what they show, e.g. 'images'"),
        (("input", "target"), "named for files and not for what they show, e.g. 'input'"),
        (("batch_1", "batch_2"), "whose names are no words, e.g. 'batch_1'"),
        (("100APPLE", "101APPLE"), "whose names are no words, e.g. '100APPLE'"),
        (("no", "yes"), "whose names are no words, e.g. 'no'"),
    ],
)
def test_what_looks_like_nothing_known_is_refused_with_what_was_found(tmp_path, folders, message: str) -> None:
    text = refusal(write(tmp_path, {**_classes(*folders), "notes.txt": "these are, many words\n"}))
    assert message in text and f"found {2 * len(folders)} images ({sorted(folders)[0]}/a.jpg, " in text
    assert "1 file of text or data (notes.txt)" in text and "captions.csv" in text


def test_classes_that_are_counted_from_one_are_not_shifted(tmp_path) -> None:
    spec = write(tmp_path / "set", _classes("1", "2", "3"))
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\n")
    assert "does not name '3': line n of a file is class n, counted from 0" in refusal(
        f"{spec}?classes={tmp_path}/names.txt"
    )
    (tmp_path / "names.json").write_text('{"1": "cat", "2": "dog", "3": "fox"}')
    assert open_source(f"{spec}?classes={tmp_path}/names.json")[0].captions == ("a photo of a cat.",)


def test_files_of_other_kinds_are_counted(tmp_path) -> None:
    source = open_source(
        write(tmp_path, {**_classes("cat", "dog"), "cat/c.jpg?w=600": "i", "dog/d.jpg ": "i", "e": "i"})
    )
    said = "3 files that are no images or texts by their endings (cat/c.jpg?w=600, dog/d.jpg , e): not read"
    assert len(source) == 4 and said in remarks(source)


def test_names_that_are_no_files_are_counted(tmp_path) -> None:
    spec = write(tmp_path, _classes("cat", "dog"))
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "dog" / "lost.jpg").symlink_to(tmp_path / "nowhere")
    source = open_source(spec)
    assert len(source) == 4
    assert "2 pipes, devices, sockets or broken links (cat/pipe.jpg, dog/lost.jpg): not read" in remarks(source)
