"""Files that a user or data name: what is no regular file is refused in a line, and nothing waits for it."""

from __future__ import annotations

import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from coca_jax.data import classes, opening
from coca_jax.data.images import preprocessor
from coca_jax.data.records import BadExample, DataError
from coca_jax.data.sources import files, open_source, tables
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import folders, open_clip, torch_files
from coca_jax.interop.vision import files as vision_files
from coca_jax.interop.weights import ConversionError
from coca_jax.train import checkpoint
from coca_jax.train.checkpoint import CheckpointError


@pytest.fixture
def strange() -> Iterator[dict[str, str]]:
    """Paths of what is no regular file, by what it is. In a short folder: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        os.mkfifo(top / "pipe")
        (top / "folder").mkdir()
        (top / "loop").symlink_to(top / "loop")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(top / "socket"))
        paths = {what: os.fspath(top / what) for what in ("pipe", "folder", "loop", "socket", "missing")}
        yield paths | {"device": "/dev/zero", "terminal": "/dev/tty", "empty": _empty(top)}
        listener.close()


def _empty(top: pathlib.Path) -> str:
    (top / "empty").touch()
    return os.fspath(top / "empty")


# What opens a file that an option, a key or a line of data names.
READERS: dict[str, Callable[[str], object]] = {
    "data.tokenizer": Tokenizer,
    "data.classes": classes.read,
    "image": lambda path: preprocessor.to_square(path, 8),
    "image of a folder": lambda path: files.picture(os.path.dirname(path), os.path.basename(path), "here"),
    "?templates": lambda path: files.read_settings(path, "here"),
    "webdataset": lambda path: open_source(f"webdataset:{path}"),
    "parquet": lambda path: open_source(f"parquet:{path}"),
    "array_record": lambda path: open_source(f"array_record:{path}"),
    "karpathy": lambda path: open_source(f"karpathy:{path}?split=train"),
    "captions": lambda path: open_source(f"folder:{os.path.dirname(path)}?captions={path}"),
    "configuration": folders.read_json,
    "safetensors": folders.read_tensors,
    "sum": folders.sha256,
    "weights": open_clip.read,
    "weights of PyTorch": torch_files.read,
    "vision weights": vision_files.find,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_in_a_line_by_all_that_opens_one(
    reader: str, strange: dict[str, str]
) -> None:
    for what, path in strange.items():
        if what == "empty" and reader in ("sum", "vision weights", "?templates", "image of a folder"):
            continue  # it is opened, and its content is looked at elsewhere
        began = time.monotonic()
        with pytest.raises((DataError, ConversionError, OSError)) as caught:
            READERS[reader](path)
        assert time.monotonic() - began < 5, what
        message = str(caught.value)
        assert "\n" not in message.strip() and len(message) < 1000, message
        if what in ("pipe", "socket", "device") and reader != "image of a folder":
            word = {"pipe": "a named pipe (FIFO)", "socket": "a socket", "device": "a device"}[what]
            assert word in message, (what, message)


def test_an_image_that_is_a_pipe_costs_that_example_alone(strange: dict[str, str]) -> None:
    for what in ("pipe", "socket", "folder", "loop", "missing"):
        path = strange[what]
        with pytest.raises(BadExample) as caught:
            files.picture(os.path.dirname(path), os.path.basename(path), "captions.csv line 2")
        assert caught.value.reason == "unreadable" and "captions.csv line 2" in str(caught.value)


def test_a_file_over_its_bound_is_refused_before_it_is_read(tmp_path: pathlib.Path) -> None:
    large = tmp_path / "tokenizer.model"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file: no disk is filled
    with pytest.raises(DataError, match=r"1099511627776 bytes, more than the 268435456 that a tokenizer may have"):
        Tokenizer(large)
    with pytest.raises(DataError, match="more than the 268435456 that an image may have"):
        preprocessor.to_square(large, 8)
    with pytest.raises(BadExample, match="more than the 268435456 that one image may have"):
        files.picture(os.fspath(tmp_path), "tokenizer.model", "here")


def test_what_does_not_answer_is_given_up_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "PATIENCE", 0.1)
    with pytest.raises(opening.UnusableFile, match="/mnt/x did not answer for 0 s: is its mount or its store there"):
        opening.within(threading.Event().wait, "/mnt/x")
    assert opening.within(lambda: 3, "/mnt/x") == 3
    with pytest.raises(KeyError, match="own"):
        opening.within(lambda: {}["own"], "/mnt/x")


def test_lines_are_cut_as_a_file_is_and_one_that_is_too_long_is_none() -> None:
    text = b"one\n\nlonger than ten\nten bytes\nlast"
    for size in range(1, len(text) + 1):
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(opening.lines(parts, 10)) == [b"one\n", b"\n", None, b"ten bytes\n", b"last"], size
    assert list(opening.lines([b"x" * 11], 10)) == [None]
    assert list(opening.lines([], 10)) == []


def test_lines_of_a_file_are_those_of_the_disk(tmp_path: pathlib.Path) -> None:
    content = b"".join(b"%d " % n * (n % 7) + b"\n" for n in range(1000))
    (tmp_path / "a.jsonl").write_bytes(content)
    assert b"".join(line or b"" for line in files.lines(os.fspath(tmp_path / "a.jsonl"))) == content


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_of_more_captions_than_memory_holds_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    line = '{"file_name": "a.jpg", "caption": "a card"}\n' if ending == "jsonl" else "a.jpg,a card\n"
    header = "" if ending == "jsonl" else "file_name,caption\n"
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / f"captions.{ending}").write_text(header + 3 * line)
    assert open_source(f"folder:{tmp_path}")[0].captions == ("a card",) * 3
    (tmp_path / f"captions.{ending}").write_text(header + 4 * line)
    with pytest.raises(DataError, match="has more than 3 rows"):
        open_source(f"folder:{tmp_path}")


def test_a_workdir_whose_configuration_is_a_pipe_is_refused(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"a named pipe \(FIFO\), which is never read"):
        checkpoint.read_config(tmp_path)
