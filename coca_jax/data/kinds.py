"""What kind of file some bytes are, by what they begin with: images that are read, images that are not, and others."""

from __future__ import annotations

import re

# Kinds that data.images decodes; HEIC where pillow-heif is installed.
READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")

# Offset, bytes, kind.
_MAGIC = (
    (0, b"\xff\xd8", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (8, b"CR\x02", "camera raw"),  # in a TIFF: Canon
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"MM*\0", "TIFF"),
    (0, b"II\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),  # BigTIFF
    (0, b"MM\0+", "TIFF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"8BPS", "PSD"),
    (0, b"gimp xcf", "XCF"),
    (0, b"icns", "ICNS"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"\x8aMNG\r\n\x1a\n", "MNG"),
    (0, b"\x8bJNG\r\n\x1a\n", "JNG"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (0, b"IIU\0", "camera raw"),  # Panasonic
    (0, b"IIRO", "camera raw"),  # Olympus
    (0, b"IIRS", "camera raw"),
    (0, b"MMOR", "camera raw"),
    (0, b"FOVb", "camera raw"),  # Sigma
    (0, b"\0MRM", "camera raw"),  # Minolta
    (6, b"HEAPCCDR", "camera raw"),
    (8, b"AVI ", "video"),
    (0, b"\x1a\x45\xdf\xa3", "video"),  # Matroska, WebM
)
# Brands of ISO base media files (after `ftyp`): the first that is found, in this order.
_BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"),
    "camera raw": (b"crx ",),
    "video": (
        b"isom",
        b"iso2",
        b"iso4",
        b"iso5",
        b"iso6",
        b"mp41",
        b"mp42",
        b"avc1",
        b"M4V ",
        b"qt  ",
        b"3gp4",
        b"3gp5",
    ),
}
# An icon's or a cursor's file begins with how many there are in it; a TGA may begin alike, with 0.
_PATTERNS = {"PPM": re.compile(rb"P[1-7fF]\s"), "ICO": re.compile(rb"\0\0[\1\2]\0[^\0]\0")}
# What may precede the root of an XML document.
_PROLOG = ((b"<?", b"?>"), (b"<!--", b"-->"))


def sniff(data: bytes) -> str:
    """The kind of an encoded image, one of READ or another; empty where it is none that is known.

    Args:
      data: A file's content, or its first 4 KiB.
    """
    if data[4:8] == b"ftyp":
        length = int.from_bytes(data[:4], "big")
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, min(length, len(data), 256), 4))]
        for kind, known in _BRANDS.items():
            if any(brand in known for brand in brands):
                return kind
        return ""
    for offset, magic, kind in _MAGIC:
        if data.startswith(magic, offset):
            return kind
    for kind, pattern in _PATTERNS.items():
        if pattern.match(data):
            return kind
    return "SVG" if _is_svg(data[:4096]) else ""


def _is_svg(text: bytes) -> bool:
    text = text.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    while end := next((end for start, end in _PROLOG if text.startswith(start)), b""):
        text = text.partition(end)[2].lstrip()
    return text.startswith((b"<svg", b"<svg:svg", b"<!doctype svg"))
