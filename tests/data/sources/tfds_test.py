"""Sets of TensorFlow Datasets, prepared by real builders, read without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil

import pytest

from coca_jax import config
from coca_jax.data import pipeline
from coca_jax.data.mixture import open_mixture
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer
from tests.data.sources import tfds_sets
from tests.data.sources.tfds_sets import NAMES, picture


def read() -> None:
    """What a training process does, and what it has imported after it."""
    import os
    import sys

    source = open_source(f"tfds:labelled?split=train&data_dir={os.environ['TFDS_FOLDER']}")
    records = [pickle.loads(pickle.dumps(source))[i] for i in (3, 4)]
    print(json.dumps([[record.label, hashlib.sha256(record.image).hexdigest()] for record in records]))
    print([name for name in ("tensorflow", "torch") if name in sys.modules])


def test_pictures_come_as_they_were_published(tfds_folder):
    source = open_source(f"tfds:labelled?split=train&data_dir={tfds_folder}")
    assert len(source) == 20 and source.class_names == {name: [name] for name in NAMES}
    images = {source[i].image for i in range(20)}
    assert images == {picture(i) for i in range(20)}  # TFDS shuffles what it prepares
    for i in (5, 0, 19):
        number = [picture(n) for n in range(20)].index(source[i].image)
        assert source[i].label == NAMES[number % 3]
        assert source[i].captions == (f"a photo of a {NAMES[number % 3]}.",)
    with pytest.raises(IndexError):
        source[20]


def test_captions(tfds_folder):
    source = open_source(f"tfds:captioned/b:1.2.0?split=test&data_dir={tfds_folder}")
    found = {source[i].image: source[i].captions for i in range(3) if source[i].image != picture(0)}
    assert found == {picture(1): ("b 1 ü0",), picture(2): ("b 2 ü0", "b 2 ü1")}


def test_features_by_option(tfds_folder):
    location = f"tfds:captioned/a?split=test&data_dir={tfds_folder}"
    titles = open_source(f"{location}&caption=title&image=picture")
    assert sorted(titles[i].captions for i in range(3)) == [("title 0",), ("title 1",), ("title 2",)]
    nested = open_source(f"{location}&caption=captions/text")
    assert sorted(len(nested[i].captions) for i in range(3)) == [0, 1, 2]
    with pytest.raises(DataError, match=r"no 'text' for \?caption=; there are .*captions/text"):
        open_source(f"{location}&caption=text")
    with pytest.raises(DataError, match="the feature 'title' is no picture"):
        open_source(f"{location}&image=title")


def test_parts_of_splits(tfds_folder):
    def keys(split: str) -> list[bytes]:
        source = open_source(f"tfds:labelled?split={split}&data_dir={tfds_folder}")
        return [source[i].image for i in range(len(source))]

    assert keys("train[:90%]") + keys("train[90%:]") == keys("train")
    assert len(keys("train[5:8]+test")) == 6
    specs = [
        f"tfds:labelled?split={split}&data_dir={tfds_folder}"
        for split in ("train", "train[:90%]", "train[:18]", "test")
    ]
    specs += [f"tfds:captioned/{config}?split=test&data_dir={tfds_folder}" for config in "ab"]
    prints = [open_source(spec).fingerprint() for spec in specs]
    assert prints[1] == prints[2] and len(set(prints)) == 5
    assert prints == [open_source(spec).fingerprint() for spec in specs]


def test_classes_by_number_and_by_name(tfds_folder, tmp_path):
    (tmp_path / "names.txt").write_text("scarlet\njade\nazure\n")
    (tmp_path / "names.json").write_text('{"red": "scarlet", "green": "jade", "blue": "azure"}')
    found = []
    for name in ("names.txt", "names.json"):
        source = open_source(f"tfds:labelled?split=test&data_dir={tfds_folder}&classes={tmp_path}/{name}&template={{}}")
        found.append([(source[i].label, source[i].captions) for i in range(3)])
    assert found[0] == found[1]
    assert sorted(label for label, _ in found[0]) == ["azure", "jade", "scarlet"]


def test_pickle(tfds_folder):
    source = open_source(f"tfds:labelled?split=train&data_dir={tfds_folder}")
    source[0]
    other = pickle.loads(pickle.dumps(source))
    assert [other[i] for i in range(20)] == [source[i] for i in range(20)]
    assert other.fingerprint() == source.fingerprint()


def test_tensorflow_is_never_imported(tfds_folder, run_python):
    done = run_python(read, devices=1, env={"TFDS_FOLDER": str(tfds_folder)})
    found, loaded = done.stdout.splitlines()[-2:]
    source = open_source(f"tfds:labelled?split=train&data_dir={tfds_folder}")
    assert json.loads(found) == [[source[i].label, hashlib.sha256(source[i].image).hexdigest()] for i in (3, 4)]
    assert loaded == "[]"


def test_what_is_not_there(tfds_folder):
    for spec, message in {
        f"tfds:labelled?data_dir={tfds_folder}": r"which split\? Add \?split=, one of .*train",
        f"tfds:labelled?split=val&data_dir={tfds_folder}": "no split 'val'.*there are .*train",
        f"tfds:no_such_set?split=train&data_dir={tfds_folder}": r"no such set: .*file_format='array_record'",
        f"tfds:labelled:9.9.9?split=train&data_dir={tfds_folder}": r"no such set: .*download_and_prepare",
        f"tfds:labelled?split=train[:0]&data_dir={tfds_folder}": r"no split 'train\[:0\]'",
        f"tfds:labelled?splits=train&data_dir={tfds_folder}": r"no option 'splits'; did you mean split\?",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            open_source(spec)
        assert "\n" not in str(error.value)


def test_a_set_whose_code_needs_tensorflow(tfds_folder, tmp_path):
    """TFDS' own coco_captions is one; prepared elsewhere, it is read all the same."""
    copy = shutil.copytree(tfds_folder / "captioned" / "b", tmp_path / "coco_captions" / "2014")
    for path in copy.glob("*/*"):
        if path.suffix == ".json":
            path.write_text(path.read_text().replace('"captioned"', '"coco_captions"').replace('"b"', '"2014"'))
        path.rename(path.with_name(path.name.replace("captioned", "coco_captions")))
    source = open_source(f"tfds:coco_captions/2014?split=test&data_dir={tmp_path}&caption=title")
    assert sorted(source[i].captions for i in range(3)) == [("title 0",), ("title 1",), ("title 2",)]


def test_a_set_prepared_as_tfrecord(tfds_folder, tmp_path):
    copy = shutil.copytree(tfds_folder / "labelled", tmp_path / "labelled")
    (path,) = copy.glob("*/dataset_info.json")
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"prepared as tfrecord, .*download_and_prepare\(file_format='array_record'\)"):
        open_source(f"tfds:labelled?split=train&data_dir={tmp_path}")


def test_a_damaged_record_is_one_bad_example(tfds_folder, tmp_path):
    copy = shutil.copytree(tfds_folder / "labelled", tmp_path / "labelled")
    (path,) = copy.glob("*/*-train.array_record*")
    data = bytearray(path.read_bytes())
    at = data.index(picture(7)[:40])
    data[at : at + 40] = b"\xaa" * 40
    path.write_bytes(data)
    source = open_source(f"tfds:labelled?split=train&data_dir={tmp_path}")
    bad = []
    for i in range(20):
        try:
            assert source[i].image in {picture(n) for n in range(20)}
        except BadExample as error:
            assert error.reason == "unreadable" and f"record {i}" in str(error)
            bad.append(i)
    assert bad


@pytest.mark.slow
def test_the_built_in_set_as_a_set_of_tfds(emoji_cache, tmp_path, run_python):
    run_python(tfds_sets.build_emoji, devices=1, env={"TFDS_FOLDER": str(tmp_path), "COCA_JAX_CACHE": str(emoji_cache)})
    source, wanted = open_source(f"tfds:emoji_concepts?split=test&data_dir={tmp_path}"), open_source("emoji:concepts")
    assert len(source) == len(wanted) > 300
    found = sorted((r.image, r.captions, r.label) for r in (source[i] for i in range(len(source))))
    assert found == sorted((r.image, r.captions, r.label or "none") for r in (wanted[i] for i in range(len(wanted))))
    # As it is trained on: mixed, decoded, cropped.
    mixture = open_mixture(f"0.5 * {source.name} + 0.5 * emoji:seen")
    tokenizer = Tokenizer(wanted.tokenizer_path)
    options = {"image_size": 32, "length": 20, "batch_size": 16, "seed": 0}
    iterator = iter(pipeline.train_loader(mixture, tokenizer, config.Data(threads=2), **options))
    batches = [next(iterator) for _ in range(4)]
    iterator.close()
    owners = [mixture.locate(int(i))[0] for batch in batches for i in batch["index"]]
    assert abs(sum(owners) - 32) <= 2 and not any(batch["problem"].any() for batch in batches)


@pytest.mark.parametrize(
    "name", ["sets_1", "sets [1]", "sets*", "set?", "{a,b}", "sets [!x]", "gs:", "~", "$HOME", "%41"]
)
def test_a_folder_is_read_and_checked_whatever_its_name(tfds_folder, tmp_path, monkeypatch, name):
    """Where the folder's name is taken for a pattern, the check sees no file, and TFDS imports what the set names."""
    folder = tmp_path / name
    shutil.copytree(tfds_folder / "labelled", folder / "labelled")
    monkeypatch.chdir(tmp_path)
    place = f"./{name}".replace("%", "%25")
    assert len(open_source(f"tfds:labelled?split=train&data_dir={place}")) == 20
    (tmp_path / "beside.py").write_text("open('ran', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    (features,) = folder.glob("labelled/*/features.json")
    text = features.read_text()
    for version in (features.parent, folder / "labelled" / "hidden~" / "1.0.0", folder / "labelled" / ".b" / "1.0.0"):
        if version != features.parent:
            shutil.copytree(features.parent, version)
        (version / "features.json").write_text(json.dumps({"pythonClassName": "beside.Feature", "featuresDict": {}}))
        for location in ("labelled", "Labelled", "labelled/.b:1.0.0", "labelled:1.0.0"):
            with pytest.raises(DataError, match=r"asks for the Python class 'beside\.Feature'"):
                open_source(f"tfds:{location}?split=train&data_dir={place}")
        (version / "features.json").write_text(text)
    assert not (tmp_path / "ran").exists()
