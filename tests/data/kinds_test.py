"""What a file is, its first bytes say."""

from __future__ import annotations

import struct

import pytest

from coca_jax.data import kinds
from coca_jax.data.sources.base import IMAGE_EXTENSIONS, READ_EXTENSIONS
from tests.data.images.pictures import photo, save


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "PPM", "EPS", "DDS", "QOI"]
)
def test_what_pillow_writes_is_recognised(kind: str) -> None:
    assert kinds.sniff(save(photo(16, 24), kind)[:4096]) == kind


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    return struct.pack(">I", 16 + 4 * len(compatible)) + b"ftyp" + major + bytes(4) + b"".join(compatible) + bytes(40)


@pytest.mark.parametrize(
    "data, kind",
    [
        (ftyp(b"heic", b"mif1", b"heic"), "HEIC"),
        (ftyp(b"mif1", b"heic"), "HEIC"),
        (ftyp(b"msf1", b"hevc"), "HEIC"),
        (ftyp(b"mif1", b"miaf", b"avif"), "AVIF"),
        (ftyp(b"avis", b"msf1"), "AVIF"),
        (ftyp(b"isom", b"mp41"), "video"),
        (ftyp(b"crx ", b"isom"), "camera raw"),
        (b"\xff\x0a\xfa\x7f\x01", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + ftyp(b"jxl "), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + ftyp(b"jp2 "), "JPEG 2000"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (b"II+\0\x08\0\0\0", "TIFF"),
        (b"8BPS\0\1", "PSD"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a > b -->\n<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG'>\n<svg>",
            "SVG",
        ),
        (b"<html><body><svg></svg></body></html>", ""),
        (b"P5 2 2 4095\n", "PPM"),
        (b"RIFF\0\0\0\0AVI LIST", "video"),
        (b"", ""),
        (bytes(5000), ""),
        (b"<!---->" * 600, ""),
        (b"a text", ""),
    ],
)
def test_a_kind_by_its_first_bytes(data: bytes, kind: str) -> None:
    assert kinds.sniff(data) == kind


def test_endings_are_told_once_and_those_that_are_read_come_first() -> None:
    assert len(set(IMAGE_EXTENSIONS)) == len(IMAGE_EXTENSIONS)
    assert IMAGE_EXTENSIONS[: len(READ_EXTENSIONS)] == READ_EXTENSIONS
    assert all(extension == extension.lower() and "." not in extension for extension in IMAGE_EXTENSIONS)
