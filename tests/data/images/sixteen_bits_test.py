"""Samples of 16 bits: what fills them is read by its upper 8 bits, what does not is refused rather than shown black."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest

from coca_jax.data import images
from coca_jax.data.images.decoding import from_pillow
from coca_jax.data.prepare import checking
from coca_jax.data.records import BadExample, Record
from tests.data.images.pictures import png, save

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by its channels


def samples(high: int, channels: int) -> np.ndarray:
    """uint16 `[8, 9, channels]`, 0 to `high`; alpha is opaque."""
    values = np.linspace(0, high, 72).reshape(8, 9, 1).repeat(channels, axis=2).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65_535
    return values


def png16(values: np.ndarray, **chunks: bytes) -> bytes:
    height, width, channels = values.shape
    return png(width, height, 16, COLOR_TYPES[channels], values.astype(">u2").tobytes(), **chunks)


def tiff(values: np.ndarray, bits: int = 16, order: str = "<") -> bytes:
    """A TIFF of one strip, made by hand."""
    height, width, channels = values.shape
    if bits == 12:  # two samples in three bytes, each row on its own
        rows = ["".join(f"{value:012b}" for value in row.ravel()) for row in values]
        body = b"".join(
            int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows
        )
    else:
        body = values.astype(f"{order}u2").tobytes()
    many = channels > 2
    at_bits = 8 + 2 + 12 * 9 + 4
    at_body = at_bits + 8
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, at_bits if many else bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2 if many else 1), (273, 4, 1, at_body), (277, 3, 1, channels), (278, 4, 1, height)]
    tags += [(279, 4, 1, len(body))]
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, number)
        + struct.pack(
            order + ("HH" if kind == 3 and number == 1 else "I"),
            *([value, 0] if kind == 3 and number == 1 else [value]),
        )
        for tag, kind, number, value in tags
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return (
        magic
        + struct.pack(order + "IH", 8, len(tags))
        + entries
        + bytes(4)
        + struct.pack(order + "4H", *[bits] * 4)
        + body
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("high, is_read", [(255, False), (1023, False), (4095, False), (4096, True), (65_535, True)])
def test_a_png_of_less_than_its_range_is_refused(channels: int, high: int, is_read: bool) -> None:
    values = samples(high, channels)
    data = png16(values)
    for read in (lambda: images.decode(data), lambda: from_pillow(PIL.Image.open(io.BytesIO(data)))):
        if is_read:
            np.testing.assert_array_equal(read()[..., 0], values[..., 0] >> 8)
        else:
            with pytest.raises(BadExample, match=r"16 bits, none above \d+ of 65,535: white may be") as caught:
                read()
            assert caught.value.reason == "not_a_picture"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_less_than_its_range_is_refused(channels: int, order: str) -> None:
    for high, is_read in ((255, False), (4095, False), (65_535, True)):
        values = samples(high, channels)
        if is_read:
            np.testing.assert_array_equal(images.decode(tiff(values, order=order))[..., 0], values[..., 0] >> 8)
        else:
            with pytest.raises(BadExample, match="white may be"):
                images.decode(tiff(values, order=order))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_that_says_16_significant_bits_is_believed(channels: int) -> None:
    values = samples(3000, channels)
    found = images.decode(png16(values, sBIT=bytes([16] * channels)))
    np.testing.assert_array_equal(found[..., 0], values[..., 0] >> 8)
    with pytest.raises(BadExample, match="white may be"):  # the 12 bits may be the lower or the upper ones
        images.decode(png16(values, sBIT=bytes([12] * channels)))
    scaled = samples(4095, channels) << 4
    np.testing.assert_array_equal(
        images.decode(png16(scaled, sBIT=bytes([12] * channels)))[..., 0], scaled[..., 0] >> 8
    )


def test_a_tiff_of_12_bits_has_its_white_at_4095() -> None:
    for high in (300, 4095):
        values = samples(high, 1)
        np.testing.assert_array_equal(images.decode(tiff(values, bits=12))[..., 0], values[..., 0] >> 4)


def test_black_is_black() -> None:
    assert (images.decode(png16(samples(0, 1))) == 0).all()


def test_convert_writes_what_training_would_have_seen() -> None:
    values = samples(65_535, 1).repeat(9, axis=0).repeat(9, axis=1)
    clear = struct.pack(">H", int(values[0, 0, 0]))
    for data in (png16(values), png16(values, tRNS=clear), save(PIL.Image.fromarray(values[..., 0]), "TIFF")):
        checked = checking.check(Record("k", data, ("a",)), max_side=27, quality=98)
        wanted = images.resize(images.decode(data), 27, 24)
        assert np.abs(images.decode(checked.record.image).astype(int) - wanted).mean() < 2
