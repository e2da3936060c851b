"""Photographs for benchmarks/data.py: crops and flips of those in scikit-learn and scikit-image, once in each format.

Nothing is downloaded and nothing enlarged. Where a picture is to be larger than the photograph, crops of four stand
side by side, so that each pixel still has the detail of a photograph, which is what decoding takes its time for.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Iterator

import numpy as np
import PIL.Image

from coca_jax.data import records
from coca_jax.data.records import Record
from coca_jax.data.tokenizer import Tokenizer

SIDES = (500, 800, 1200)  # longer side, pixels
TOKENIZER = "tokenizer.model"
_FILES = {
    "sklearn": {
        "datasets/images/china.jpg": "the roof of a chinese temple",
        "datasets/images/flower.jpg": "a purple flower",
    },
    "skimage": {
        "data/astronaut.png": "an astronaut in an orange suit",
        "data/chelsea.png": "the face of a tabby cat",
        "data/coffee.png": "a cup of coffee on a wooden table",
        "data/rocket.jpg": "a rocket on its launch pad in the evening",
        "data/motorcycle_left.png": "a motorcycle in a workshop",
    },
}


def photographs() -> list[tuple[np.ndarray, str]]:
    """Pixels uint8 `[h, w, 3]` of each photograph, and what it shows. Raises SystemExit where a package is missing."""
    found = []
    for package, files in _FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "the photographs come with scikit-learn and scikit-image: pip install 'coca_jax[benchmark]'"
            )
        folder = pathlib.Path(spec.submodule_search_locations[0])
        for file, text in files.items():
            with PIL.Image.open(folder / file) as image:
                found.append((np.asarray(image.convert("RGB")), text))
    return found


def pictures(side: int, count: int) -> Iterator[Record]:
    """JPEGs of `side` pixels on the longer side, quality 75 to 95, chroma halved, as the web has them."""
    rng = np.random.default_rng(side)
    photos = photographs()
    tiles = 1 if side <= 500 else 2
    for number in range(count):
        wide = bool(rng.integers(2))
        ratio = rng.uniform(0.62, 0.71)  # as cameras have it
        width, height = (side, round(side * ratio)) if wide else (round(side * ratio), side)
        canvas = np.empty((height, width, 3), np.uint8)
        shown = []
        for y in range(tiles):
            for x in range(tiles):
                top, bottom = height * y // tiles, height * (y + 1) // tiles
                left, right = width * x // tiles, width * (x + 1) // tiles
                fits = [p for p in photos if p[0].shape[0] >= bottom - top and p[0].shape[1] >= right - left]
                # Few are high enough for the upright ones: those are turned.
                turned = [
                    (p.swapaxes(0, 1), t)
                    for p, t in photos
                    if p.shape[1] >= bottom - top and p.shape[0] >= right - left
                ]
                choices = fits or turned
                pixels, text = choices[rng.integers(len(choices))]
                dy = int(rng.integers(pixels.shape[0] - (bottom - top) + 1))
                dx = int(rng.integers(pixels.shape[1] - (right - left) + 1))
                tile = pixels[dy : dy + bottom - top, dx : dx + right - left]
                canvas[top:bottom, left:right] = tile[:, ::-1] if rng.integers(2) else tile
                shown.append(text)
        out = io.BytesIO()
        PIL.Image.fromarray(canvas).save(out, "JPEG", quality=int(rng.integers(75, 96)))
        caption = f"a photo of {' beside '.join(dict.fromkeys(shown))}, picture number {number} of the series"
        yield Record(f"{number:06d}", out.getvalue(), (caption,))


def write(folder: pathlib.Path, count: int) -> None:
    """The pictures of each side as ArrayRecord, WebDataset, Parquet (with pyarrow) and a folder, and a vocabulary."""
    marker = folder / f"written-{count}"
    if marker.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    captions = []
    for side in SIDES:
        made = list(pictures(side, count))
        captions += [record.captions[0] for record in made]
        sizes = [PIL.Image.open(io.BytesIO(record.image)).size for record in made]
        packed = (records.pack(record, *size) for record, size in zip(made, sizes, strict=True))
        records.write(folder / f"{side}.array_record", packed)
        with tarfile.open(folder / f"{side}.tar", "w") as tar:
            for record in made:
                for end, content in (("jpg", record.image), ("txt", record.captions[0].encode())):
                    member = tarfile.TarInfo(f"{record.key}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (folder / str(side)).mkdir()
        with open(folder / str(side) / "captions.csv", "w", newline="", encoding="utf-8") as table:
            rows = csv.writer(table)
            rows.writerow(("file_name", "caption"))
            for record in made:
                (folder / str(side) / f"{record.key}.jpg").write_bytes(record.image)
                rows.writerow((f"{record.key}.jpg", record.captions[0]))
        if importlib.util.find_spec("pyarrow"):
            import pyarrow
            import pyarrow.parquet

            columns = {"image": [r.image for r in made], "caption": [r.captions[0] for r in made]}
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{side}.parquet", row_group_size=50)
    Tokenizer.train(captions, vocab_size=400).save(folder / TOKENIZER)
    marker.write_text(json.dumps({"photographs": [text for _, text in photographs()]}))
