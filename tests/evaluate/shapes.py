"""A small labelled set made on the spot, read through the real sources, tokenizer and pipeline."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import PIL.Image
import PIL.ImageDraw

from coca_jax import config as config_lib
from coca_jax.data import pipeline
from coca_jax.data.sources import Source
from coca_jax.data.tokenizer import Tokenizer

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 40, 160),
    "black": (10, 10, 10),
}
SHAPES = ("square", "circle", "bar")
SIZE, LENGTH = 16, 24


def draw(color: str, shape: str, side: int, edge: int) -> bytes:
    """A PNG of one shape, `edge` pixels from the border of a white square of `side` pixels."""
    image = PIL.Image.new("RGB", (side, side), "white")
    pen = PIL.ImageDraw.Draw(image)
    box = (edge, edge, side - 1 - edge, side - 1 - edge)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    else:
        pen.rectangle(
            box if shape == "square" else (edge, side // 2 - 2, side - 1 - edge, side // 2 + 2), COLORS[color]
        )
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class World:
    """What `suite.run` needs beside the functions."""

    sources: dict[str, Source]
    reference: Source
    tokenizer: Tokenizer
    config: config_lib.Config

    def batches(self, source: Source, start: int = 0):
        settings = {"image_size": SIZE, "length": LENGTH, "batch_size": self.config.evaluate.batch_size}
        return pipeline.eval_batches(source, self.tokenizer, self.config.data, start=start, **settings)

    def with_evaluate(self, **changes) -> World:
        evaluate = dataclasses.replace(self.config.evaluate, **changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, evaluate=evaluate))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
