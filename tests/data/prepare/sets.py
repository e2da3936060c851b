"""Small data sets for the tests of coca_jax.data.prepare."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import PIL.Image

from coca_jax.data import records
from coca_jax.data.records import Record
from tests.data.images import pictures

# Records of `mixed` that cannot be used, and why.
BAD = {7: "truncated", 9: "empty", 11: "not_a_picture", 13: "no_caption"}
SIZE = 40


@functools.cache
def mixed_records() -> tuple[Record, ...]:
    """SIZE records, those of BAD among them; 20 has the key of 19, and 3 a blank caption beside another."""
    found = []
    for i in range(SIZE):
        pixels = pictures.photo(30 + i, 90)
        image = pictures.save(pixels, "JPEG", quality=90) if i % 3 else pictures.save(pixels, "PNG")
        captions = [f"picture number {i}", f"the {i}th, and what it shows is a wave of colours"][: 1 + i % 2]
        match BAD.get(i):
            case "truncated":
                image = image[: len(image) // 2]
            case "empty":
                image = b""
            case "not_a_picture":
                image = b"<html>not found</html>"
            case "no_caption":
                captions = ["", " \n"]
        if i == 3:
            captions = [" ", *captions]
        key = f"key-{19 if i == 20 else i}"
        found.append(Record(key, image, tuple(captions), label=("warm", "cold")[i % 2], style="waves"))
    return tuple(found)


def write_mixed(folder: Path) -> str:
    """Writes them as two ArrayRecord files; returns their specification."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = [records.pack(record, 90, 30 + i) for i, record in enumerate(mixed_records())]
    records.write(folder / "mixed-0.array_record", packed[:25])
    records.write(folder / "mixed-1.array_record", packed[25:])
    return f"array_record:{folder}/mixed-*.array_record"


def write_long(folder: Path, count: int) -> str:
    """Writes pictures that take a few milliseconds each; returns their specification."""
    folder.mkdir(parents=True, exist_ok=True)
    image = pictures.save(pictures.detailed(300, 300), "PNG")
    packed = (records.pack(Record(f"key-{i}", image, (f"caption {i}",)), 300, 300) for i in range(count))
    records.write(folder / "long.array_record", packed)
    return f"array_record:{folder}/long.array_record"


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drawing(mode: str, width: int = 120, height: int = 60) -> PIL.Image.Image:
    """A picture of a mode: half red, half green, and the right half see-through where the mode can say so."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, : width // 2] = (255, 0, 0, 255)
    pixels[:, width // 2 :] = (0, 255, 0, 0)
    rgba = PIL.Image.fromarray(pixels)
    if mode == "P":
        return rgba.convert("RGB").convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    return rgba.convert(mode)
