"""Classes by number, as a workdir keeps them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import classes
from coca_jax.data.records import DataError, Record
from coca_jax.data.sources import open_source
from tests.data.sources import tars

ODD = ["a\u2028b", "a\x85b", "a\x0bb", "a\x1cb", "été", "two words"]


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / "classes.txt").write_bytes(classes.to_bytes(tuple(ODD)))
    assert classes.read(tmp_path / "classes.txt") == tuple(ODD)


def test_labels_of_a_source_are_those_that_its_file_tells(tmp_path):
    members = []
    for number, label in enumerate([*ODD, " blank before", "blank behind "]):
        members += [(f"{number}.jpg", b"i"), (f"{number}.json", json.dumps({"label": label}).encode())]
    source = open_source(f"webdataset:{tars.write(tmp_path / 'a.tar', members)}?label=label")
    labels = classes.of_source(source, progress=False)
    assert labels == tuple(sorted([*ODD, "blank before", "blank behind"]))
    (tmp_path / "classes.txt").write_bytes(classes.to_bytes(labels))
    task = classes.Task(classes.read(tmp_path / "classes.txt"))
    assert {labels[task.number(source[i])] for i in range(len(source))} == set(labels)


@pytest.mark.parametrize("label", ["a\nb", "a\rb", " a", "a\t"])
def test_labels_that_a_line_cannot_hold_are_refused(label):
    class Source(list):
        name = "records"

    source = Source([Record("0", b"i", ("c",), label), Record("1", b"i", ("c",), "other")])
    with pytest.raises(DataError, match=r"records has the label .*: labels are words without line ends"):
        classes.of_source(source, progress=False)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9\ndog\n")
    with pytest.raises(DataError, match=r"labels\.txt is not UTF-8: .*save it as UTF-8"):
        classes.read(tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\r\ndog\r\n")
    assert classes.read(tmp_path / "labels.txt") == ("cat", "dog")


def test_frames_of_clips():
    clips = [["a", "b", "c", "d"], (p for p in "xy"), np.arange(3 * 4).reshape(3, 2, 2, 1)]
    found = classes.of_clips(clips, 2)
    assert found[:2] == [["b", "d"], ["x", "y"]]
    assert [frame[0, 0, 0] for frame in found[2]] == [0, 8]
    (alone,) = classes.of_clips(np.zeros((1, 5, 2, 2, 3), np.uint8), 2)
    assert [frame.shape for frame in alone] == [(2, 2, 3)] * 2


@pytest.mark.parametrize(
    ("clips", "said"),
    [
        (np.zeros((5, 8, 8, 3), np.uint8), "^this model looks at 2 frames of a clip: give a list of clips"),
        ([np.zeros((8, 8, 3), np.uint8)], "clip 0 is one picture; this model looks at 2 frames"),
        ("clip.gif", "^this model looks at 2"),
        (pathlib.Path("clip.gif"), "^this model looks at 2"),
        (PIL.Image.new("RGB", (2, 2)), "^this model looks at 2"),
        ([["1.png"], "2.png"], "clip 1 is one picture"),
        ([pathlib.Path("1.png")], "clip 0 is one picture"),
        ([b"bytes"], "clip 0 is one picture"),
        ([["1.png"], []], "clip 1 has no pictures"),
        ([], "no clip was given"),
    ],
)
def test_what_is_no_list_of_clips_is_refused(clips, said):
    with pytest.raises(DataError, match=said):
        classes.of_clips(clips, 2)


@pytest.mark.parametrize("top", [0, -1])
def test_no_class_at_all_is_refused(top):
    with pytest.raises(ValueError, match=f"top={top} must be 1 or more"):
        classes.likeliest(np.zeros((1, 2), np.float32), ("a", "b"), top)
