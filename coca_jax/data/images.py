"""Pictures: encoded bytes -> RGB pixels -> augmented or fitted squares -> normalised floats.

JPEG goes through simplejpeg, which can leave out detail that the crop would not keep; all else goes through Pillow.
Resizing is OpenCV's, antialiased: INTER_AREA down, INTER_CUBIC up.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg
from etils import epath

from coca_jax import config
from coca_jax.data.records import DataError

# The threads of the pipeline decode one picture each; OpenCV's own would only fight them.
cv2.setNumThreads(0)

MAX_PIXELS = 89_478_485  # where Pillow, too, begins to suspect a decompression bomb: 256 MiB of RGB
_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601, the grey of JPEG and of Pillow
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def decode(data: bytes, background: Sequence[int] = (255, 255, 255), min_side: int = 0) -> np.ndarray:
    """RGB pixels of an encoded picture, uint8 `[h, w, 3]`, upright (EXIF) and with transparency laid on `background`.

    Args:
      data: a file's content: JPEG, PNG, WebP, GIF (its first frame) or what else Pillow reads.
      background: red, green, blue, 0..255.
      min_side: a JPEG may come back at 1/2, 1/4 or 1/8 as long as its shorter side keeps so many pixels; 0: full size.

    Raises:
      DataError: not a picture, truncated, or more than MAX_PIXELS pixels.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, min_side)
        except ValueError as error:  # truncated, CMYK, arithmetic coding, ...: Pillow reads some of them
            if isinstance(error, DataError):
                raise
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size)
            return _from_pillow(image, background)
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise about anything: OSError, SyntaxError, struct.error, KeyError
        raise DataError(
            f"{len(data)} bytes that are not a readable picture: {type(error).__name__}: {error}"
        ) from error


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if colorspace in ("CMYK", "YCCK"):
        raise ValueError(colorspace)
    factor = 1
    # Other fractions than powers of two are slower than the full decoding.
    while min_side and factor < 8 and min(height, width) // (2 * factor) >= min_side:
        factor *= 2
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    # Only a camera's picture carries an orientation, and parsing for one would cost the others a tenth of their time.
    if b"Exif\0" in data[:65_536]:
        with PIL.Image.open(io.BytesIO(data)) as image:
            pixels = _upright(pixels, image.getexif().get(0x0112, 1))
    return pixels


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (tag 0x0112, 1..8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"a picture of {width} x {height} pixels is over the limit of {MAX_PIXELS}: shrink or drop it")


def _from_pillow(image: PIL.Image.Image, background: Sequence[int]) -> np.ndarray:
    PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return np.array(image.convert("RGB"))
    rgba = image.convert("RGBA")
    canvas = PIL.Image.new("RGB", rgba.size, tuple(background))
    canvas.paste(rgba, mask=rgba)  # the mask is its alpha
    return np.array(canvas)


def to_pixels(image: Any, background: Sequence[int] = (255, 255, 255), min_side: int = 0) -> np.ndarray:
    """uint8 `[h, w, 3]` of a path, encoded bytes, a Pillow image, or pixels uint8 `[h, w, 3]` (or `[h, w]`: grey)."""
    if isinstance(image, (str, os.PathLike)):
        path = epath.Path(image)
        if not path.is_file():
            raise DataError(f"{path}: no such picture")
        try:
            return decode(path.read_bytes(), background, min_side)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(bytes(image), background, min_side)
    if isinstance(image, PIL.Image.Image):
        return _from_pillow(image.copy(), background)
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"{pixels.dtype} {list(pixels.shape)} is not a picture: "
            "give a path, bytes, a Pillow image, or uint8 [h, w, 3]"
        )
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# Geometry and colour


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased resize of uint8 `[h, w, 3]` to `[height, width, 3]`."""
    h, w = image.shape[:2]
    if (w, h) == (width, height):
        return np.ascontiguousarray(image)
    # INTER_AREA only averages where both sides shrink; else it is bilinear, and cubic is better.
    shrinks = width <= w and height <= h
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def fit(image: np.ndarray, size: int, crop: float = 1.0) -> np.ndarray:
    """For evaluation: the square in the middle, of `crop` times the shorter side. uint8 `[size, size, 3]`.

    Random-resized crops show things larger than whole pictures do; a `crop` of 0.875 evens that out (Touvron et al.,
    2019, arXiv:1906.06423).
    """
    h, w = image.shape[:2]
    scale = size / (crop * min(h, w))
    width, height = max(size, round(w * scale)), max(size, round(h * scale))
    image = resize(image, width, height)
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def crop_min_side(size: int, data: config.Data) -> int:
    """Shorter side (pixels) that any crop of `augment` can be cut from without enlarging what `decode` reduced."""
    ratio = max(data.crop_ratio[1], 1 / data.crop_ratio[0])
    return math.ceil(size / math.sqrt(data.crop_area[0] / ratio))


def augment(image: np.ndarray, size: int, rng: np.random.Generator, data: config.Data) -> np.ndarray:
    """For training: random-resized crop, and flip, rotation, colour and blur as far as `data` turns them on.

    The crop is that of Inception (Szegedy et al., 2015, arXiv:1409.4842): area uniform in `crop_area`, aspect ratio
    log-uniform in `crop_ratio`. Colour is one linear map: brightness, contrast about the mean grey, saturation, hue as
    a rotation of the YIQ chroma plane, grey; the values are clipped once, at the end.

    Args:
      image: uint8 `[h, w, 3]`.
      size: side of the result, pixels.
      rng: every draw comes from it; the same state gives the same picture.
      data: crop_area, crop_ratio, flip, rotate, color_jitter, hue_jitter, grayscale, blur, background.

    Returns:
      uint8 `[size, size, 3]`.
    """
    left, top, width, height = _crop_box(image.shape[1], image.shape[0], rng, data)
    angle = rng.uniform(-data.rotate, data.rotate) if data.rotate else 0.0
    if angle:
        image = _rotated_crop(image, (left, top, width, height), size, angle, data.background)
    else:
        image = resize(image[top : top + height, left : left + width], size, size)
    if data.flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    matrix = _color_matrix(image, rng, data)
    if matrix is not None:
        image = cv2.transform(image, matrix)  # rounds and clips to 0..255
    if data.blur and rng.random() < data.blur:
        sigma = rng.uniform(0.2, 1.0) * max(1.0, size / 112)
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return image


def decode_and_augment(encoded: bytes, size: int, rng: np.random.Generator, data: config.Data) -> np.ndarray:
    """`augment` of an encoded picture, decoding no more detail than its crop needs. Raises BadExample, as `decode`."""
    return augment(decode(encoded, data.background, crop_min_side(size, data)), size, rng, data)


def _crop_box(width: int, height: int, rng: np.random.Generator, data: config.Data) -> tuple[int, int, int, int]:
    """(left, top, width, height), pixels."""
    low, high = math.log(data.crop_ratio[0]), math.log(data.crop_ratio[1])
    for _ in range(10):
        area = rng.uniform(*data.crop_area) * width * height
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # A very long picture: the largest box of the nearest allowed ratio, in the middle.
    ratio = min(max(width / height, data.crop_ratio[0]), data.crop_ratio[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _rotated_crop(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, angle: float, background: Sequence[int]
) -> np.ndarray:
    """The box turned by `angle` degrees about its middle, `[size, size, 3]`; `background` beyond the picture's edge."""
    x, y, width, height = map(float, box)
    shrink = min(width, height) / size
    if shrink > 1:  # the warp below reads four pixels a point and would alias
        h, w = image.shape[:2]
        image = resize(image, max(1, round(w / shrink)), max(1, round(h / shrink)))
        sx, sy = image.shape[1] / w, image.shape[0] / h
        x, width, y, height = x * sx, width * sx, y * sy, height * sy
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    ax, ay = width / size, height / size
    center = (size - 1) / 2
    # From result to picture: scale about the middle of the result, rotate, move to the middle of the box.
    inverse = np.array([[cos * ax, -sin * ay, 0.0], [sin * ax, cos * ay, 0.0]])
    inverse[:, 2] = (x + (width - 1) / 2, y + (height - 1) / 2) - inverse[:, :2] @ (center, center)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, inverse, (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=tuple(background)
    )


def _color_matrix(image: np.ndarray, rng: np.random.Generator, data: config.Data) -> np.ndarray | None:
    """float64 `[3, 4]` that maps (red, green, blue, 1) to new colours; None where nothing changes."""
    matrix = np.eye(3)
    offset = np.zeros(3)
    changed = False
    if data.color_jitter:
        low, high = max(0.0, 1 - data.color_jitter), 1 + data.color_jitter
        brightness, contrast, saturation = rng.uniform(low, high, 3)
        grey = brightness * float(_LUMA @ cv2.mean(image)[:3])
        matrix = brightness * contrast * matrix
        offset = np.full(3, (1 - contrast) * grey)
        matrix = (saturation * np.eye(3) + (1 - saturation) * _LUMA) @ matrix  # grey stays, and so does the offset
        changed = True
    if data.hue_jitter:
        turn = 2 * math.pi * rng.uniform(-data.hue_jitter, data.hue_jitter)
        cos, sin = math.cos(turn), math.sin(turn)
        matrix = _RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ @ matrix
        changed = True
    if data.grayscale and rng.random() < data.grayscale:
        matrix = np.tile(_LUMA, (3, 1)) @ matrix
        changed = True
    return np.hstack([matrix, offset[:, None]]) if changed else None


# ---------------------------------------------------------------------------------------------------------------------
# Normalising


def normalize(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """(images / 255 - mean) / std in float32.

    Args:
      images: numpy or jax array `[..., 3]`, uint8 or float, values 0..255.
      mean: of each channel, in 0..1.
      std: of each channel.

    Returns:
      float32 of the same shape and kind. On jax arrays it may run inside a jitted function: batches travel as uint8.
    """
    shape = (1,) * (images.ndim - 1) + (-1,)  # spelt out: jax may be told to refuse that ranks differ
    center, scale = (np.asarray(values, np.float32).reshape(shape) for values in (mean, std))
    return (images.astype(np.float32) / np.float32(255) - center) / scale


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """What a model wants of a picture, as one function: pictures of any kind and size -> its input.

    Attributes:
      size: side of the square, pixels.
      mean, std: of each channel, values in 0..1.
      background: under transparent pixels, 0..255.
      crop: share of the shorter side that the square keeps.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    background: tuple[int, int, int] = (255, 255, 255)
    crop: float = 1.0

    def __call__(self, images: Iterable[Any]) -> np.ndarray:
        """Normalised float32 `[b, size, size, 3]`.

        Args:
          images: paths, encoded bytes, Pillow images or uint8 `[h, w, 3]`, also mixed; or one uint8 `[b, h, w, 3]`.

        Raises:
          DataError: one of them cannot be read; the message names it.
        """
        if isinstance(images, (str, bytes, os.PathLike, PIL.Image.Image)):
            raise DataError("the preprocessor takes a list of pictures: put the one you have into [ ]")
        return normalize(self.pixels(images), self.mean, self.std)

    def pixels(self, images: Iterable[Any]) -> np.ndarray:
        """The same before normalising: uint8 `[b, size, size, 3]`."""
        squares = [fit(to_pixels(image, self.background, self.size), self.size, self.crop) for image in images]
        return np.stack(squares) if squares else np.zeros((0, self.size, self.size, 3), np.uint8)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessor:
        """The inverse of `to_json`, after JSON has made lists of the tuples."""
        colors = {key: tuple(values[key]) for key in ("mean", "std", "background")}
        return cls(int(values["size"]), **colors, crop=float(values["crop"]))
