"""Handwritten digits (scikit-learn's, of the UCI repository) in the forms that a user's data come in."""

from __future__ import annotations

import functools
import io
import json
import pathlib

import numpy as np
import PIL.Image
import sklearn.datasets

from coca_jax.data import records
from coca_jax.data.records import Record
from coca_jax.data.tokenizer import Tokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 16


@functools.cache
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """1,797 pictures uint8 `[n, 16, 16]`, black on white, in the set's order (by writer), and their digits."""
    found = sklearn.datasets.load_digits()
    small = 255 - np.minimum(found.images * 16, 255)
    return np.kron(small, np.ones((1, 2, 2))).astype(np.uint8), found.target


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).convert("RGB").save(out, "PNG")
    return out.getvalue()


def caption(digit: int) -> str:
    return f"the digit {NAMES[digit]}"


def pairs(path: pathlib.Path, start: int, stop: int, text: str = "the digit {}") -> str:
    """Pictures with captions, and their digits as labels, in an ArrayRecord file; the source's name."""
    pictures, digits = arrays()
    packed = [
        records.pack(Record(f"{i}", png(pictures[i]), (text.format(NAMES[digits[i]]),), NAMES[digits[i]]), SIDE, SIDE)
        for i in range(start, stop)
    ]
    records.write(path, packed)
    return f"array_record:{path}"


def classes(folder: pathlib.Path, start: int, stop: int) -> str:
    """A folder for each class."""
    pictures, digits = arrays()
    for i in range(start, stop):
        file = folder / NAMES[digits[i]] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pictures[i]))
    return f"folder:{folder}"


def clips(folder: pathlib.Path, start: int, stop: int) -> str:
    """A digit that goes from one side to the other in six frames: which way is the label; a captions.jsonl names them.

    Forwards and backwards are the same pictures: only their order tells.
    """
    folder.mkdir()
    pictures, _ = arrays()
    lines = []
    for i in range(start, stop):
        wide = np.full((SIDE, 3 * SIDE), 255, np.uint8)
        wide[:, SIDE : 2 * SIDE] = pictures[i]
        frames = []
        for step in range(6):
            name = f"{i}-{step}.png"
            at = 2 * SIDE - round(step * 2 * SIDE / 5)
            (folder / name).write_bytes(png(wide[:, at : at + SIDE]))
            frames.append(name)
        way = "right" if i % 2 else "left"
        lines.append({"image": frames if way == "right" else frames[::-1], "label": way})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return f"folder:{folder}"


def questions(folder: pathlib.Path, start: int, stop: int, seed: int = 0) -> str:
    """Two lines a picture, each with a question about it and the answer: yes, no, odd or even."""
    rng = np.random.default_rng(seed)
    pictures, digits = arrays()
    lines = []
    folder.mkdir()
    for i in range(start, stop):
        (folder / f"{i}.png").write_bytes(png(pictures[i]))
        asked = digits[i] if rng.random() < 0.5 else rng.integers(10)
        yes = "yes" if asked == digits[i] else "no"
        lines.append({"image": f"{i}.png", "question": f"the digit {NAMES[asked]}", "answer": yes})
        lines.append({"image": f"{i}.png", "question": "odd or even", "answer": "odd" if digits[i] % 2 else "even"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return f"folder:{folder}?question=question&label=answer"


def sentences(folder: pathlib.Path, start: int, stop: int, seed: int = 0) -> str:
    """Does a sentence follow from the picture: entailment or contradiction in an ArrayRecord file."""
    rng = np.random.default_rng(seed)
    pictures, digits = arrays()
    packed = []
    for i in range(start, stop):
        said = digits[i] if rng.random() < 0.5 else (digits[i] + rng.integers(1, 10)) % 10
        label = "entailment" if said == digits[i] else "contradiction"
        packed.append(records.pack(Record(f"{i}", png(pictures[i]), (caption(said),), label), SIDE, SIDE))
    records.write(folder, packed)
    return f"array_record:{folder}"


def tokenizer(path: pathlib.Path) -> pathlib.Path:
    words = [caption(digit) for digit in range(10)] + ["odd or even", "handwritten: one, the number"]
    Tokenizer.train(words * 20, path, vocab_size=300)
    return path
