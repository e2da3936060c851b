"""Sound files, small ones, of every kind that is read."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pathlib
import struct
import tarfile
import tempfile
import zlib
from typing import Any

import google_crc32c
import numpy as np
import PIL.Image

from coca_jax.data import records
from coca_jax.data.prepare import example, tfrecord
from coca_jax.data.records import Record
from coca_jax.data.tokenizer import Tokenizer
from tests import pairs
from tests.data.images import pictures
from tests.data.sources import tars


@functools.cache
def images() -> list[bytes]:
    photo = pictures.photo(40, 56)
    save = pictures.save
    rgba = PIL.Image.fromarray(photo).convert("RGBA")
    frames = [PIL.Image.fromarray(np.roll(photo, 5 * i, 1)) for i in range(3)]
    return [
        save(photo, "JPEG", quality=80),
        save(photo, "JPEG", progressive=True, exif=pictures.turned(6)),
        save(PIL.Image.fromarray(photo).convert("CMYK"), "JPEG"),
        save(PIL.Image.fromarray(photo).convert("L"), "JPEG", exif=pictures.turned(3)),
        save(photo, "PNG"),
        save(rgba, "PNG", exif=pictures.turned(8)),
        save(PIL.Image.fromarray(photo).convert("P"), "PNG", transparency=3),
        save(PIL.Image.fromarray(photo[..., 0].astype(np.uint16) * 257), "PNG"),
        pictures.png(5, 4, 2, 0, b"\x1b\xc0" * 4, tEXt=b"Comment\0text", zTXt=b"k\0\0" + zlib.compress(b"text" * 9)),
        save(photo, "WEBP", quality=70),
        save(rgba, "WEBP", lossless=True, exif=pictures.turned(5)),
        save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        save(photo, "BMP"),
        save(PIL.Image.fromarray(photo).convert("P"), "BMP"),
        save(photo, "TIFF"),
        save(photo, "TIFF", compression="tiff_lzw"),
        save(photo, "TIFF", compression="jpeg"),
        save(PIL.Image.fromarray(photo).convert("1"), "TIFF", compression="group4"),
        save(photo, "AVIF", quality=60),
    ]


@functools.cache
def picture() -> bytes:
    return pictures.save(pairs.picture("red", "dot"), "PNG")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)


@functools.cache
def tar_files() -> list[bytes]:
    fields = json.dumps({"caption": "json", "alt": ["one", None, 3], "class": 2}).encode()
    members = []
    for n in range(3):
        contents = {"jpg": picture(), "json": fields, "txt": b"text", "cls": b"1"}
        members += [(f"{n:05d}.{end}", content) for end, content in contents.items()]
    long = [(f"{'folder/' * 40}{name}", content) for name, content in members[:4]]
    strange = [("../../escaped.jpg", picture()), ("../../escaped.txt", b"a"), ("/escaped.jpg", picture())]
    made = [tars.tar(members), *(tars.tar(long, kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))]
    return [*made, tars.tar(strange)]


@functools.cache
def rows() -> list[Record]:
    return [Record(f"key-{n}", picture(), ("a red dot", "a dot"), "dot", "drawn") for n in range(4)]


@functools.cache
def array_records() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "seed.array_record"
        records.write(file, [records.pack(record, 24, 24) for record in rows()])
        return [file.read_bytes()]


@functools.cache
def packed_values() -> list[dict[str, Any]]:
    fields = {"key": "key", "image": picture(), "captions": ["a red dot"], "width": 24, "height": 24}
    return [fields | {"label": "dot", "style": "drawn"}, fields]


@functools.cache
def parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    found = []
    captions: list[Any] = ["a red dot"] * 4
    for columns, options in (
        ({"image": [picture()] * 4, "caption": captions, "label": [1, 2, 3, 4]}, {"compression": "none"}),
        (
            {"image": [{"bytes": picture(), "path": "a.png"}] * 4, "caption": [["a", "b"]] * 4},
            {"compression": "snappy"},
        ),
        ({"image": ["a.png", "../b.png", "/c.png", "d"], "caption": captions}, {"compression": "zstd"}),
    ):
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=2, **options)
        found.append(out.getvalue())
    return found


def tfrecord_of(messages: list[bytes]) -> bytes:
    out = b""
    for message in messages:
        head = struct.pack("<Q", len(message))
        out += head + struct.pack("<I", tfrecord.masked_crc(head)) + message
        out += struct.pack("<I", tfrecord.masked_crc(message))
    return out


@functools.cache
def tfrecords() -> list[bytes]:
    messages = []
    for record in rows():
        message: Any = example.example_class()()
        feature = message.features.feature
        feature["image/encoded"].bytes_list.value.append(record.image)
        feature["caption/text"].bytes_list.value.extend(caption.encode() for caption in record.captions)
        feature["label"].int64_list.value.append(3)
        messages.append(message.SerializeToString(deterministic=True))
    return [tfrecord_of(messages), tfrecord_of(messages[:1])]


@functools.cache
def caption_files() -> list[bytes]:
    lines = [{"file_name": f"{n}.png", "caption": "a dot", "label": n} for n in range(3)]
    jsonl = "\n".join(json.dumps(line) for line in lines)
    odd = '{"file_name": "\\ud800.png", "caption": "a"}\n{"file_name": "0.png", "caption": "\\udc80"}\n'
    csv = 'file_name,caption,label\n0.png,"a dot, red",1\n1.png,a dot,2\n../2.png,b,\n'
    return [jsonl.encode(), odd.encode(), csv.encode(), csv.replace(",", "\t").encode()]


def merges() -> bytes:
    """CLIP's format before it is packed: a line of its own, then pairs."""
    return b"#version: 0.2\nr e\nre d</w>\nd o\ndo t</w>\na </w>\n"


# ---------------------------------------------------------------------------------------------------------------------
# Checksums set right again


def repair_image(data: bytes) -> bytes:
    """Of a PNG; other formats have none that matter."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def repair_tar(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def repair_tfrecord(data: bytes) -> bytes:
    out, at = bytearray(data), 0
    while at + 12 <= len(out):
        out[at + 8 : at + 12] = struct.pack("<I", _masked(bytes(out[at : at + 8])))
        end = at + 12 + int.from_bytes(out[at : at + 8], "little")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack("<I", _masked(bytes(out[at + 12 : end])))
        at = end + 4
    return bytes(out)


def _masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)
