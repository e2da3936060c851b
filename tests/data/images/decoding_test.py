"""Decoding every format, against the pixels that went in where that is lossless, else against Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from coca_jax.data import images
from coca_jax.data.images.decoding import Encoded, from_pillow
from coca_jax.data.records import BadExample
from tests.data.images.pictures import detailed, photo, png, reference, save, turned

# Two decoders of one JPEG differ by how they enlarge its halved chroma and round: less than a grey level on average.
JPEG = 1.0
LOSSLESS = {"WEBP": {"lossless": True}, "AVIF": {"lossless": True, "subsampling": "4:4:4"}}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels_that_went_in(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    decoded = images.decode(save(pixels, kind, **LOSSLESS.get(kind, {})))
    np.testing.assert_array_equal(decoded, pixels)
    decoded[0, 0] = 7  # it is the caller's


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff(compression):
    np.testing.assert_array_equal(images.decode(save(photo(31, 45), "TIFF", compression=compression)), photo(31, 45))


@pytest.mark.parametrize("kind, options", [("WEBP", {"quality": 95}), ("AVIF", {"quality": 95})])
def test_lossy_formats(kind, options):
    decoded = images.decode(save(photo(), kind, **options)).astype(int)
    assert np.abs(decoded - photo()).mean() < 2  # what the format itself loses


def test_gif_shows_its_first_frame():
    frames = [PIL.Image.new("P", (12, 10), color) for color in (0, 1)]
    for frame in frames:
        frame.putpalette([250, 10, 20, 30, 40, 240])
    for animated in (False, True):
        options = {"save_all": True, "append_images": frames[1:], "duration": 100} if animated else {}
        assert (images.decode(save(frames[0], "GIF", **options)) == (250, 10, 20)).all()


def test_transparent_gif_lies_on_the_background():
    image = PIL.Image.new("P", (12, 10), 0)
    image.putpalette([250, 10, 20, 30, 40, 240])
    image.paste(1, (6, 0, 12, 10))
    decoded = images.decode(save(image, "GIF", transparency=0), (1, 2, 3))
    assert (decoded[:, :6] == (1, 2, 3)).all() and (decoded[:, 6:] == (30, 40, 240)).all()


def test_first_frame_of_an_animated_webp():
    frames = [PIL.Image.new("RGB", (16, 16), color) for color in ((200, 0, 0), (0, 0, 200))]
    data = save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (images.decode(data) == (200, 0, 0)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}])
def test_jpeg_like_pillow(mode, options):
    data = save(PIL.Image.fromarray(photo(121, 163)).convert(mode), "JPEG", quality=90, **options)
    decoded = images.decode(data)
    assert decoded.shape == (121, 163, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded - reference(data)).mean() < JPEG


def adobe(data: bytes, transform: int) -> bytes:
    """The JPEG with an Adobe segment, which says that CMYK is stored inverted, and whether as YCCK (2) or not (0)."""
    at = data.find(b"\xff\xee")
    if at >= 0:
        data = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + data[2:]


@pytest.mark.parametrize("transform", [0, 2])
@pytest.mark.parametrize("factor", [1, 2])
def test_four_channels_as_adobe_writes_them(transform, factor):
    # Ink of 0..255 shows as (255 - cyan) (255 - black) / 255 of red, and so on.
    ink = np.concatenate([photo(64, 96), photo(64, 96)[..., :1] // 4], axis=-1)
    wanted = (255 - ink[..., :3].astype(int)) * (255 - ink[..., 3:].astype(int)) / 255
    stored = ink  # Pillow writes 255 - ink, as Adobe does
    if transform == 2:  # YCCK: 255 - ink, as if 255 - that were red, green and blue, in luma and chroma
        luma = np.asarray(PIL.Image.fromarray(ink[..., :3]).convert("YCbCr"))
        stored = np.concatenate([255 - luma, ink[..., 3:]], axis=-1)
    data = adobe(save(PIL.Image.fromarray(stored, "CMYK"), "JPEG", quality=97, subsampling=0), transform)
    pixels, reduced = Encoded(data).pixels(factor=factor)
    assert reduced == factor
    wanted = cv2.resize(wanted, (96 // factor, 64 // factor), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels - wanted).mean() < 2  # the loss of JPEG at this quality, twice: ink times black


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    data = save(photo(60, 81), kind, exif=turned(orientation), **LOSSLESS.get(kind, {}))
    decoded, wanted = images.decode(data), reference(data)
    assert decoded.shape == wanted.shape == ((81, 60, 3) if orientation >= 5 else (60, 81, 3))
    assert np.abs(decoded - wanted).mean() < JPEG
    # The corners of photo() differ by 200: this is not the reference's mistake.
    corner = images.decode(save(photo(60, 81), "PNG"))[0, 0].astype(int)
    at = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[orientation]
    assert np.abs(decoded[at] - corner).max() < 20


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_is_none_is_ignored(value):
    data = save(photo(60, 80), "JPEG", exif=turned(value))
    assert images.decode(data).shape == (60, 80, 3)


def test_exif_that_cannot_be_read_is_ignored():
    data = save(photo(60, 80), "JPEG", exif=turned(6))
    at = data.index(b"Exif\0\0") + 6
    broken = data[:at] + b"XX*\0\xff\xff\xff\xff" + data[at + 8 :]
    assert images.decode(broken).shape == (60, 80, 3)


def test_transparency_lies_on_the_background():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255
    wanted = rgba[..., :3] * alpha + np.array([10, 20, 250]) * (1 - alpha)
    np.testing.assert_allclose(images.decode(save(rgba, "PNG"), (10, 20, 250)), wanted, atol=1)
    # WebP keeps colours under alpha 0 only when told to.
    webp = save(rgba, "WEBP", lossless=True, exact=True)
    np.testing.assert_allclose(images.decode(webp, (10, 20, 250)), wanted, atol=1)


@pytest.mark.parametrize("mode", ["P", "LA"])
def test_transparency_of_other_modes(mode):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (90, 90, 90, 255)  # left half see-through
    image = PIL.Image.fromarray(rgba)
    image = image.quantize(4) if mode == "P" else image.convert("LA")
    decoded = images.decode(save(image, "PNG"), (255, 0, 0))
    assert (decoded[:, :4] == (255, 0, 0)).all()
    assert np.abs(decoded[:, 4:].astype(int) - 90).max() <= 2


@pytest.mark.parametrize("mode, clear", [("1", 0), ("L", 40), ("RGB", (1, 2, 3)), ("P", 1)])
def test_a_colour_that_stands_for_see_through(mode, clear):
    image = PIL.Image.new("RGB", (8, 8), (250, 250, 250)).convert(mode)
    if mode == "P":
        image.putpalette([250, 250, 250, 9, 9, 9])
        image.paste(0, (0, 0, 8, 8))
    image.paste(clear, (0, 0, 4, 8))
    decoded = images.decode(save(image, "PNG", transparency=clear), (255, 0, 0))
    assert (decoded[:, :4] == (255, 0, 0)).all() and (decoded[:, 4:] >= 250).all()
    assert (decoded[:, 4:, 0] == decoded[:, 4:, 1]).all()


def test_sixteen_bits_of_grey():
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = images.decode(save(PIL.Image.fromarray(grey), kind))
        np.testing.assert_array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
    clear = png(8, 8, 16, 0, grey.astype(">u2").reshape(8, -1).tobytes(), tRNS=struct.pack(">H", int(grey[2, 3])))
    np.testing.assert_array_equal(images.decode(clear, (9, 8, 7))[2, 3], (9, 8, 7))


@pytest.mark.parametrize(
    "high, is_read", [(0, True), (255, False), (4095, False), (4096, True), (65_535, True), (65_536, False)]
)
def test_integers_of_32_bits_are_read_where_they_are_16(high, is_read):
    grey = np.linspace(0, high, 64).reshape(8, 8).astype(np.int32)
    image = PIL.Image.fromarray(grey)
    assert image.mode == "I"
    for read in (lambda: images.decode(save(image, "TIFF")), lambda: from_pillow(image)):
        if is_read:
            np.testing.assert_array_equal(read(), np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
        else:
            with pytest.raises(BadExample, match=f"integers of 32 bits, 0 to {high}, of which nobody says"):
                read()
    with pytest.raises(BadExample, match="integers of 32 bits, -9 to "):
        from_pillow(PIL.Image.fromarray(grey - 9))


@pytest.mark.parametrize("channels, color_type", [(3, 2), (2, 4), (4, 6)])
def test_sixteen_bits_of_colour_and_alpha(channels, color_type):
    values = np.random.default_rng(0).integers(0, 65_536, (8, 9, channels), dtype=np.uint16)
    decoded = images.decode(png(9, 8, 16, color_type, values.astype(">u2").tobytes()), (0, 0, 0))
    eight = (values >> 8).astype(np.float64)
    colors = eight[..., :3] if channels > 2 else np.repeat(eight[..., :1], 3, axis=2)
    wanted = colors * eight[..., -1:] / 255 if channels != 3 else colors
    np.testing.assert_allclose(decoded, wanted, atol=1 if channels != 3 else 0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey(bits):
    levels = np.arange(8) % 2**bits
    row = int("".join(f"{level:0{bits}b}" for level in levels), 2).to_bytes(bits, "big")
    decoded = images.decode(png(8, 3, bits, 0, row * 3))
    wanted = levels * 255 // (2**bits - 1)
    np.testing.assert_array_equal(decoded, np.broadcast_to(wanted[None, :, None], (3, 8, 3)))


def test_interlaced_png():
    # Adam7 (PNG specification, 8.2): first row and column, and steps, of each pass.
    pixels = np.random.default_rng(0).integers(0, 256, (19, 21, 3), dtype=np.uint8)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx])
    np.testing.assert_array_equal(images.decode(png(21, 19, 8, 2, filtered=rows, interlace=1)), pixels)


def test_interlaced_gif():
    image = PIL.Image.fromarray(photo(20, 20)).quantize(16)
    decoded = images.decode(save(image, "GIF", interlace=True))
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


def test_pixels_in_floating_point_are_refused():
    data = save(PIL.Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(BadExample, match="floating point") as caught:
        images.decode(data)
    assert caught.value.reason == "not_a_picture"


@pytest.mark.parametrize("min_side, shape", [(0, (240, 321)), (121, (240, 321)), (120, (120, 160)), (50, (60, 80))])
def test_reduced_jpeg(min_side, shape):
    pixels = photo(240, 321)
    decoded = images.decode(save(pixels, "JPEG", quality=95), min_side=min_side)
    assert decoded.shape[:2] == shape
    factor = 240 // shape[0]
    wanted = cv2.resize(pixels[:, : shape[1] * factor], shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(decoded - wanted).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_jpeg_shows_means_of_cells(orientation, factor):
    """Also where the size is no multiple of the factor, and the picture is turned."""
    data = save(detailed(93, 126), "JPEG", quality=92, exif=turned(orientation))
    reduced, by = Encoded(data).pixels(factor=factor)
    whole = save(detailed(93, 126)[: 93 // factor * factor, : 126 // factor * factor], "PNG", exif=turned(orientation))
    assert by == factor
    wanted = cv2.resize(
        images.decode(whole), (reduced.shape[1], reduced.shape[0]), interpolation=cv2.INTER_AREA
    ).astype(int)
    # The loss of the JPEG, and of its chroma, which is stored at half the size and not enlarged when halved.
    assert np.abs(reduced - wanted).mean() < 3
    moved = min(np.abs(np.roll(reduced, s, axis).astype(int) - wanted).mean() for axis in (0, 1) for s in (1, -1))
    assert moved > 1.5 * np.abs(reduced - wanted).mean()


def test_the_name_does_not_count(tmp_path):
    (tmp_path / "a.jpg").write_bytes(save(photo(40, 50), "PNG"))
    np.testing.assert_array_equal(
        images.Preprocessor(40).pixels([tmp_path / "a.jpg"])[0], images.fit(photo(40, 50), 40)
    )


def test_truncated_pictures_are_never_mended():
    assert not PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def test_bytes_after_the_end_do_no_harm():
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        data = save(photo(40, 50), kind)
        np.testing.assert_array_equal(images.decode(data + b"\0" * 100), images.decode(data))


def test_png_helper_is_a_png():
    data = png(2, 1, 8, 0, bytes([7, 8]))
    assert PIL.Image.open(io.BytesIO(data)).size == (2, 1) and zlib.crc32(b"IEND") == struct.unpack(">I", data[-4:])[0]
