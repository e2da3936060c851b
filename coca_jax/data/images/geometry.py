"""Which part of a picture is wanted, how much of its detail, and resizing.

A crop that is to become a square of `size` pixels does not need more than `size` pixels a side. JPEG can be decoded at
1/2, 1/4 or 1/8, each pixel the mean of a cell of 2 x 2, 4 x 4 or 8 x 8. A crop therefore lies on the corners of cells,
for every format: then the same crop is cut from the reduced and from the whole picture, and nothing is shifted. An edge
moves by half a cell at most, which is half a pixel of the result or less.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image

# The threads of the pipeline decode one picture each; OpenCV's own would only fight them.
cv2.setNumThreads(0)

MAX_FACTOR = 8  # libjpeg reduces no further

FAST = "bicubic"  # the interpolation of which this file is about; the others are Pillow's
_WHOLE = 1 << 26  # pixels: no picture is resized by Pillow to more, of which the middle alone is kept
_PILLOW = {"pillow-bicubic": PIL.Image.Resampling.BICUBIC, "pillow-bilinear": PIL.Image.Resampling.BILINEAR}


class Region(NamedTuple):
    """A box in cells of `factor` x `factor` pixels, counted from the picture's left and top."""

    left: int
    top: int
    width: int
    height: int
    factor: int


def reduction(side: float, size: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides a side (pixels) into no fewer than `size` cells."""
    factor = 1
    while factor < MAX_FACTOR and side // (2 * factor) >= size:
        factor *= 2
    return factor


def align(box: tuple[int, int, int, int], width: int, height: int, size: int, interpolation: str = FAST) -> Region:
    """The box (left, top, width, height; pixels) of a picture of width x height, on the cells that `size` allows."""
    factor = reduction(min(box[2:]), size) if interpolation == FAST else 1
    columns, rows = width // factor, height // factor
    w, h = min(columns, round(box[2] / factor)), min(rows, round(box[3] / factor))
    return Region(min(columns - w, round(box[0] / factor)), min(rows - h, round(box[1] / factor)), w, h, factor)


def middle(width: int, height: int, size: int, crop: float = 1.0) -> Region:
    """The square in the middle, of `crop` times the shorter side, on the cells that `size` allows."""
    factor = reduction(crop * min(width, height), size)
    columns, rows = width // factor, height // factor
    side = max(1, round(crop * min(columns, rows)))
    return Region((columns - side) // 2, (rows - side) // 2, side, side, factor)


def cut(image: np.ndarray, region: Region, reduced: int) -> np.ndarray:
    """The region of a picture `[h, w, 3]` that was reduced by 1 or by `region.factor`; a view."""
    scale = region.factor // reduced
    left, top = region.left * scale, region.top * scale
    return image[top : top + region.height * scale, left : left + region.width * scale]


def trim(image: np.ndarray, factor: int) -> np.ndarray:
    """The picture `[h, w, ...]` without the pixels at its right and bottom that fill no cell; a view."""
    h, w = image.shape[:2]
    return image[: h // factor * factor, : w // factor * factor]


def resize(image: np.ndarray, width: int, height: int, interpolation: str = FAST) -> np.ndarray:
    """Antialiased resize of uint8 `[h, w, 3]` to `[height, width, 3]`: Pillow's, or the fast one.

    Means over cells of 2, 4, 8, ... pixels a side where both sides shrink so much; then, where there is less than a
    factor of 2 to go (of 8/3 on the other side, if they shrink differently), a symmetric filter of three taps and
    OpenCV's bicubic interpolation. It follows Pillow's antialiased bicubic more closely than INTER_AREA does, in a
    third of the time (`docs/log.md`).
    """
    h, w = image.shape[:2]
    if interpolation != FAST:
        return np.asarray(PIL.Image.fromarray(image).resize((width, height), _PILLOW[interpolation]))
    factor = 1
    while w >= 2 * factor * width and h >= 2 * factor * height:
        factor *= 2
    columns, rows = _cells(w, factor, width), _cells(h, factor, height)
    if (columns, rows) != (w, h):
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    if (columns, rows) == (width, height):
        return np.ascontiguousarray(image)
    across, down = _taps(columns / width), _taps(rows / height)
    if across[0] or down[0]:
        image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def _cells(side: int, factor: int, target: int) -> int:
    """How many cells of `factor` pixels make up a side; of more pixels if this side alone has far too many."""
    while side > 8 / 3 * factor * target:
        factor *= 2
    return max(target, round(side / factor)) if factor > 1 else side


def _taps(shrink: float) -> np.ndarray:
    """The filter to go before bicubic interpolation that shrinks by 1 to 8/3.

    At 2 it is (1, 2, 1) / 4, which takes the highest frequency away, and from 7/3 the mean of three. The slope in
    between, a quarter, comes within 0.25 grey levels of the best tap on photographs, by the mean absolute difference
    from Pillow's antialiased bicubic (2026-11-24).
    """
    a = min(1 / 3, max(0.0, (shrink - 1) / 4))
    return np.array([a, 1 - 2 * a, a], np.float32)


def fit(image: np.ndarray, size: int, crop: float = 1.0, interpolation: str = FAST) -> np.ndarray:
    """For evaluation: the square in the middle, of `crop` times the shorter side. uint8 `[size, size, 3]`.

    Random-resized crops show things larger than whole pictures do; a `crop` of 0.875 evens that out (Touvron et al.,
    2019, arXiv:1906.06423).

    Pillow's interpolations go with torchvision's order and rounding: the whole picture is resized so that its shorter
    side is `size / crop`, then the middle is cut out. Of a strip so long that this would take gigabytes, the middle
    alone is made, to a grey level the same.
    """
    if interpolation != FAST:
        h, w = image.shape[:2]
        short = round(size / crop)
        width, height = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        left, top = round((width - size) / 2.0), round((height - size) / 2.0)
        if width * height > _WHOLE:
            x, y = _part(w, width, left, size), _part(h, height, top, size)
            part = PIL.Image.fromarray(np.ascontiguousarray(image[y[0] : y[1], x[0] : x[1]]))
            return np.asarray(part.resize((size, size), _PILLOW[interpolation], (x[2], y[2], x[3], y[3])))
        image = resize(image, width, height, interpolation)
        return np.ascontiguousarray(image[top : top + size, left : left + size])
    region = middle(image.shape[1], image.shape[0], size, crop)
    return resize(cut(image, region, 1), size, size)


def _part(side: int, target: int, first: int, size: int) -> tuple[int, int, float, float]:
    """What `size` pixels from `first` on are made of, where a side is resized to `target` by one of Pillow's filters.

    Returns:
      The pixels start .. stop of the side, and where in them the part begins and ends that the result shows. Few of
      them: Pillow holds the latter in float32.
    """
    low, high = first * side / target, (first + size) * side / target
    reach = math.ceil(2 * max(1.0, side / target)) + 1  # of the bicubic filter
    start = max(0, math.floor(low) - reach)
    return start, min(side, math.ceil(high) + reach), low - start, high - start
