"""Pillow's interpolations: the pixels that models from elsewhere were trained and tested with, to the grey level."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest

from coca_jax import config
from coca_jax.data.images import Preprocessor, augment

KINDS = {"pillow-bicubic": PIL.Image.Resampling.BICUBIC, "pillow-bilinear": PIL.Image.Resampling.BILINEAR}
SIZES = [(64, 64), (101, 67), (67, 101), (300, 40), (15, 22)]  # width, height; larger and smaller than the square


def photograph(width: int, height: int) -> PIL.Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2)
    return PIL.Image.fromarray(((noise.astype(int) + 3 * smooth) // 4).astype(np.uint8))


def expected(image: PIL.Image.Image, size: int, kind: str, short: int) -> np.ndarray:
    """torchvision's Resize(short) and CenterCrop(size), written out; there the long side is cut, not rounded."""
    w, h = image.size
    width, height = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    resized = image.resize((width, height), KINDS[kind])
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES)
def test_pixels_are_pillows(kind: str, shape: tuple[int, int]) -> None:
    image = photograph(*shape)
    pixels = Preprocessor(32, interpolation=kind).pixels([image])[0]
    np.testing.assert_array_equal(pixels, expected(image, 32, kind, 32))
    with_margin = Preprocessor(28, crop=0.875, interpolation=kind).pixels([image])[0]
    np.testing.assert_array_equal(with_margin, expected(image, 28, kind, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40_000, 2), (2, 40_000)])
def test_of_a_long_strip_the_middle_alone_is_made(kind: str, shape: tuple[int, int], monkeypatch: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8)
    sizes = []
    resize = PIL.Image.Image.resize

    def spy(self: PIL.Image.Image, size: tuple[int, int], *rest: Any) -> PIL.Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    for crop, short in ((1.0, 64), (0.875, 73)):
        monkeypatch.undo()
        wanted = expected(PIL.Image.fromarray(noise), 64, kind, short)
        monkeypatch.setattr(PIL.Image.Image, "resize", spy)
        pixels = Preprocessor(64, crop=crop, interpolation=kind).pixels([noise])[0]
        assert np.abs(pixels.astype(int) - wanted).max() <= 1
    assert sizes == [(64, 64)] * 2


def test_an_encoded_picture_is_decoded_whole() -> None:
    """The fast way decodes a JPEG this much larger than the square at an eighth; here every pixel counts."""
    out = io.BytesIO()
    photograph(400, 360).save(out, "JPEG", quality=95)
    whole = PIL.Image.open(io.BytesIO(out.getvalue()))
    exact = Preprocessor(32, interpolation="pillow-bicubic").pixels([out.getvalue()])[0]
    np.testing.assert_array_equal(exact, expected(whole, 32, "pillow-bicubic", 32))
    assert (exact != Preprocessor(32).pixels([out.getvalue()])[0]).any()


def test_training_crops_are_pillows_too() -> None:
    pixels = np.asarray(photograph(90, 70))
    data = config.Data(crop_area=(1.0, 1.0), crop_ratio=(9 / 7, 9 / 7), interpolation="pillow-bilinear")
    made = augment(pixels, 24, np.random.default_rng(0), data)
    wanted = PIL.Image.fromarray(pixels).resize((24, 24), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made, np.asarray(wanted))


def test_a_preprocessor_survives_json() -> None:
    made = Preprocessor(32, (0.1, 0.2, 0.3), crop=0.9, interpolation="pillow-bilinear")
    assert Preprocessor.from_json(made.to_json()) == made
