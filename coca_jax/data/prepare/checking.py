"""One record: whether it can be used, and in what form it is written."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import NamedTuple

import numpy as np
import PIL.Image
import simplejpeg

from coca_jax.data import images, label_names, records
from coca_jax.data.images.decoding import Encoded
from coca_jax.data.records import BadExample, Record
from coca_jax.data.sources.base import one_line

QUALITY = 92


class Checked(NamedTuple):
    """A record that can be used.

    Attributes:
      record: with its captions that are not blank, and its picture as it is to be written.
      width: pixels, upright.
      height: pixels, upright.
      format: of the picture as it came: JPEG, PNG, ...
      resized: whether the picture was made smaller.
      blank: captions left out because they are blank.
    """

    record: Record
    width: int
    height: int
    format: str
    resized: bool
    blank: int


def check(record: Record, max_side: int = 0, quality: int = QUALITY) -> Checked:
    """Decodes the whole picture and looks at every text. A record needs a caption, or a label that can make none.

    Args:
      record: as a source gave it.
      max_side: a picture whose longer side has more pixels is resized to so many; 0: none is.
      quality: of the JPEG that a resized photograph becomes, 1..100, with halved colour resolution (4:2:0). What has a
        palette or transparency becomes PNG. Of an animated picture the first frame is kept. Pictures that are not
        resized keep their bytes.

    Raises:
      BadExample: the record cannot be used.
    """
    where = f"record {record.key!r}"
    if not isinstance(record.key, str) or not record.key or not isinstance(record.image, bytes):
        raise BadExample("unreadable", f"{where}: its key must be a text and its picture bytes")
    for text in (record.key, record.label, record.style, *record.captions):
        if not isinstance(text, str):
            raise BadExample("unreadable", f"{where}: {type(text).__name__} where a text should be")
        records.check_unicode([text], where)
    captions = tuple(caption for caption in record.captions if caption.strip())
    if not captions and not label_names.needs_name(record.label):
        raise BadExample("no_caption", f"{where} has no caption")
    if not record.image:
        raise BadExample("empty", f"{where}: its picture has no bytes")
    try:
        (kind, drawn, pixels), *frames = map(_decode, (record.image, *record.frames))
    except BadExample as error:
        raise BadExample(error.reason, f"{where}: {error}") from error
    kept = record._replace(captions=captions)
    height, width = pixels.shape[:2]
    blank = len(record.captions) - len(captions)
    if not max_side or max(width, height) <= max_side:
        return Checked(kept, width, height, kind, False, blank)
    width, height = (max(1, round(side * max_side / max(pixels.shape[:2]))) for side in (width, height))
    image = _shrink(record.image, pixels, drawn, (width, height), quality)
    smaller = tuple(
        _shrink(frame, pixels, drawn, (width, height), quality)
        for frame, (_, drawn, pixels) in zip(record.frames, frames, strict=True)
    )
    return Checked(kept._replace(image=image, frames=smaller), width, height, kind, True, blank)


def _decode(image: bytes) -> tuple[str, str, np.ndarray]:
    """Kind, Encoded.drawn() and upright pixels, uint8 `[h, w, 3]`."""
    encoded = Encoded(image)
    return encoded.kind, encoded.drawn(), np.require(encoded.pixels()[0], requirements=["C"])


def _shrink(image: bytes, pixels: np.ndarray, drawn: str, size: tuple[int, int], quality: int) -> bytes:
    if not drawn:
        return simplejpeg.encode_jpeg(images.resize(pixels, *size), quality, "RGB", "420")
    if drawn == "transparent":
        # Pillow weighs the colours by their opacity: what hides under transparent pixels does not bleed.
        small = PIL.Image.fromarray(Encoded(image).rgba()).resize(size, PIL.Image.Resampling.BICUBIC)
    else:
        small = PIL.Image.fromarray(images.resize(pixels, *size))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


def in_words(error: BadExample) -> str:
    """What is wrong, as any file can hold it, and the same in every run: without the addresses of objects."""
    message = re.sub(r" at 0x[0-9a-f]+", "", one_line(error))
    return message.encode(errors="backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that is left out.

    Attributes:
      index: its number in the source.
      key: its key; None where it could not be read.
      reason: a key of records.REASONS.
      message: what is wrong, in words.
    """

    index: int
    key: str | None
    reason: str
    message: str
