"""Shared by the tests of coca_jax.data: the built-in set, prepared once, and a small source written on the spot."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import emoji, emoji_art, records
from coca_jax.data.records import Record
from coca_jax.data.sources import Source, open_source
from coca_jax.data.tokenizer import Tokenizer

COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SIZE = 37  # records of the small source: odd, so that batches run across the ends of epochs


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """The pixels as a file's content."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder with the whole emoji set, which COCA_JAX_CACHE names until the end of the session."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COCA_JAX_CACHE", str(cache))
        emoji.prepare(progress=False)
        yield cache


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a preparation see 40 emoji only, of all three designers: it then takes a moment."""
    whole = emoji_art.pictures

    def some(named, drops):
        found = whole(named, drops)
        common = sorted(set.intersection(*(set(files) for files in found.values())))[::80]
        return {style: {key: files[key] for key in common} for style, files in found.items()}

    monkeypatch.setattr(emoji_art, "pictures", some)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ArrayRecord files of SIZE pictures of noise, JPEG and PNG, with one or two captions."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    packed = []
    for i in range(SIZE):
        name = list(COLORS)[i % 4]
        pixels = np.clip(rng.normal(COLORS[name], 30, (40 + i, 60, 3)), 0, 255).astype(np.uint8)
        captions = (f"a {name} picture number {i}", f"number {i} in {name}")[: 1 + i % 2]
        record = Record(f"picture-{i}", encoded(pixels, "JPEG" if i % 3 else "PNG"), captions, label=name)
        packed.append(records.pack(record, 60, 40 + i))
    records.write(folder / "small-0.array_record", packed[:20])
    records.write(folder / "small-1.array_record", packed[20:])
    return folder


@pytest.fixture
def small(small_folder: Path) -> Source:
    return open_source(f"array_record:{small_folder}/small-*.array_record")


@pytest.fixture(scope="session")
def small_tokenizer(small_folder: Path) -> Tokenizer:
    source = open_source(f"array_record:{small_folder}/small-*.array_record")
    return Tokenizer.train([caption for i in range(len(source)) for caption in source[i].captions], vocab_size=330)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
