"""Kinds of images: those that are read beside JPEG and PNG, and those that are named when they are left out."""

from __future__ import annotations

import io
import pathlib
import struct
import sys

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest

from coca_jax import pictures as command
from coca_jax.data import images
from coca_jax.data.images import plugins
from coca_jax.data.images.decoding import Encoded
from coca_jax.data.prepare import describe
from coca_jax.data.records import BadExample
from tests.data.images.pictures import photo, save

PIXELS = photo(40, 60)
# The boxes of a HEIC photograph, without what they hold: what is it called where it is not read?
HEIC_BOXES = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + struct.pack(">I", 12) + b"meta" + bytes(4)
HEIC_BOXES += struct.pack(">IIQ", 1, int.from_bytes(b"mdat", "big"), 16 + 99) + bytes(99)  # of a length in 64 bits


def heic(pixels: np.ndarray = PIXELS) -> bytes:
    out = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(PIL.Image.fromarray(pixels)).save(out, quality=95)
    return out.getvalue()


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"\xff\x0a" + bytes(99), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
        (save(PIXELS, "JPEG2000"), "JPEG 2000"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "SVG"),
        (save(PIXELS, "ICO"), "ICO"),
        (b"8BPS\0\1" + bytes(99), "PSD"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x18ftypisom" + bytes(99), "video"),
        (b"\0\0\0\x18ftypcrx " + bytes(99), "camera raw"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "camera raw"),
    ],
)
def test_a_kind_that_is_not_read_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(
        BadExample, match=f"^{len(data)} bytes of a kind that is not read: {kind}; write it as"
    ) as caught:
        images.decode(data)
    assert caught.value.reason == "unsupported"


def test_heic_names_the_package_that_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    plugins._heif.cache_clear()
    try:
        with pytest.raises(BadExample, match=r"not read: HEIC; pip install 'coca_jax\[heic\]'$") as caught:
            images.decode(HEIC_BOXES)
        assert caught.value.reason == "unsupported"
        # A folder of classes counts it, and caption and embed find it.
        for name in ("cat/1.HEIC", "cat/2.png", "dog/3.jxl"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(HEIC_BOXES if "HEIC" in name else save(PIXELS, "PNG"))
        found = describe.describe(f"folder:{tmp_path}")
        assert (found.statistics.records, found.statistics.bad) == (2, 1)
        assert [bad.reason for bad in found.bad] == ["unsupported"] and "HEIC; pip install" in found.bad[0].message
        assert len(command.find([str(tmp_path)])) == 3
    finally:
        plugins._heif.cache_clear()


def test_heic() -> None:
    data = heic()
    encoded = Encoded(data)
    assert (encoded.kind, encoded.width, encoded.height) == ("HEIC", 60, 40)
    assert np.abs(images.decode(data).astype(int) - PIXELS).mean() < 3
    rgba = np.dstack([PIXELS, np.full((40, 60), 255, np.uint8)])
    rgba[:, :30, 3] = 0
    assert (images.decode(heic(rgba), (9, 8, 7))[:, :28] == (9, 8, 7)).all()
    assert "HEIF" not in PIL.Image.OPEN  # files of the caller's are opened as before


def test_heic_that_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    for end in (13, 30, len(data) // 2, len(data) - 9):
        with pytest.raises(BadExample) as caught:
            images.decode(data[:end])
        assert caught.value.reason == "truncated", (end, caught.value)
    size = data.index(b"ispe") + 8
    for side, reason in (
        (12_000, "not_a_picture"),
        (60_000, "too_large"),
    ):  # libheif sees that it is not true, or stops
        with pytest.raises(BadExample) as caught:
            images.decode(data[:size] + struct.pack(">II", side, side) + data[size + 8 :])
        assert caught.value.reason == reason, caught.value
    monkeypatch.setattr("coca_jax.data.images.decoding.MAX_PIXELS", 1000)
    with pytest.raises(BadExample, match="60 x 40 pixels is over the limit of 1000"):
        images.decode(data)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "RGBA"])
def test_modes_of_a_tiff(mode: str, compression: str | None) -> None:
    image = PIL.Image.fromarray(PIXELS).quantize(16) if mode == "P" else PIL.Image.fromarray(PIXELS)
    image = image.convert(mode)
    options = {"compression": compression} if compression else {}
    wanted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(images.decode(save(image, "TIFF", **options)), wanted)


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}])
def test_the_first_page_of_a_tiff(options: dict[str, object]) -> None:
    pages = [PIL.Image.fromarray(np.roll(PIXELS, 9 * n, axis=1)) for n in range(3)]
    data = save(pages[0], "TIFF", save_all=True, append_images=pages[1:], **options)
    np.testing.assert_array_equal(images.decode(data), PIXELS)


def test_the_thumbnail_of_a_camera_is_not_taken_for_its_photograph() -> None:
    for tags in ({50706: b"\1\4\0\0"}, {254: 1, 330: 8}):
        info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in tags.items():
            info.tagtype[tag] = 1 if isinstance(value, bytes) else 4
            info[tag] = value
        with pytest.raises(BadExample, match="not read: camera raw; develop it first"):
            images.decode(save(PIXELS, "TIFF", tiffinfo=info))
    info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    info[254] = 1  # a reduced image, and no other
    np.testing.assert_array_equal(images.decode(save(PIXELS, "TIFF", tiffinfo=info)), PIXELS)
