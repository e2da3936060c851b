"""Pictures of any kind, for a model: fitted squares -> normalised floats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from coca_jax import config
from coca_jax.data import opening
from coca_jax.data.images import decoding, geometry
from coca_jax.data.records import BadExample, DataError


def decode_and_fit(
    encoded: bytes,
    size: int,
    crop: float = 1.0,
    background: Sequence[int] = (255, 255, 255),
    interpolation: str = geometry.FAST,
) -> np.ndarray:
    """`fit` of an encoded picture, decoding no more detail than it keeps. Raises BadExample as `decode`."""
    picture = decoding.Encoded(encoded)
    if interpolation != geometry.FAST:
        return geometry.fit(picture.pixels(background, 1)[0], size, crop, interpolation)
    region = geometry.middle(picture.width, picture.height, size, crop)
    pixels, reduced = picture.pixels(background, region.factor)
    return geometry.resize(geometry.cut(pixels, region, reduced), size, size)


def to_square(
    image: Any,
    size: int,
    crop: float = 1.0,
    background: Sequence[int] = (255, 255, 255),
    interpolation: str = geometry.FAST,
) -> np.ndarray:
    """`fit` of a path, encoded bytes, a Pillow image, or pixels uint8 `[h, w, 3]` (or `[h, w]`: grey).

    Raises:
      DataError: none of these, or one that cannot be read; the message names the file.
    """
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        try:
            content = opening.read(path, opening.EXAMPLE_BYTES, "an image")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DataError(f"{path}: no such picture") from None
        try:
            return decode_and_fit(content, size, crop, background, interpolation)
        except BadExample as error:
            raise BadExample(error.reason, f"{path}: {error}") from error
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_and_fit(bytes(image), size, crop, background, interpolation)
    if isinstance(image, PIL.Image.Image):
        return geometry.fit(decoding.from_pillow(image, background), size, crop, interpolation)
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8 and pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"{pixels.dtype} {list(pixels.shape)} is not a picture: "
            "give a path, bytes, a Pillow image, or uint8 [h, w, 3]"
        )
    return geometry.fit(pixels, size, crop, interpolation)


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
      interpolation: as config.data.interpolation.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    background: tuple[int, int, int] = (255, 255, 255)
    crop: float = 1.0
    interpolation: str = geometry.FAST

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
        squares = [to_square(image, self.size, self.crop, self.background, self.interpolation) for image in images]
        return np.stack(squares) if squares else np.zeros((0, self.size, self.size, 3), np.uint8)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessor:
        """The inverse of `to_json`, after JSON has made lists of the tuples."""
        colors = {key: tuple(values[key]) for key in ("mean", "std", "background")}
        return cls(int(values["size"]), **colors, crop=float(values["crop"]), interpolation=values["interpolation"])

    @classmethod
    def from_config(cls, size: int, data: config.Data) -> Preprocessor:
        """That of a run, for evaluation."""
        return cls(size, data.mean, data.std, data.background, data.eval_crop, data.interpolation)
