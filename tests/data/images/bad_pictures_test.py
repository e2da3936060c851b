"""Pictures that cannot be used: each is a BadExample with its reason, soon and without much memory; nothing is bent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from coca_jax import config
from coca_jax.data import images
from coca_jax.data.images.decoding import Encoded
from coca_jax.data.records import BadExample
from tests.data.images.pictures import chunk, detailed, png, save, turned


def kinds() -> dict[str, bytes]:
    pixels = detailed(40, 56)
    return {
        "jpeg": save(pixels, "JPEG"),
        "progressive jpeg": save(pixels, "JPEG", progressive=True),
        "cmyk jpeg": save(PIL.Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "turned jpeg": save(pixels, "JPEG", exif=turned(6)),
        "png": save(pixels, "PNG"),
        "palette png": save(PIL.Image.fromarray(pixels).quantize(16), "PNG"),
        "gif": save(pixels, "GIF"),
        "webp": save(pixels, "WEBP"),
        "lossless webp": save(pixels, "WEBP", lossless=True),
        "bmp": save(pixels, "BMP"),
        "tiff": save(pixels, "TIFF"),
        "lzw tiff": save(pixels, "TIFF", compression="tiff_lzw"),
        "avif": save(pixels, "AVIF"),
    }


KINDS = kinds()


def reason(act: Callable[..., object], *arguments: object, **named: object) -> str:
    try:
        act(*arguments, **named)
    except BadExample as error:
        assert "\n" not in str(error) and "0x" not in str(error)
        return error.reason
    return "readable"


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_cut_is_truncated_or_whole(kind):
    """Wherever it is cut: what is handed out is never a part of it with grey below."""
    data = KINDS[kind]
    whole = images.decode(data)
    seen = set()
    for length in range(1, len(data), max(1, len(data) // 500)):
        try:
            np.testing.assert_array_equal(images.decode(data[:length]), whole)
            assert length >= len(data) - 40, length  # only the last chunk may be missing
        except BadExample as error:
            seen.add(error.reason)
            # Of less than a signature, or of a TIFF whose directory is broken, nobody can say more.
            excused = length < 12 or "tiff" in kind or data[:length].endswith(b";")  # which ends a GIF
            assert error.reason == "truncated" or excused, (length, error)
    assert "truncated" in seen


def reduced(data: bytes, factor: int) -> np.ndarray:
    return Encoded(data).pixels(factor=factor)[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "jpeg" in kind])
def test_whether_a_jpeg_is_cut_does_not_depend_on_the_reduction(kind):
    data = KINDS[kind]
    ends = [*range(2, len(data) - 40, len(data) // 60), *range(len(data) - 40, len(data) + 1)]
    for end in ends:
        found = {reason(reduced, data[:end], factor) for factor in (1, 2, 4, 8)}
        assert found == {"readable" if end == len(data) else "truncated"}, end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_flipped_bytes_give_pixels_or_a_reason(kind, seed):
    rng = np.random.default_rng(seed)
    data = KINDS[kind]
    seen = set()
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 8)):
            place = int(rng.integers(len(data) if rng.random() < 0.6 else 64))  # headers matter most
            broken[place] = int(rng.integers(256))
        cut = int(rng.integers(len(data))) if rng.random() < 0.2 else len(data)
        encoded = bytes(broken[:cut])
        seen.add(reason(images.decode_and_augment, encoded, 8, rng, config.Data()))
    assert "not_a_picture" in seen and "truncated" in seen


@pytest.mark.parametrize(
    "data, wanted",
    [
        (b"", "empty"),
        (b"\xff\xd8", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"GIF89a", "truncated"),
        (b"RIFF", "truncated"),
        (b"<html><body>404 Not Found</body></html>", "not_a_picture"),
        (b'{"error": "gone"}', "not_a_picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported"),
        (b"\0" * 5000, "not_a_picture"),
        (bytes(range(256)) * 20, "not_a_picture"),
    ],
)
def test_what_is_no_picture(data, wanted):
    assert reason(images.decode, data) == reason(Encoded, data) == reason(images.decode_and_fit, data, 8) == wanted


def test_other_formats_that_pillow_reads_are_not_read():
    for kind in ("TGA", "PCX"):
        assert reason(images.decode, save(detailed(16, 16), kind)) == "not_a_picture"
    for kind in ("PPM", "ICO", "EPS", "JPEG2000"):
        with pytest.raises(BadExample, match=f"bytes of a kind that is not read: {kind[:4]}") as caught:
            images.decode(save(detailed(16, 16), kind))
        assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_too_many_pixels(kind, monkeypatch):
    monkeypatch.setattr("coca_jax.data.images.decoding.MAX_PIXELS", 1000)
    with pytest.raises(BadExample, match="40 x 30 pixels is over the limit of 1000"):
        images.decode(save(PIL.Image.new("RGB", (40, 30)), kind))
    with pytest.raises(BadExample, match="40 x 30 pixels"):
        images.Preprocessor(8)([PIL.Image.new("RGB", (40, 30))])


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def bombs() -> dict[str, bytes]:
    """Small files that would unpack to gigabytes, or keep a core busy for long."""
    jpeg, webp, lossless = KINDS["jpeg"], KINDS["webp"], KINDS["lossless webp"]
    scans = KINDS["progressive jpeg"]
    start = scans.index(b"\xff\xda")
    many = scans[:start] + scans[start : scans.index(b"\xff\xda", start + 2)] * 2000 + scans[start:]
    start = jpeg.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(8)  # of the first component alone
    sequential = jpeg[:start] + scan * 2000 + jpeg[start:]
    text = b"key\0\0" + zlib.compress(b"\0" * 200_000_000, 9)
    extended = b"RIFF" + struct.pack("<I", len(webp) + 10) + b"WEBPVP8X" + struct.pack("<I", 10)
    extended += bytes(4) + (16_000).to_bytes(3, "little") * 2 + webp[12:]
    return {
        "jpeg": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65_000, 65_000),
        "progressive jpeg": patched(scans, scans.index(b"\xff\xc2") + 5, ">HH", 30_000, 30_000),
        "many scans": patched(many, many.index(b"\xff\xc2") + 5, ">HH", 9_000, 9_000),
        "many scans of a baseline jpeg": patched(sequential, jpeg.index(b"\xff\xc0") + 5, ">HH", 9_000, 9_000),
        "png": png(60_000, 60_000, 8, 2, filtered=bytes(100)),
        "webp": patched(webp, 26, "<HH", 16_383, 16_383),
        "lossless webp": patched(lossless, 21, "<I", 16_383 | 16_383 << 14),
        "extended webp": extended,
        "gif": patched(KINDS["gif"], 6, "<HH", 65_535, 65_535),
        "bmp": patched(KINDS["bmp"], 18, "<ii", 60_000, 60_000),
        "text in a png": png(2, 2, 8, 0, bytes(4), zTXt=text),
        "international text in a png": png(2, 2, 8, 0, bytes(4), iTXt=b"key\0\1\0\0\0" + text[5:]),
        "profile in a png": png(2, 2, 8, 0, bytes(4), iCCP=text),
        "xmp in a png": png(2, 2, 8, 0, bytes(4), iTXt=b"XML:com.adobe.xmp\0\1\0\0\0" + text[5:]),
        "exif in a png": png(2, 2, 8, 0, bytes(4), zTXt=b"Raw profile type exif\0\0" + text[5:]),
        "frames in a gif": patched(KINDS["gif"], KINDS["gif"].index(b",\0\0\0\0") + 5, "<HH", 65_535, 65_535),
    }


def test_bombs_cost_little(run_python, tmp_path):
    """Those of pixels are refused; those of metadata cost no image."""
    for name, data in bombs().items():
        assert len(data) < 1_000_000
        (tmp_path / name).write_bytes(data)
    run = run_python(
        f"""
        import pathlib, resource, time
        from coca_jax.data import images
        from coca_jax.data.records import BadExample
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for file in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            data, before, started = file.read_bytes(), peak(), time.process_time()
            try:
                images.decode(data)
                found = "readable"
            except BadExample as error:
                found = error.reason
            print(file.name, found, round(peak() - before), round(time.process_time() - started, 1), sep=":")
        """
    )
    rows = [line.split(":") for line in run.stdout.strip().splitlines()]
    assert len(rows) == len(bombs())
    # Before version 13 Pillow's WebP decoder was the first to look at the canvas, and did not say why it refused it.
    excused = ["extended webp"] if int(PIL.__version__.split(".")[0]) < 13 else []
    wanted = {name: "readable" if " in a png" in name else "too_large" for name in bombs()}
    assert [row for row in rows if row[1] != wanted[row[0]] and row[0] not in excused] == []
    assert [row for row in rows if float(row[2]) > 64 or float(row[3]) > 1] == []  # MiB, seconds


def test_a_chunk_that_is_wrong_is_corrupt():
    """PNG carries checksums; a picture whose header is damaged is not believed."""
    good = png(8, 8, 8, 0, bytes(range(64)))
    assert reason(images.decode, good) == "readable"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    assert reason(images.decode, good.replace(header, header[:-1] + b"\0")) == "not_a_picture"
    assert reason(images.decode, good.replace(b"IDAT", b"IDAX")) == "not_a_picture"


def test_the_message_says_what_and_how_long():
    with pytest.raises(BadExample, match=r"^39 bytes that are not a readable picture: none of JPEG, PNG, WEBP, GIF"):
        images.decode(b"<html><body>404 Not Found</body></html>")
