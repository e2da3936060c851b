"""Addresses where a path may stand: one line says what is wrong with them, from Python and on every command line."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
import pytest

import coca_jax
from coca_jax import pictures
from coca_jax.config import Config
from coca_jax.data import addresses, classes
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported, folders, vision
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.train.checkpoint import CheckpointError, reachable
from tests import tiny

UNKNOWN = r"nothing is read from https:// or written to it: name a path on a disk, gs:// or s3://"


@pytest.fixture
def without_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> Any:
        raise ImportError(f"{protocol}: Please install gcsfs to access Google Storage")

    def none(name: str, package: str | None = None) -> None:
        return None

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    monkeypatch.setattr(importlib.util, "find_spec", none)


def test_paths_are_as_they_are(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, str(tmp_path / "none"), "a:b", ""):
        addresses.check(path)


@pytest.mark.parametrize(
    ("address", "said"),
    [("https://a/b.png", UNKNOWN), ("gs://a/b.png", r'Please install gcsfs .*; pip install "coca_jax\[gcs\]"$')],
)
@pytest.mark.usefixtures("without_gcsfs")
def test_each_reader_says_it(address: str, said: str) -> None:
    weights = Weights(Config(model=tiny.MODEL), tiny.parameters(tiny.MODEL), None)
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (DataError, lambda: Preprocessor(8).pixels([address])),
        (DataError, lambda: pictures.find([address])),
        (DataError, lambda: Tokenizer(address)),
        (DataError, lambda: classes.read(address)),
        (CheckpointError, lambda: reachable(address)),
        (CheckpointError, lambda: coca_jax.load(address)),
        (ConversionError, lambda: exported.write(weights, address)),
        (ConversionError, lambda: folders.named(address)),
        (ConversionError, lambda: vision.load_encoder(address, tiny.MODEL, {}, Config().data)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=said):
            call()
    assert Preprocessor(8).pixels([np.zeros((9, 9, 3), np.uint8)]).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["coca_jax.caption", "{address}", "--checkpoint=x", "--output={here}/o.jsonl"],
        ["coca_jax.embed", "{here}", "--checkpoint={address}", "--output={here}/o.jsonl"],
        ["coca_jax.convert", "--input={address}", "--output={here}/o"],
        ["coca_jax.evaluate", "--checkpoint={here}", "--output={address}"],
        ["coca_jax.checkpoint", "list", "{address}"],
        ["coca_jax.data.prepare", "convert", "--source=folder:{here}", "--out={address}"],
        ["coca_jax.data.prepare", "describe", "folder:{here}", "--contact_sheet={address}"],
    ],
)
def test_each_command_says_it_in_a_line(
    tmp_path: pathlib.Path, run_python: Callable[..., Any], arguments: list[str]
) -> None:
    (tmp_path / "a.png").touch()
    command = [argument.format(here=tmp_path, address="https://a/b.png") for argument in arguments]
    done = run_python(["-m", *command], devices=1, check=False)
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1 and "nothing is read from https://" in said and len(said.splitlines()) == 1, said
