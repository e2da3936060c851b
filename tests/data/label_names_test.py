"""One name for a label, in the captions of training as in the candidates of zero-shot classification."""

from __future__ import annotations

import pytest

from coca_jax.data import label_names
from coca_jax.data.sources import open_source
from coca_jax.evaluate import zero_shot


@pytest.mark.parametrize(
    ("label", "name"),
    [
        *(("golden_retriever", "golden retriever"), ("fire-truck", "fire truck"), ("Fire Truck", "Fire Truck")),
        *(
            ("SeaLake", "Sea Lake"),
            ("ApplyEyeMakeup", "Apply Eye Makeup"),
            ("iPhone", "iPhone"),
            ("McDonald", "McDonald"),
        ),
        *(("t-shirt", "t-shirt"), ("DC-10", "DC-10"), ("black-and-white colobus", "black-and-white colobus")),
        *(("T-shirt/top", "T-shirt/top"), ("three-toed_sloth", "three-toed sloth"), ("_cat_", "cat")),
        ("001.Black_footed_Albatross", "Black footed Albatross"),  # CUB-200
        ("n02085620-Chihuahua", "Chihuahua"),  # Stanford Dogs
        *(
            ("00_cat", "cat"),
            ("2) pear", "pear"),
            ("7-eleven", "7-eleven"),
            ("737-MAX", "737-MAX"),
            ("3d printer", "3d printer"),
        ),
        *(("ねこ", "ねこ"), ("бурый_медведь", "бурый медведь"), ("❤", "❤"), ("A", "A")),
    ],
)
def test_a_label_has_the_name_that_people_would_write(label: str, name: str) -> None:
    assert label_names.name_of(label) == name
    assert label_names.name_of(name) == name  # a name is its own


@pytest.mark.parametrize(
    "label",
    [
        *("0", "000", "7.0", "-1", "1e5", "2021-05-07", "12_34", "\uff11\uff12", "True", "FALSE", "nan", "None", ""),
        *("n01440764", "class_7", "Label 12", "cluster-3", "3f2a9c04d1", "0xdeadbeef01", "#4"),
        *("batch_1", "part 2", "100APPLE", "yes", "No"),
    ],
)
def test_numbers_values_and_ids_are_no_names(label: str) -> None:
    assert label_names.name_of(label) == ""
    with pytest.raises(ValueError, match=r"is no name: give names by \?classes=") as error:
        zero_shot.class_names(["cat", label], None)
    assert "\n" not in str(error.value)


def _classes(root, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(name.encode())


def test_training_and_zero_shot_say_the_same(tmp_path) -> None:
    _classes(tmp_path, "golden_retriever", "fire-truck", "SeaLake")
    source = open_source(f"folder:{tmp_path}")
    records = [source[i] for i in range(3)]
    said = [f"a photo of a {name}." for name in ("Sea Lake", "fire truck", "golden retriever")]
    assert [record.captions[0] for record in records] == said
    names = zero_shot.class_names([r.label for r in records], source.class_names)
    assert [f"a photo of a {name}." for (name,) in names] == said


def test_a_number_makes_no_caption_and_keeps_its_label(tmp_path) -> None:
    """A classifier needs no captions: only their making is refused."""
    _classes(tmp_path, "000", "001")
    (tmp_path / "captions.csv").write_text("image,label\n000/0.jpg,000\n001/0.jpg,True\n")
    for options in ("", "?template=a {}"):
        assert [open_source(f"folder:{tmp_path}{options}")[i][2:4] for i in (0, 1)] == [((), "000"), ((), "True")]


def test_numbered_folders_are_lines_of_the_file_of_classes(tmp_path) -> None:
    _classes(tmp_path / "set", "000", "001", "8", "zebra_finch")
    (tmp_path / "ten.txt").write_text("\n".join(["fire_truck", "t-shirt", *"abcdef", "2", "Zebra Finch"]))
    source = open_source(f"folder:{tmp_path}/set?classes={tmp_path}/ten.txt")
    assert [source[i].captions for i in range(4)] == [
        (f"a photo of a {name}.",) for name in ("fire truck", "t-shirt", "2", "Zebra Finch")
    ]
    assert source.class_names is not None and len(source.class_names) == 10
    assert zero_shot.class_names(["2", "fire truck"], source.class_names) == [("2",), ("fire truck",)]


@pytest.mark.parametrize(
    "text",
    [
        '{"0": ["n01", "x"]}',
        '{"cat_dog": 1, "x": 0}',
        '{"id2label": {"0": "x", "1": "cat_dog"}, "label2id": {}}',
        '{"0": ["n01440764", "x"], "1": ["n01443537", "cat_dog"]}',  # Keras' imagenet_class_index.json
    ],
)
def test_files_of_classes_as_libraries_write_them(tmp_path, text: str) -> None:
    _classes(tmp_path / "set", "0", "1")
    (tmp_path / "c.json").write_text(text)
    source = open_source(f"folder:{tmp_path}/set?classes={tmp_path}/c.json")
    if "cat_dog" in text:
        assert [source[i].captions for i in (0, 1)] == [("a photo of a x.",), ("a photo of a cat dog.",)]
    else:  # no WordNet id
        assert source[0].captions == ("a photo of a n01.", "a photo of a x.")
