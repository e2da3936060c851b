"""What surrounds the pixels of an image never costs it: large, damaged or cut off, the pixels are those without it."""

from __future__ import annotations

import io
import pathlib
import random
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest

from coca_jax.data import images
from coca_jax.data.images import bare
from coca_jax.data.prepare import checking
from coca_jax.data.records import BadExample, Record
from tests.data.images.pictures import (
    chunk,
    detailed,
    photo,
    png,
    raw_profile,
    save,
    text_chunk,
    turned,
    with_chunks,
    with_segment,
    xmp,
)

PIXELS = detailed(40, 56)
PNG, JPEG = save(PIXELS, "PNG"), save(PIXELS, "JPEG", quality=95)
# An editor's workflow, as JSON: three megabytes that pack to little.
WORKFLOW = b'{"nodes": [' + b'{"id": 1, "type": "KSampler"}, ' * 100_000 + b"]}"
RUBBISH = random.Random(0).randbytes(3000)


def wrong(piece: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return piece[:-1] + bytes([piece[-1] ^ 1])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "piece",
    [
        text_chunk("workflow", WORKFLOW, "zTXt"),
        text_chunk("workflow", WORKFLOW, "tEXt"),
        text_chunk("workflow", WORKFLOW, "iTXt"),
        text_chunk("workflow", WORKFLOW, "ziTXt"),
        chunk(b"iCCP", b"big\0\0" + zlib.compress(WORKFLOW)),
        chunk(b"iCCP", b"rubbish\0\0" + RUBBISH),
        chunk(b"iCCP", b""),
        chunk(b"eXIf", RUBBISH),
        chunk(b"zTXt", b"key\0\0" + RUBBISH),
        chunk(b"zTXt", b"key\0\7"),
        chunk(b"iTXt", b"key"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + RUBBISH),
        chunk(b"pHYs", b"1"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"123"),
        chunk(b"sRGB", b""),
        chunk(b"sBIT", b""),
        chunk(b"tRNS", b"1"),
        chunk(b"acTL", b"12"),
        chunk(b"fcTL", b"12"),
        raw_profile("exif", b"Exif\0\0" + RUBBISH),
        text_chunk("Raw profile type exif", b"\nexif\n 12\nno digits", "tEXt"),
        text_chunk("Raw profile type APP1", b"", "tEXt"),
        wrong(text_chunk("key", b"text", "tEXt")),
        wrong(chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")),
        wrong(chunk(b"tRNS", bytes(6))),
        b"".join(text_chunk(f"key {n}", WORKFLOW[:900_000], "zTXt") for n in range(80)),
    ],
)
def test_ancillary_chunks_of_a_png(piece: bytes, after: bool) -> None:
    np.testing.assert_array_equal(images.decode(with_chunks(PNG, piece, after=after)), PIXELS)


def test_a_png_that_is_cut_off_behind_its_pixels() -> None:
    data = with_chunks(PNG, text_chunk("key", b"a text " * 100, "tEXt"), after=True)
    for end in (len(PNG) - 12, len(PNG) - 5, len(PNG) + 100, len(data) - 12, len(data) - 4):
        np.testing.assert_array_equal(images.decode(data[:end]), PIXELS)
    np.testing.assert_array_equal(images.decode(PNG[:-12] + RUBBISH), PIXELS)
    np.testing.assert_array_equal(images.decode(PNG[:-12] + b"\0\0\0\0" * 9), PIXELS)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
def test_a_wrong_checksum_of_a_critical_chunk_is_an_error(kind: bytes) -> None:
    data = save(PIL.Image.fromarray(PIXELS).quantize(16), "PNG")
    assert images.decode(data).shape == PIXELS.shape
    at = data.index(kind) + 4 + int.from_bytes(data[data.index(kind) - 4 : data.index(kind)], "big")
    broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(BadExample, match=f"the checksum of its chunk {kind.decode()} is wrong"):
        images.decode(broken)


def test_what_the_pixels_of_a_png_depend_on_is_kept() -> None:
    clear = png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), tRNS=struct.pack(">HHH", 1, 2, 3), tEXt=b"key\0text")
    np.testing.assert_array_equal(images.decode(clear, (9, 9, 9)), [[(9, 9, 9), (4, 5, 6)]])
    split = PNG.index(b"IDAT") - 4
    length = int.from_bytes(PNG[split : split + 4], "big")
    body = PNG[split + 8 : split + 8 + length]
    halves = chunk(b"IDAT", body[:50]) + chunk(b"tEXt", b"key\0between") + chunk(b"IDAT", body[50:])
    np.testing.assert_array_equal(images.decode(PNG[:split] + halves + PNG[split + 12 + length :]), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize(
    "marker, body",
    [
        (0xE0, b"JFXX\0" + RUBBISH),
        (0xE1, b"Exif\0\0" + RUBBISH),
        (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + RUBBISH),
        (0xE2, b"MPF\0" + RUBBISH),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\xff\0\0\0"),
        (0xE2, b"ICC_PROFILE\0\1\2" + RUBBISH),
        (0xE2, b"ICC_PROFILE\0"),
        (0xEC, b"Ducky\0"),
        (0xED, b"Photoshop 3.0\x008BIM" + RUBBISH),
        (0xED, b"Photoshop 3.0\x008BIM\4\4\xff\xff\xff\xff"),
        (0xEE, b"Adobf" + RUBBISH),
        (0xFE, RUBBISH),
    ],
)
def test_segments_of_a_jpeg(mode: str, marker: int, body: bytes) -> None:
    data = save(PIL.Image.fromarray(PIXELS).convert(mode), "JPEG", quality=95)
    np.testing.assert_array_equal(images.decode(with_segment(data, marker, body)), images.decode(data))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_with_a_large_profile_and_bytes_behind_it(mode: str) -> None:
    data = save(PIL.Image.fromarray(PIXELS).convert(mode), "JPEG", quality=95)
    large = data
    for number in range(40, 0, -1):
        large = with_segment(large, 0xE2, b"ICC_PROFILE\0" + bytes([number, 40]) + RUBBISH * 20)
    np.testing.assert_array_equal(images.decode(large + data), images.decode(data))


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for kind, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_chunks_of_a_webp(mode: str) -> None:
    image = PIL.Image.fromarray(PIXELS).convert(mode)
    plain = save(image, "WEBP", lossless=True)
    full = save(image, "WEBP", lossless=True, exif=b"Exif\0\0" + RUBBISH, xmp=RUBBISH[:999], icc_profile=RUBBISH)
    for end in (len(full), len(full) - 9, full.index(b"XMP ") + 12, full.index(b"EXIF") + 8):
        np.testing.assert_array_equal(images.decode(full[:end]), images.decode(plain))
    np.testing.assert_array_equal(images.decode(plain + b"trailing"), images.decode(plain))


def test_the_first_frame_of_an_animation_whose_others_are_cut_off() -> None:
    frames = [PIL.Image.fromarray(np.roll(PIXELS, 9 * n, axis=1)) for n in range(3)]
    animated = save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    second = animated.index(b"ANMF", animated.index(b"ANMF") + 4)
    for data in (animated, animated[: second + 40]):
        np.testing.assert_array_equal(images.decode(data), PIXELS)
    animated = save(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.decode(animated), PIXELS)
    animated = save(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=95)
    assert np.abs(images.decode(animated).astype(int) - PIXELS).mean() < 3


def test_comments_of_a_gif() -> None:
    plain = save(PIL.Image.fromarray(photo(20, 20)).quantize(16), "GIF")
    at = 13 + 3 * 2 ** ((plain[10] & 7) + 1)
    blocks = b"".join(b"!\xfe" + (b"\xff" + b"c" * 255) * 50 + b"\0" for _ in range(300))
    blocks += b"!\xff\x0bXMP DataXMP" + b"\x05<xmp>" + b"\0" + b"!\xff\x0bNETSCAPE2.0\x03\1\0\0\0"
    np.testing.assert_array_equal(images.decode(plain[:at] + blocks + plain[at:]), images.decode(plain))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tags_of_a_tiff(compression: str | None) -> None:
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (700, 33723, 34377, 34675):
        tags.tagtype[tag], tags[tag] = 7, RUBBISH
    for tag in (34665, 34853, 40965):  # directories that are nowhere
        tags.tagtype[tag], tags[tag] = 4, 0x7FFFFFF0 if compression is None else 12
    data = save(PIXELS, "TIFF", tiffinfo=tags, **({"compression": compression} if compression else {}))
    np.testing.assert_array_equal(images.decode(data), PIXELS)


def test_a_damaged_tiff_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg"):
        data = save(PIXELS, "TIFF", compression=compression)
        seen = set()
        for _ in range(30):
            broken = bytearray(data)
            for place in rng.integers(8, len(data), 4):
                broken[place] ^= int(rng.integers(1, 256))
            try:
                images.decode(bytes(broken))
            except BadExample as error:
                seen.add(error.reason)
        assert "not_a_picture" in seen
    assert capfd.readouterr() == ("", "")


def test_exif_of_an_avif_that_is_rubbish() -> None:
    plain = save(PIXELS, "AVIF", quality=95)
    exif = turned(6)
    exif[0x010F] = "a maker"
    data = save(PIXELS, "AVIF", quality=95, exif=exif)
    at = data.index(b"II*\0") if b"II*\0" in data else data.index(b"MM\0*")
    broken = data[:at] + b"rubbish!" + data[at + 8 :]
    np.testing.assert_array_equal(images.decode(broken), images.decode(data))
    np.testing.assert_array_equal(images.decode(data), np.rot90(images.decode(plain), -1))


def test_convert_resizes_what_has_much_metadata() -> None:
    image = PIL.Image.fromarray(PIXELS).convert("RGBA")
    data = with_chunks(save(image, "PNG"), text_chunk("workflow", WORKFLOW, "zTXt"), wrong(chunk(b"gAMA", b"1")))
    checked = checking.check(Record("k", data, ("a",)), max_side=28)
    assert checked.format == "PNG" and images.decode(checked.record.image).shape == (20, 28, 3)


def test_what_is_kept_is_small_and_holds_no_metadata(tmp_path: pathlib.Path) -> None:
    for data, kind in (
        (with_chunks(PNG, text_chunk("workflow", WORKFLOW, "tEXt")), "PNG"),
        (with_segment(JPEG, 0xE1, b"Exif\0\0" + RUBBISH), "JPEG"),
        (save(PIXELS, "WEBP", xmp=xmp(6, padding=9999)), "WEBP"),
    ):
        stripped = bare.strip(data, kind).data
        assert len(stripped) < len(data) - 2500
        with PIL.Image.open(io.BytesIO(stripped)) as opened:
            assert not {"exif", "xmp", "workflow"} & opened.info.keys()
