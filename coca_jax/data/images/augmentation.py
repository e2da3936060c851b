"""Augmentation for training: random-resized crop, flip, rotation, colour and blur, drawn from one generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from coca_jax import config
from coca_jax.data.images import decoding, geometry

_LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601, the grey of JPEG and of Pillow
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


def decode_and_augment(encoded: bytes, size: int, rng: np.random.Generator, data: config.Data) -> np.ndarray:
    """`augment` of an encoded picture, decoding no more detail than its crop needs.

    The crop is drawn from the size that the header gives, before anything is decoded: the draws, and the crop, are the
    same however the picture is encoded and decoded.

    Args:
      encoded: a file's content, of one of kinds.READ.
      size: side of the result, pixels.
      rng: every draw comes from it.
      data: as `augment`.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      BadExample: empty, not_a_picture, unsupported, truncated or too_large.
    """
    picture = decoding.Encoded(encoded)

    def pixels(factor: int) -> tuple[np.ndarray, int]:
        return picture.pixels(data.background, factor)

    return _augment(picture.width, picture.height, pixels, size, rng, data)


def augment(image: np.ndarray, size: int, rng: np.random.Generator, data: config.Data) -> np.ndarray:
    """For training: random-resized crop, and flip, rotation, colour and blur as far as `data` turns them on.

    The crop is that of Inception (Szegedy et al., 2015, arXiv:1409.4842): area uniform in `crop_area`, aspect ratio
    log-uniform in `crop_ratio`; then laid on cells of 2, 4 or 8 pixels where it is so many times larger than the result
    (see `geometry`). Colour is one linear map: brightness, contrast about the mean grey, saturation, hue as a rotation
    of the YIQ chroma plane, grey; the values are clipped once, at the end.

    Args:
      image: uint8 `[h, w, 3]`.
      size: side of the result, pixels.
      rng: every draw comes from it; the same state gives the same picture.
      data: crop_area, crop_ratio, flip, rotate, color_jitter, hue_jitter, grayscale, blur, background.

    Returns:
      uint8 `[size, size, 3]`.
    """

    def pixels(factor: int) -> tuple[np.ndarray, int]:
        return geometry.trim(image, factor), 1

    return _augment(image.shape[1], image.shape[0], pixels, size, rng, data)


def _augment(
    width: int,
    height: int,
    pixels: Callable[[int], tuple[np.ndarray, int]],
    size: int,
    rng: np.random.Generator,
    data: config.Data,
) -> np.ndarray:
    """`pixels(factor)` gives the picture, and by how much it is reduced: by 1 or `factor`."""
    region = geometry.align(_crop_box(width, height, rng, data), width, height, size, data.interpolation)
    angle = rng.uniform(-data.rotate, data.rotate) if data.rotate else 0.0
    image, reduced = pixels(region.factor)
    if angle:
        image = _rotated_crop(image, region, reduced, size, angle, data.background)
    else:
        image = geometry.resize(geometry.cut(image, region, reduced), size, size, data.interpolation)
    if data.flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    matrix = _color_matrix(image, rng, data)
    if matrix is not None:
        image = cv2.transform(image, matrix)  # rounds and clips to 0..255
    if data.blur and rng.random() < data.blur:
        sigma = rng.uniform(0.2, 1.0) * max(1.0, size / 112)
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return image


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
    image: np.ndarray, region: geometry.Region, reduced: int, size: int, angle: float, background: Sequence[int]
) -> np.ndarray:
    """The region (see `cut`) turned by `angle` degrees about its middle, uint8 `[size, size, 3]`.

    Beyond the picture's edge is `background`.
    """
    x, y, width, height = (float(value * region.factor // reduced) for value in region[:4])
    shrink = min(width, height) / size
    if shrink > 1:  # the warp below reads four pixels a point and would alias
        # What the turned box can reach, and a little more for the filters of resize().
        reach = math.hypot(width, height) / 2 + 4 * shrink
        left, top = (max(0, int(middle - reach)) for middle in (x + width / 2, y + height / 2))
        image = image[top : int(y + height / 2 + reach) + 1, left : int(x + width / 2 + reach) + 1]
        x, y = x - left, y - top
        h, w = image.shape[:2]
        image = geometry.resize(image, max(1, round(w / shrink)), max(1, round(h / shrink)))
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
