"""A small image-text set made on the spot: coloured shapes, each with the caption that names it."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import PIL.Image

from coca_jax.data import records
from coca_jax.data.records import Record
from coca_jax.data.tokenizer import Tokenizer

COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "black": (20, 20, 20)}
SHAPES = ("bar on the left", "bar on top", "dot", "cross")


def picture(color: str, shape: str, side: int = 24) -> np.ndarray:
    """uint8 `[side, side, 3]`."""
    y, x = np.mgrid[:side, :side] / side
    inside = {
        "bar on the left": x < 0.35,
        "bar on top": y < 0.35,
        "dot": (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1,
        "cross": np.minimum(abs(x - 0.5), abs(y - 0.5)) < 0.12,
    }[shape]
    return np.where(inside[..., None], np.array(COLORS[color]), 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A file of uint8 `[h, w, 3]`."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def examples() -> list[tuple[str, str]]:
    return [(color, shape) for color in COLORS for shape in SHAPES]


def caption(color: str, shape: str) -> str:
    return f"a {color} {shape}"


def write(folder: pathlib.Path, repeats: int = 2) -> tuple[str, pathlib.Path]:
    """Writes the set and a vocabulary; returns the source's name and the tokenizer's file."""
    packed = []
    for repeat in range(repeats):
        for color, shape in examples():
            pixels = png(picture(color, shape))
            record = Record(f"{color}-{shape}-{repeat}", pixels, (caption(color, shape),), label=shape)
            packed.append(records.pack(record, 24, 24))
    records.write(folder / "shapes.array_record", packed)
    Tokenizer.train([caption(*e) for e in examples()] * 20, folder / "shapes.model", vocab_size=300)
    return f"array_record:{folder}/shapes.array_record", folder / "shapes.model"
