"""Encoded pictures -> RGB pixels: JPEG, PNG, WebP, GIF (first frame), BMP, TIFF and AVIF.

JPEG goes through simplejpeg, which can leave out detail that a crop would not keep; all else, and the JPEG that it does
not read (CMYK, streams with mended errors), goes through Pillow. What a picture is, its first bytes say, not its name.
Pixels are taken to be sRGB: embedded colour profiles are not applied.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
import PIL.Image
import simplejpeg

from coca_jax.data.images import geometry
from coca_jax.data.records import BadExample

MAX_PIXELS = 89_478_485  # where Pillow, too, begins to suspect a decompression bomb: 256 MiB of RGB

# Not all that Pillow reads: EPS starts Ghostscript, and few people publish pictures in the others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION = 0x0112  # the EXIF tag
_WHITE = (255, 255, 255)


class Encoded:
    """An encoded picture of which the header has been read.

    Args:
      data: a file's content.

    Attributes:
      width, height: of the upright picture (as EXIF orientation turns it), pixels.
      reducible: whether `pixels` can leave out detail: it is a JPEG.

    Raises:
      BadExample: no bytes (empty), no picture of a kind that is read (not_a_picture), one that is cut off in its header
        (truncated), more than MAX_PIXELS pixels (too_large).
    """

    def __init__(self, data: bytes):
        if not data:
            raise BadExample("empty", "a picture of 0 bytes: write it again or drop it")
        self._data = data
        self._image: PIL.Image.Image | None = None
        self.reducible = data[:2] == b"\xff\xd8"
        exif, one_scan = _jpeg_segments(data) if self.reducible else (b"", True)
        self._scans = 1 if one_scan else data.count(b"\xff\xda")
        self._stored, self._plain = self._jpeg_header() if self.reducible else ((0, 0), False)
        if not self._plain:
            self._image = self._open()
            self._stored = self._image.size
            if not self.reducible and self._image.format != "TIFF":  # Pillow turns TIFF itself
                exif = self._image.info.get("exif", b"")
        self._orientation = _orientation(exif) if exif else 1
        turned = self._orientation >= 5
        self.width, self.height = self._stored[::-1] if turned else self._stored

    def pixels(self, background: Sequence[int] = _WHITE, factor: int = 1) -> tuple[np.ndarray, int]:
        """The upright picture, without the pixels at its stored right and bottom that fill no cell of `factor` pixels.

        Args:
          background: red, green, blue under transparent pixels, 0..255.
          factor: 1, 2, 4 or 8, by which it may come back reduced if it is a JPEG.

        Returns:
          uint8 `[h, w, 3]` (it may be a view), and by how much it is reduced: 1 or `factor`.

        Raises:
          BadExample: truncated, or corrupt (not_a_picture). Neither depends on `factor`.
        """
        if self._plain:
            try:
                return self._decode_jpeg(factor)
            except ValueError:  # it is strict; Pillow mends what does no harm, such as bytes too many before a marker
                self._plain = False
        image = self._image or self._open()
        self._image = None  # decoded once only: draft() and the seek to a frame change it
        width, height = self._stored
        try:
            if self.reducible and factor > 1:
                image.draft(None, (width // factor, height // factor))
            reduced = factor if image.size != (width, height) else 1
            pixels = _from_pillow(image, background)
        except Exception as error:
            raise _bad(self._data, error) from error
        cell = factor // reduced
        return _upright(pixels[: height // factor * cell, : width // factor * cell], self._orientation), reduced

    def _jpeg_header(self) -> tuple[tuple[int, int], bool]:
        """(width, height) as stored, and whether simplejpeg decodes it."""
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(self._data)
        except ValueError:
            return (0, 0), False
        _check_size(width, height, self._scans)
        return (width, height), colorspace not in ("CMYK", "YCCK")

    def _decode_jpeg(self, factor: int) -> tuple[np.ndarray, int]:
        width, height = self._stored
        # Other fractions than powers of two are slower than the full decoding.
        pixels = simplejpeg.decode_jpeg(
            self._data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor)
        )
        return _upright(pixels[: height // factor, : width // factor], self._orientation), factor

    def _open(self) -> PIL.Image.Image:
        try:
            image = PIL.Image.open(io.BytesIO(self._data), formats=FORMATS)
            _check_size(*image.size, self._scans)
            return image
        except BadExample:
            raise
        except (
            Exception
        ) as error:  # Pillow's plugins raise about anything: OSError, SyntaxError, struct.error, KeyError
            raise _bad(self._data, error) from error


def decode(data: bytes, background: Sequence[int] = _WHITE, min_side: int = 0) -> np.ndarray:
    """RGB pixels of an encoded picture, uint8 `[h, w, 3]`, upright (EXIF) and with transparency laid on `background`.

    Args:
      data: a file's content, of one of FORMATS.
      background: red, green, blue, 0..255.
      min_side: a JPEG may come back at 1/2, 1/4 or 1/8 as long as its shorter side keeps so many pixels; 0: full size.

    Raises:
      BadExample: see `Encoded`.
    """
    picture = Encoded(data)
    reduces = min_side and picture.reducible
    factor = geometry.reduction(min(picture.width, picture.height), min_side) if reduces else 1
    return np.require(picture.pixels(background, factor)[0], requirements=["C", "W"])


def from_pillow(image: PIL.Image.Image, background: Sequence[int] = _WHITE) -> np.ndarray:
    """uint8 `[h, w, 3]` of an opened picture, upright; it is left as it is. Raises BadExample as `decode`."""
    _check_size(*image.size)
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        pixels = _from_pillow(image.copy(), background)
    except Exception as error:
        raise BadExample("not_a_picture", f"a Pillow image that cannot be read: {_said(error)}") from error
    return np.require(_upright(pixels, 1 if image.format == "TIFF" else orientation), requirements=["C", "W"])


def _from_pillow(image: PIL.Image.Image, background: Sequence[int]) -> np.ndarray:
    """uint8 `[h, w, 3]`, as stored."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        values = np.asarray(image)  # uint16, or int32 of mode "I"
        low, high = int(values.min()), int(values.max())
        # Mode "I" holds 16 bits of most files. Of 8 (a convert("I")) they would all be black, of 32 nearly all white.
        if image.mode == "I" and (low < 0 or 0 < high < 256 or high > 65_535):
            raise ValueError(f"integers of 32 bits, {low} to {high}, of which nobody says what is white")
        grey = (values >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
        if isinstance(clear := image.info.get("transparency"), int):
            pixels[values == clear] = background
        return pixels
    if image.mode == "F":
        raise ValueError("pixels in floating point, of which nobody says what is white")
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    canvas = PIL.Image.new("RGB", rgba.size, tuple(background))
    canvas.paste(rgba, mask=rgba)  # the mask is its alpha
    return np.asarray(canvas)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (tag 0x0112, 1..8); a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _jpeg_segments(data: bytes) -> tuple[bytes, bool]:
    """Of a JPEG's segments before its first scan: the EXIF data, and whether that scan is surely the only one.

    Pillow, too, finds both, in fifty times the time: a tenth of that of the decoding.
    """
    exif, components, at = b"", 0, 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # it names the components that it holds
            return exif, data[at + 4] == components
        if marker in (0xC0, 0xC1):  # baseline and extended, not progressive
            components = data[at + 9]
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = exif or data[at + 4 : at + 2 + length]
        at += 2 + length if marker != 0xFF else 1
    return exif, False


def _orientation(exif: bytes) -> int:
    """1..8; 1 where the EXIF data cannot be read, which does not make the picture unreadable."""
    try:
        parsed = PIL.Image.Exif()
        parsed.load(exif)
        found = parsed.get(_ORIENTATION, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _check_size(width: int, height: int, scans: int = 1) -> None:
    if width * height > MAX_PIXELS:
        raise BadExample(
            "too_large", f"a picture of {width} x {height} pixels is over the limit of {MAX_PIXELS}: shrink or drop it"
        )
    # Each scan of a progressive JPEG passes over all its pixels: some KB of scans could keep a core busy for hours.
    if scans > 16 and width * height * scans > MAX_PIXELS:
        raise BadExample(
            "too_large",
            f"a picture of {width} x {height} pixels in {scans} scans, each over all pixels, is over the limit of "
            f"{MAX_PIXELS} pixels: write it again or drop it",
        )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _bad(data: bytes, error: Exception) -> BadExample:
    """What Pillow raised, with its reason."""
    said = _said(error)
    # A size that the header gives, or text and profiles of a PNG that swell beyond what Pillow allows.
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning | MemoryError) or any(
        words in said.lower() for words in ("too large for", "too much memory")
    ):
        return BadExample("too_large", f"{len(data)} bytes that unpack to too much: {said}; drop them")
    if isinstance(error, PIL.UnidentifiedImageError):  # it tells where in memory the bytes are
        said = f"none of {', '.join(FORMATS)}"
    reason = "truncated" if "truncated" in said.lower() or _ends_early(data) else "not_a_picture"
    return BadExample(reason, f"{len(data)} bytes that are not a readable picture: {said}")


def _ends_early(data: bytes) -> bool:
    """Whether a picture that could not be read lacks the end that its format has."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if data.startswith((b"GIF87a", b"GIF89a")):
        return not data.rstrip(b"\0").endswith(b";")
    if len(data) < 12:
        return data.startswith((b"RIFF", b"BM", b"II*\0", b"MM\0*")) or data[4:8] == b"ftyp"
    if data.startswith(b"RIFF"):
        return len(data) < 8 + struct.unpack_from("<I", data, 4)[0]
    if data.startswith(b"BM"):
        return len(data) < struct.unpack_from("<I", data, 2)[0]
    if data.startswith((b"II*\0", b"MM\0*")):  # its first directory may stand at its end
        return len(data) <= struct.unpack_from("<I" if data.startswith(b"II") else ">I", data, 4)[0]
    if data[4:8] == b"ftyp":  # AVIF: one box after the other, each with its length before it
        at = 0
        while at + 8 <= len(data) and (length := struct.unpack_from(">I", data, at)[0]) >= 8:
            at += length
        return at != len(data) or b"mdat" not in data
    return False
