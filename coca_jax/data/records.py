"""What one example is: a `Record`, its msgpack form, and the ArrayRecord files that hold it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgpack
from array_record.python import array_record_module

# One record a group and no compression: random reads are fastest so, and pictures are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"


class DataError(ValueError):
    """Data that cannot be read or prepared. The message names the file or the value, and the fix."""


@contextlib.contextmanager
def named_in(key: str, value: str) -> Iterator[None]:
    """Around the opening of what a key of the configuration names: a DataError then says which key, and its value."""
    try:
        yield
    except DataError as error:
        raise DataError(f"config.{key}={value!r}: {error}") from error


# Why an example cannot be used, in the order in which the tallies list them.
REASONS = {
    "unreadable": "its record cannot be read or understood",
    "empty": "its picture has no bytes",
    "not_a_picture": "its picture is something else, or damaged",
    "unsupported": "its image is of a kind that is not read",
    "truncated": "its picture ends before its end",
    "too_large": "its picture has more pixels than images.MAX_PIXELS",
    "no_caption": "it has no caption, or only blank ones",
    "encoding": "its caption is not UTF-8",
    "no_class": "its label is none of the classes of the task",
}


class BadExample(DataError):
    """One example that cannot be used, where its neighbours can.

    Attributes:
      reason: a key of REASONS.
    """

    def __init__(self, reason: str, message: str):
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadExample], tuple[str, str]]:  # it travels from worker processes
        return BadExample, (self.reason, str(self))


class Record(NamedTuple):
    """One picture with its captions; or a clip, whose first frame is the picture.

    Attributes:
      key: unique within its source.
      image: the encoded picture (JPEG, PNG, ...), as it was published.
      captions: one or more; training draws one each time.
      label: class of a task, or for zero-shot classification; empty where there is none.
      style: where the picture comes from, e.g. the designer; empty where unknown.
      frames: of a clip the encoded pictures after the first, in order.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: str = ""
    style: str = ""
    frames: tuple[bytes, ...] = ()


def check_unicode(texts: Iterable[str], where: str) -> None:
    """Raises BadExample where a text holds half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadExample("encoding", f"{where}: {text[:40]!r} is not Unicode: {error.reason}") from error


def pack(record: Record, width: int, height: int) -> bytes:
    """The record as msgpack; width and height (pixels) ride along so that a reader need not parse the picture."""
    return msgpack.packb(
        {
            "key": record.key,
            "image": record.image,
            "captions": list(record.captions),
            "width": width,
            "height": height,
            "label": record.label,
            "style": record.style,
        }
        | ({"frames": list(record.frames)} if record.frames else {})
    )


def unpack(data: bytes) -> Record:
    """The inverse of `pack`. Raises DataError where `data` is not such a record."""
    try:
        fields = msgpack.unpackb(data)
        record = Record(
            fields["key"],
            fields["image"],
            tuple(fields["captions"]),
            fields.get("label", ""),
            fields.get("style", ""),
            tuple(fields.get("frames", ())),
        )
        texts = (record.key, record.label, record.style, *record.captions)
        if not (isinstance(record.image, bytes) and all(isinstance(text, str) for text in texts)):
            raise TypeError("the image must be bytes, all else texts")
        return record
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise DataError(
            f"not a record with the fields key, image and captions ({type(error).__name__}: {error}): "
            "write the file again with coca_jax.data.records.write"
        ) from error


def write(path: str | os.PathLike[str], packed: Iterable[bytes]) -> int:
    """Writes packed records into one ArrayRecord file and returns how many."""
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
    count = 0
    try:
        for data in packed:
            writer.write(data)
            count += 1
    finally:
        writer.close()
    return count
