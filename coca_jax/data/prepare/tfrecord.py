"""TFRecord files of tf.train.Example, for conversion: `tfrecord:PATTERN?image=image/encoded&caption=caption/text`.

The format has no index and no random access, so training does not read it. For conversion the files are scanned once
for where their records begin; the offsets are kept in the cache folder. TensorFlow is not needed: the checksums are
google-crc32c's, the messages are parsed by protobuf.

A file is a row of `uint64 length, uint32 masked CRC-32C of the length, the data, uint32 masked CRC-32C of the data`,
all little-endian (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details); it may be gzipped
as a whole.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any, SupportsIndex

import google_crc32c
import numpy as np
from etils import epath

from coca_jax import cache
from coca_jax.data import opening
from coca_jax.data.prepare import example
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import base, content, files
from coca_jax.data.sources.base import MAX_BYTES, Spec, one_line

OPTIONS = ("image", "caption", "label", "key", "style")
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_UNREADABLE = (OSError, EOFError, zlib.error)  # what a damaged gzip stream raises


class TFRecords:
    """Records of TFRecord files, one file after the other.

    Args:
      spec: `tfrecord:` and a pattern (see files.expand), with the options
        image: the feature that holds the encoded picture; default image/encoded.
        caption: the feature (or features, with commas) of the captions; each may hold several; default caption/text.
        label, key, style: features, of bytes or integers; by default there is no label and no style, and the key is
          FILE:NUMBER.

    Raises:
      DataError: no such file, one that is truncated or is something else, or a first record without these features.

    Reading a record raises BadExample where its data do not match their checksum, are no Example, or lack what is asked
    for; the message names the file and the record's number in it.
    """

    tokenizer_path: epath.Path | None = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, spec: Spec):
        spec.check(OPTIONS)
        self.name = spec.text
        self._image = spec.get("image") or "image/encoded"
        self._captions = spec.fields("caption") or ("caption/text",)
        self._optional = {name: spec.get(name) for name in ("label", "key", "style")}
        self._files = files.expand(spec.location, self.name)
        found = files.each(_index, self._files, "reading where records begin", "files")
        # Of each file: first byte and length of the data, int64 [n, 2]; in the unpacked stream if it is gzipped.
        self._spans = [spans for spans, _ in found]
        self._gzipped = [gzipped for _, gzipped in found]
        self._first = np.cumsum([0, *(len(spans) for spans in self._spans)])
        self._local = threading.local()
        if len(self):
            self._check_first()

    @property
    def sequential(self) -> bool:
        """Whether reading in another order than the files' costs unpacking them again and again."""
        return any(self._gzipped)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __repr__(self) -> str:
        return f"TFRecords({self.name})"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names, sizes, versions and options."""
        parts = [(file.name, file.size, file.version) for file in self._files]
        return base.digest([*parts, self._image, self._captions, sorted(self._optional.items())])

    def contents(self) -> dict[str, str]:
        """See Source."""
        return {content.LIST: self.fingerprint()} | content.of_files(self._files)

    def __getitem__(self, index: SupportsIndex) -> Record:
        i = index.__index__()
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: record {i} of {len(self)}")
        number, record = self._locate(i)
        file = self._files[number]
        where = f"{file.path}: record {record}"
        features = example.features(self._read(number, record, where), where)
        (image,) = self._values(features, self._image, where)[:1] or [b""]
        captions = [text for name in self._captions for text in self._texts(features, name, where)]
        named = {k: "".join(self._texts(features, name, where)[:1]) for k, name in self._optional.items() if name}
        if not isinstance(image, bytes):
            raise BadExample("unreadable", f"{where}: feature {self._image!r} holds numbers: name that of the bytes")
        key = named.get("key") or f"{file.name}:{record}"
        return Record(key, image, tuple(captions), named.get("label", ""), named.get("style", ""))

    def _locate(self, index: int) -> tuple[int, int]:
        """The file of a record, and its number there."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, index - int(self._first[number])

    def _values(self, features: Mapping[str, Any], name: str, where: str) -> list[Any]:
        if name not in features:
            there = ", ".join(sorted(features)[:20]) or "none at all"
            raise BadExample("unreadable", f"{where} has no feature {name!r}; it has {there}")
        feature = features[name]
        kind = feature.WhichOneof("kind")
        return list(getattr(feature, kind).value) if kind else []

    def _texts(self, features: Mapping[str, Any], name: str, where: str) -> list[str]:
        try:
            values = self._values(features, name, where)
            return [v.decode() if isinstance(v, bytes) else str(v) for v in values]
        except UnicodeDecodeError as error:
            raise BadExample("encoding", f"{where}: feature {name!r} is not UTF-8: {one_line(error)}") from error

    def _check_first(self) -> None:
        """A feature that the first record lacks is a slip in the specification, not a bad record."""
        try:
            features = example.features(self._read(*self._locate(0), "the first record"), "the first record")
        except BadExample:
            return
        for option, names in {"image": (self._image,), "caption": self._captions, **self._optional}.items():
            for name in [names] if isinstance(names, str) else names:
                if name and name not in features:
                    there = ", ".join(sorted(features)[:20]) or "none"
                    raise DataError(f"{self.name}: no feature {name!r}; name one by ?{option}=; there are {there}")

    def _read(self, number: int, record: int, where: str) -> bytes:
        """The data of a record, whose checksum is right."""
        file = self._files[number]
        start, length = (int(value) for value in self._spans[number][record])
        if length > MAX_BYTES:
            raise BadExample("unreadable", f"{where}: {length} bytes, more than the {MAX_BYTES} that one may have")
        try:
            if self._gzipped[number]:
                stream = self._stream(file)
                stream.seek(start)
                data = stream.read(length + _CHECKSUM.size)
            elif files.is_remote(file.path):
                system, inside = files.store(file.path)
                data = system.cat_file(inside, start=start, end=start + length + _CHECKSUM.size)
            else:
                unchanged = (file.size, file.version)
                data = files.HANDLES.read(file.path, start, length + _CHECKSUM.size, unchanged)
        except _UNREADABLE as error:
            raise DataError(f"{where} cannot be read: {one_line(error)}; copy the file again") from error
        if len(data) < length + _CHECKSUM.size:
            raise DataError(f"{where} is cut off: {files.overwritten(file.path)}")
        data, checksum = data[:length], data[length:]
        if _CHECKSUM.unpack(checksum)[0] != masked_crc(data):
            raise BadExample("unreadable", f"{where}: its data do not match their CRC-32C: copy the file again")
        return data

    def _stream(self, file: files.File) -> IO[bytes]:
        """The unpacked stream of a gzipped file, kept open: going on where it stands costs nothing."""
        if getattr(self._local, "path", None) != file.path:
            if getattr(self._local, "stream", None) is not None:
                self._local.stream.close()
            # Of a path, gzip closes the file itself when nobody holds the stream any more.
            opened = _opened(file.path) if files.is_remote(file.path) else file.path
            self._local.stream = gzip.open(opened)  # noqa: SIM115 (it stays open)
            self._local.path = file.path
        return self._local.stream


def masked_crc(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _opened(path: str) -> IO[bytes]:
    if not files.is_remote(path):
        return opening.open_file(path)
    system, inside = files.store(path)
    return system.open(inside, "rb")


# ---------------------------------------------------------------------------------------------------------------------
# Where records begin


def _index(file: files.File) -> tuple[np.ndarray, bool]:
    """Spans of the records, int64 [n, 2], and whether the file is gzipped; from the cache if it was scanned before."""
    try:
        with _opened(file.path) as opened:
            head = opened.read(_HEADER.size)
            # The length of a record may look like gzip's magic number, but then its checksum is right.
            gzipped = head.startswith(b"\x1f\x8b\x08") and not _starts_record(head)
            name = base.digest([os.path.abspath(file.path), file.size, file.version, "1"])
            kept = cache.folder() / "tfrecord" / f"{name}.npy"
            with contextlib.suppress(OSError, ValueError):
                spans = np.load(kept, allow_pickle=False)
                if spans.ndim == 2 and spans.dtype == np.int64:
                    return spans, gzipped
            opened.seek(0)
            if gzipped:
                with gzip.open(opened) as stream:
                    spans = _scan(stream, file.path, None)
            else:
                spans = _scan(opened, file.path, file.size)
    except _UNREADABLE as error:
        raise DataError(f"{file.path} cannot be read: {one_line(error)}; copy the file again") from error
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".tmp", delete=False) as temporary:
            np.save(temporary, spans)
        os.replace(temporary.name, kept)
    return spans, gzipped


def _starts_record(head: bytes) -> bool:
    return len(head) == _HEADER.size and _HEADER.unpack(head)[1] == masked_crc(head[:8])


def _scan(stream: IO[bytes] | gzip.GzipFile, path: str, size: int | None) -> np.ndarray:
    """Reads lengths only, and checks them. The end of a gzipped stream, whose size is None, is found by reading on."""
    spans: list[tuple[int, int]] = []
    position = 0
    while head := stream.read(_HEADER.size):
        where = f"{path}: record {len(spans)}"
        if not spans and not _starts_record(head):
            raise DataError(f"{path}: not a TFRecord file: convert reads those, plain or gzipped; name others")
        if len(head) < _HEADER.size:
            raise DataError(f"{where} is cut off after {len(head)} bytes: copy the file again or leave it out")
        if not _starts_record(head):
            raise DataError(f"{where}: its length does not match its CRC-32C: copy the file again or leave it out")
        (length, _) = _HEADER.unpack(head)
        start, end = position + _HEADER.size, position + _HEADER.size + length + _CHECKSUM.size
        if size is None and length > MAX_BYTES:  # one would unpack all that follows to find its end
            raise DataError(
                f"{where} has {length} bytes, more than the {MAX_BYTES} that one may have: leave the file out"
            )
        cut = size is not None and end > size
        if not cut:  # seeking past the end of a stream says nothing: its last byte is read
            stream.seek(end - 1)
            cut = not stream.read(1)
        if cut:
            raise DataError(f"{where} is cut off: copy the file again or leave it out")
        spans.append((start, length))
        position = end
    return np.array(spans, np.int64).reshape(-1, 2)
