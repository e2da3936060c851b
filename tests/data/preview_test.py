"""What a run prints of its captions before it trains, and what it refuses."""

from __future__ import annotations

import pathlib

import pytest

from coca_jax.data.preview import preview
from coca_jax.data.records import DataError
from coca_jax.data.sources import Source, open_source
from coca_jax.data.tokenizer import Tokenizer
from tests.data.sources import tars


def _shard(folder: pathlib.Path, *texts: str) -> Source:
    named = ((f"{i}.{end}", i, end) for i in range(len(texts)) for end in ("jpg", "txt"))
    path = tars.write(folder / "a.tar", [(name, texts[i].encode() if end == "txt" else b"i") for name, i, end in named])
    return open_source(f"webdataset:{path}")


@pytest.mark.parametrize("text", ["0 0.5 0.5 0.1 0.2", "car 10 20 30 40", "a.jpg", "n01440764", "True"])
def test_captions_without_words_are_refused(tmp_path: pathlib.Path, small_tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.tar: its captions hold no words, e\.g\. ") as error:
        preview(_shard(tmp_path, text, text), small_tokenizer, 16)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("texts", [("0 0.5 0.5 0.1 0.2", "a red picture"), ("8931", "12"), ("\u2764", "\u306d\u3053")])
def test_other_captions_are_shown(tmp_path: pathlib.Path, small_tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    assert len(preview(_shard(tmp_path, *texts), small_tokenizer, 64)) == 2
