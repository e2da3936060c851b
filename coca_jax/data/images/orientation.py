"""How an image has to be turned to be upright: the only place that reads an orientation.

Values are those of EXIF tag 0x0112: 1 is upright, 2 to 8 are mirrored or turned, anything else means 1. EXIF is asked
first, wherever a format keeps it, then XMP (`tiff:Orientation`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

import numpy as np
import PIL.Image

TAG = 0x0112
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
# ImageMagick's text chunks of a PNG. APP1 is a segment of a JPEG: EXIF or XMP.
RAW_EXIF = ("Raw profile type exif", "Raw profile type APP1")
RAW_XMP = ("Raw profile type xmp", "Raw profile type APP1")
XMP_TEXT = "XML:com.adobe.xmp"

_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9]+)""")
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # TIFF's types of a number that can be an orientation


def decide(exifs: Iterable[bytes] = (), xmps: Iterable[bytes] = ()) -> int:
    """The orientation, 1 to 8, of the first metadata that name one; 1 where none does.

    Args:
      exifs: EXIF data, with or without the `Exif` head, the most trusted first; what is not EXIF says nothing.
      xmps: XMP packets.
    """
    for exif in exifs:
        if (value := _of_exif(exif)) is not None:
            return value
    for xmp in xmps:
        if found := _XMP.search(xmp):
            return _valid(int(found[1][:6]))
    return 1


def of_pillow(image: PIL.Image.Image) -> int:
    """The orientation that a loaded Pillow image still has to be turned by."""
    if image.format == "TIFF":  # Pillow turns it while it loads
        return 1
    info = image.info
    raw = {name: unpack_raw_profile(_bytes(info[name])) for name in {*RAW_EXIF, *RAW_XMP} & info.keys()}
    exifs = [_bytes(info.get("exif")), *(raw.get(name, b"") for name in RAW_EXIF)]
    xmps = [*(_bytes(info.get(name)) for name in ("xmp", XMP_TEXT)), *(raw.get(name, b"") for name in RAW_XMP)]
    # The decoders of these tell in EXIF what is left to turn, and leave an XMP that their formats do not heed.
    return decide(exifs, () if image.format in ("AVIF", "HEIF") else xmps)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an orientation of pixels `[h, w, ...]`; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def unpack_raw_profile(text: bytes) -> bytes:
    """The profile that ImageMagick wrote as hexadecimal digits, below its name and length; empty where it is none."""
    lines = text.strip().split(b"\n", 2)
    try:
        return bytes.fromhex(lines[2].decode("ascii"))
    except (IndexError, ValueError):
        return b""


def _of_exif(exif: bytes) -> int | None:
    """1 to 8; None where the first directory names no orientation."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, at)
            if tag == TAG:
                known = kind in _INTEGERS and number == 1
                return _valid(struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)[0]) if known else 1
    except struct.error:
        pass
    return None


def _valid(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace") if isinstance(value, str) else b""
