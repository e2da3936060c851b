"""One orientation for an image, whatever carries it and whatever reads it."""

from __future__ import annotations

import io
import pathlib
import struct
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import pytest

from coca_jax.data import images
from coca_jax.data.images import orientation as orientations
from coca_jax.data.images.decoding import Encoded, from_pillow
from coca_jax.data.prepare import checking, describe
from coca_jax.data.records import Record
from tests.data.images import pictures
from tests.data.images.pictures import XMP_HEAD, photo, save, turned, with_chunks, with_segment, xmp

HEIGHT, WIDTH = 40, 60
PIXELS = photo(HEIGHT, WIDTH)
# As Pillow's ImageOps.exif_transpose has them.
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def upright(orientation: int) -> np.ndarray:
    image = PIL.Image.fromarray(PIXELS)
    return np.asarray(image.transpose(TURNS[orientation]) if orientation in TURNS else image)


def tiff_exif(value: int, order: str = "<", kind: int = 3, number: int = 1) -> bytes:
    """EXIF of one tag, without a head."""
    field = struct.pack(order + "HH" if kind in (3, 8) else order + "I", value, *([0] if kind in (3, 8) else []))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, number) + field + bytes(4)


def app1(value: int, order: str = ">") -> bytes:
    return b"Exif\0\0" + tiff_exif(value, order)


def of_png(*chunks: bytes, after: bool = False, image: PIL.Image.Image | None = None) -> bytes:
    return with_chunks(save(image or PIL.Image.fromarray(PIXELS), "PNG"), *chunks, after=after)


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return save(PIL.Image.fromarray(PIXELS).convert(mode), "JPEG", quality=97, subsampling=0, **options)


def tiff(**options: object) -> bytes:
    return save(PIXELS, "TIFF", **options)


def tiff_xmp(value: int) -> bytes:
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = 7
    tags[700] = xmp(value)
    return tiff(tiffinfo=tags)


def heic(value: int) -> bytes:
    plugin = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    plugin.from_pillow(PIL.Image.fromarray(PIXELS)).save(out, quality=95, exif=turned(value).tobytes())
    return out.getvalue()


def see_through() -> PIL.Image.Image:
    image = PIL.Image.fromarray(PIXELS).convert("RGBA")
    return image


CARRIERS: dict[str, Callable[[int], bytes]] = {
    "jpeg exif": lambda o: jpeg(exif=turned(o)),
    "jpeg exif, big endian": lambda o: with_segment(jpeg(), 0xE1, app1(o)),
    "jpeg exif, 32 bits": lambda o: with_segment(jpeg(), 0xE1, b"Exif\0\0" + tiff_exif(o, ">", 4)),
    "jpeg exif after another segment": lambda o: with_segment(jpeg(exif=turned(o)), 0xEC, b"Ducky" + bytes(99)),
    "jpeg xmp": lambda o: with_segment(jpeg(), 0xE1, XMP_HEAD + xmp(o)),
    "jpeg xmp element": lambda o: with_segment(jpeg(), 0xE1, XMP_HEAD + xmp(o, element=True)),
    "progressive jpeg xmp": lambda o: with_segment(jpeg(progressive=True), 0xE1, XMP_HEAD + xmp(o)),
    "cmyk jpeg exif": lambda o: jpeg("CMYK", exif=turned(o)),
    "cmyk jpeg xmp": lambda o: with_segment(jpeg("CMYK"), 0xE1, XMP_HEAD + xmp(o)),
    "jpeg exif and another xmp": lambda o: with_segment(jpeg(exif=turned(o)), 0xE1, XMP_HEAD + xmp(o % 8 + 1)),
    "png exif": lambda o: of_png(pictures.chunk(b"eXIf", tiff_exif(o))),
    "png exif after": lambda o: of_png(pictures.chunk(b"eXIf", tiff_exif(o)), after=True),
    "png exif and another xmp": lambda o: of_png(
        pictures.text_chunk("XML:com.adobe.xmp", xmp(o % 8 + 1), "iTXt"), pictures.chunk(b"eXIf", tiff_exif(o, ">"))
    ),
    "png raw exif": lambda o: of_png(pictures.raw_profile("exif", app1(o))),
    "png raw exif text": lambda o: of_png(pictures.raw_profile("exif", app1(o), "tEXt")),
    "png raw exif text after": lambda o: of_png(pictures.raw_profile("exif", app1(o), "tEXt"), after=True),
    "png raw exif international": lambda o: of_png(pictures.raw_profile("exif", app1(o), "iTXt")),
    "png raw app1": lambda o: of_png(pictures.raw_profile("APP1", app1(o))),
    "png raw app1 xmp": lambda o: of_png(pictures.raw_profile("APP1", XMP_HEAD + xmp(o))),
    "png raw xmp": lambda o: of_png(pictures.raw_profile("xmp", xmp(o), "ziTXt")),
    "png xmp": lambda o: of_png(pictures.text_chunk("XML:com.adobe.xmp", xmp(o), "iTXt")),
    "png xmp after": lambda o: of_png(
        pictures.text_chunk("XML:com.adobe.xmp", xmp(o, element=True), "iTXt"), after=True
    ),
    "png xmp compressed": lambda o: of_png(pictures.text_chunk("XML:com.adobe.xmp", xmp(o, quote="'"), "ziTXt")),
    "see-through png raw exif": lambda o: of_png(pictures.raw_profile("exif", app1(o)), image=see_through()),
    "see-through png xmp": lambda o: of_png(
        pictures.text_chunk("XML:com.adobe.xmp", xmp(o), "iTXt"), image=see_through()
    ),
    "webp exif": lambda o: save(PIXELS, "WEBP", lossless=True, exif=turned(o)),
    "webp xmp": lambda o: save(PIXELS, "WEBP", lossless=True, xmp=xmp(o)),
    "tiff": lambda o: tiff(exif=turned(o)),
    "lzw tiff": lambda o: tiff(exif=turned(o), compression="tiff_lzw"),
    "tiff xmp": tiff_xmp,
    "avif": lambda o: save(PIXELS, "AVIF", quality=95, subsampling="4:4:4", exif=turned(o)),
    "heic": heic,
}


def through_check(data: bytes) -> np.ndarray:
    """What convert --max_side writes, half as large."""
    return images.decode(checking.check(Record("k", data, ("a",)), max_side=WIDTH // 2).record.image)


def assert_like(found: np.ndarray, wanted: np.ndarray, what: str, limit: float = 3) -> None:
    assert found.shape == wanted.shape, what
    assert np.abs(found.astype(int) - wanted).mean() < limit, what


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_reading_path_turns_alike(carrier: str, tmp_path: pathlib.Path) -> None:
    for orientation in range(1, 9):
        data, wanted = CARRIERS[carrier](orientation), upright(orientation)
        file = tmp_path / "image"
        file.write_bytes(data)
        height, width = wanted.shape[:2]
        decoded = images.decode(data)
        assert (Encoded(data).width, Encoded(data).height) == (width, height)
        assert_like(decoded, wanted, f"{carrier} {orientation} decode")
        assert_like(
            images.decode(data, min_side=20),
            images.resize(wanted, width // 2, height // 2) if "jpeg" in carrier else wanted,
            f"{carrier} {orientation} reduced",
        )
        fitted = images.Preprocessor(16).pixels([file, data])
        np.testing.assert_array_equal(fitted[0], fitted[1])
        assert_like(fitted[0], images.fit(wanted, 16), f"{carrier} {orientation} fit")
        record = Record("k", data, ("a",))
        np.testing.assert_array_equal(images.decode_and_fit(data, 16), fitted[0])  # as the pixel baseline does
        small = images.resize(wanted, *(side // 2 for side in (width, height)))
        assert_like(through_check(data), small, f"{carrier} {orientation} convert", 5)
        if "heic" not in carrier:  # nobody has registered it with Pillow
            for loaded in (False, True):
                with PIL.Image.open(io.BytesIO(data)) as opened:
                    if loaded:
                        opened.load()
                    assert_like(from_pillow(opened), wanted, f"{carrier} {orientation} Pillow {loaded}")
        if orientation == 6:
            describe.contact_sheet([record], tmp_path / "turned.jpg")
            describe.contact_sheet([record._replace(image=save(wanted, "PNG"))], tmp_path / "plain.jpg")
            sheets = [images.decode((tmp_path / name).read_bytes()) for name in ("turned.jpg", "plain.jpg")]
            assert_like(sheets[0], sheets[1], carrier)


@pytest.mark.parametrize("value", [0, 9, 65_535])
@pytest.mark.parametrize(
    "carrier", [name for name in CARRIERS if "another" not in name and name not in ("avif", "heic", "lzw tiff")]
)
def test_an_orientation_that_is_none_means_upright(carrier: str, value: int) -> None:
    data = CARRIERS[carrier](value)
    assert images.decode(data).shape == PIXELS.shape
    assert through_check(data).shape == (20, 30, 3)
    if carrier != "tiff xmp" or value != 65_535:  # of which Pillow takes the first digit, before it can be asked
        assert from_pillow(PIL.Image.open(io.BytesIO(data))).shape == PIXELS.shape


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own, when it opens a JPEG
@pytest.mark.parametrize(
    "exif",
    [
        tiff_exif(6, kind=2),  # a text
        tiff_exif(6, kind=5),  # a fraction
        tiff_exif(6, number=2),
        tiff_exif(6)[:14],
        b"II*\0\xff\xff\xff\xff",
        b"rubbish",
        b"",
    ],
)
def test_exif_of_another_type_means_upright(exif: bytes) -> None:
    assert orientations.decide([exif]) == 1
    for data in (with_segment(jpeg(), 0xE1, b"Exif\0\0" + exif), of_png(pictures.chunk(b"eXIf", exif))):
        assert images.decode(data).shape == PIXELS.shape
        assert from_pillow(PIL.Image.open(io.BytesIO(data))).shape == PIXELS.shape


def test_exif_that_says_nothing_leaves_the_word_to_xmp() -> None:
    said = b"Exif\0\0" + tiff_exif(1).replace(b"\x12\x01", b"\x0f\x01")  # another tag
    data = with_segment(with_segment(jpeg(), 0xE1, XMP_HEAD + xmp(6)), 0xE1, said)
    assert images.decode(data).shape == from_pillow(PIL.Image.open(io.BytesIO(data))).shape == (60, 40, 3)


def test_what_pillow_has_turned_is_not_turned_again() -> None:
    for carrier in ("jpeg exif", "jpeg xmp", "png raw exif", "png xmp", "webp xmp", "tiff", "tiff xmp"):
        opened = PIL.Image.open(io.BytesIO(CARRIERS[carrier](6)))
        assert_like(from_pillow(PIL.ImageOps.exif_transpose(opened)), upright(6), carrier)
        opened = PIL.Image.open(io.BytesIO(CARRIERS[carrier](6)))
        assert_like(from_pillow(opened.copy()), upright(6), carrier)
