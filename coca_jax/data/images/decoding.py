"""Encoded images -> RGB pixels, of the kinds in kinds.READ.

JPEG goes through simplejpeg, which can leave out detail that a crop would not keep; all else, and the JPEG that it does
not read (CMYK, streams with mended errors), goes through Pillow, without its metadata. What an image is, its first
bytes say, not its name. Pixels are taken to be sRGB: embedded colour profiles are not applied.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import simplejpeg

from coca_jax.data import kinds
from coca_jax.data.images import bare, geometry, orientation, plugins
from coca_jax.data.records import BadExample

MAX_PIXELS = 89_478_485  # where Pillow, too, begins to suspect a decompression bomb: 256 MiB of RGB

_WHITE = (255, 255, 255)
_DIM = 4096  # 16-bit samples that are all below may be 8 or 12 bits that nobody has scaled


class Encoded:
    """An encoded picture of which the header has been read.

    Args:
      data: a file's content.

    Attributes:
      width, height: of the upright picture (as EXIF orientation turns it), pixels.
      kind: of the image, as kinds.sniff calls it.
      reducible: whether `pixels` can leave out detail: it is a JPEG.

    Raises:
      BadExample: no bytes (empty), no picture (not_a_picture), one of a kind that is not read (unsupported), one that
        is cut off in its header (truncated), more than MAX_PIXELS pixels (too_large).
    """

    def __init__(self, data: bytes):
        if not data:
            raise BadExample("empty", "a picture of 0 bytes: write it again or drop it")
        self.kind = kinds.sniff(data[:4096])
        self._data = data
        self._image: PIL.Image.Image | None = None
        self._full_range = False
        self.reducible = self.kind == "JPEG"
        self._orientation, one_scan = bare.jpeg_segments(data) if self.reducible else (1, True)
        self._scans = 1 if one_scan else data.count(b"\xff\xda")
        self._stored, self._plain = self._jpeg_header() if self.reducible else ((0, 0), False)
        if not self._plain:
            self._image = self._open()
            self._stored = self._image.size
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
            pixels = _from_pillow(image, background, self._full_range)
        except Exception as error:
            raise _bad(self._data, self.kind, error) from error
        cell = factor // reduced
        pixels = pixels[: height // factor * cell, : width // factor * cell]
        return orientation.upright(pixels, self._orientation), reduced

    def drawn(self) -> str:
        """How the image is stored: `palette` (or black and white), `transparent`, or empty, as photographs are."""
        if self._image is None or self._image.mode.startswith("I"):
            return ""
        if "transparency" in self._image.info or self._image.mode in _TRANSPARENT:
            return "transparent"
        return "palette" if self._image.mode in ("1", "P") else ""

    def rgba(self) -> np.ndarray:
        """The upright image, uint8 `[h, w, 4]`; its colours under transparent pixels are kept. Raises as `pixels`."""
        try:
            stored = np.array((self._image or self._open()).convert("RGBA"))
        except Exception as error:
            raise _bad(self._data, self.kind, error) from error
        self._image = None
        return orientation.upright(stored, self._orientation)

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
        return orientation.upright(pixels[: height // factor, : width // factor], self._orientation), factor

    def _open(self) -> PIL.Image.Image:
        try:
            plugins.check(self.kind, len(self._data))
            stripped = bare.strip(self._data, self.kind)
            self._orientation, self._full_range = stripped.orientation, stripped.full_range
            image = plugins.open_image(stripped.data, self.kind)
            _check_size(*image.size, self._scans)
            if self.kind == "AVIF":  # Pillow tells its turns, which are properties of the pixels, as EXIF
                self._orientation = orientation.of_pillow(image)
            return image
        except BadExample:
            raise
        except (
            Exception
        ) as error:  # Pillow's plugins raise about anything: OSError, SyntaxError, struct.error, KeyError
            raise _bad(self._data, self.kind, error) from error


def decode(data: bytes, background: Sequence[int] = _WHITE, min_side: int = 0) -> np.ndarray:
    """RGB pixels of an encoded picture, uint8 `[h, w, 3]`, upright (EXIF) and with transparency laid on `background`.

    Args:
      data: a file's content, of one of kinds.READ.
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
    """uint8 `[h, w, 3]` of an opened image, upright; it is left as it is. Raises BadExample as `decode`."""
    _check_size(*image.size)
    try:
        deep = _is_deep(image)
        image.load()  # metadata may follow the pixels
        pixels = _from_pillow(image.copy(), background, deep=deep)
    except Exception as error:
        raise BadExample("not_a_picture", f"a Pillow image that cannot be read: {_said(error)}") from error
    return np.require(orientation.upright(pixels, orientation.of_pillow(image)), requirements=["C", "W"])


_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


def _from_pillow(
    image: PIL.Image.Image, background: Sequence[int], full_range: bool = False, deep: bool = False
) -> np.ndarray:
    """uint8 `[h, w, 3]`, as stored.

    Args:
      image: An opened image.
      background: See `decode`.
      full_range: Whether 16-bit samples are known to use all 16 bits.
      deep: Whether the image has 16-bit samples, which a loaded one of colours does not tell.
    """
    deep = deep or _is_deep(image)
    twelve = _rawmode(image) == "I;12"
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        values = np.asarray(image)  # uint16, or int32 of mode "I"
        low, high = int(values.min()), int(values.max())
        if twelve:
            values = values << 4
        # Mode "I" holds 16 bits of most files. Of 8 (a convert("I")) they would all be black, of 32 nearly all white.
        elif image.mode == "I" and (low < 0 or 0 < high < _DIM or high > 65_535):
            raise ValueError(f"integers of 32 bits, {low} to {high}, of which nobody says what is white")
        elif 0 < high < _DIM and not full_range:
            raise ValueError(_unscaled(high))
        grey = (values >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
        if isinstance(clear := image.info.get("transparency"), int):
            pixels[values == clear] = background
        return pixels
    if image.mode == "F":
        raise ValueError("pixels in floating point, of which nobody says what is white")
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        pixels = np.asarray(image.convert("RGB"))
        if deep and not full_range:
            _check_range(int(pixels.max()))
        return pixels
    rgba = image.convert("RGBA")
    if deep and not full_range:
        extrema: Any = rgba.getextrema()
        _check_range(max(high for _, high in extrema[:3]))
    canvas = PIL.Image.new("RGB", rgba.size, tuple(background))
    canvas.paste(rgba, mask=rgba)  # the mask is its alpha
    return np.asarray(canvas)


def _rawmode(image: PIL.Image.Image) -> str:
    """How the samples of an image that is not loaded yet are stored, as Pillow calls it; empty where it is loaded."""
    tile = getattr(image, "tile", None)  # of an image that was opened from a file
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _is_deep(image: PIL.Image.Image) -> bool:
    return ";16" in _rawmode(image)


def _check_range(high: int) -> None:
    """Of 16-bit samples of colour, which Pillow has cut to their upper 8 bits."""
    if high < _DIM >> 8:
        raise ValueError(_unscaled(((high + 1) << 8) - 1))


def _unscaled(high: int) -> str:
    return (
        f"samples of 16 bits, none above {high} of 65,535: white may be 255, 1,023 or 4,095, which nobody says; scale "
        "them to the full range"
    )


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


def _bad(data: bytes, kind: str, error: Exception) -> BadExample:
    """What Pillow raised, with its reason."""
    said = _said(error)
    # A size that the header gives, as Pillow and libheif say it.
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning | MemoryError) or any(
        words in said.lower() for words in ("too large for", "too much memory", "security limit exceeded")
    ):
        return BadExample("too_large", f"{len(data)} bytes that unpack to too much: {said}; drop them")
    if isinstance(error, PIL.UnidentifiedImageError):  # it tells where in memory the bytes are
        said = f"damaged in the header of its {kind}" if kind else f"none of {', '.join(kinds.READ)}"
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
    if data[4:8] == b"ftyp":  # AVIF, HEIC: one box after the other, each with its length before it
        at = 0
        while at + 16 <= len(data) and (length := struct.unpack_from(">I", data, at)[0]) not in range(2, 8):
            if length == 1:  # the length follows in 8 bytes
                length = struct.unpack_from(">Q", data, at + 8)[0]
            at = at + max(8, length) if length else len(data)  # 0: to the end
        return at != len(data) or b"mdat" not in data
    return False
