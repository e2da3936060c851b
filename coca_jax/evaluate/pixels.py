"""The pixel-nearest-neighbour baseline of whole splits, read from their records once and kept in a small JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from coca_jax.data import images
from coca_jax.data.sources import Source
from coca_jax.evaluate import retrieval

LIMIT = 20_000  # records of a source: beyond it the lookup would take longer than the rest of an evaluation
_VERSION = 1  # of the computation: raise it where the figures change


def baselines(
    splits: Mapping[str, Source],
    reference: Source,
    style: str = "",
    *,
    size: int = 32,
    background: tuple[int, int, int] = (255, 255, 255),
    cache: epath.PathLike | None = None,
    bar: tqdm | None = None,
) -> dict[str, retrieval.Measures]:
    """`retrieval.pixel_baseline` of each split, against the pictures of a training source.

    Args:
      splits: held-out sources by name.
      reference: a training source. All its records are read, those with a name of some split are decoded.
      style: the style of the reference pictures, e.g. a designer; empty: all of them.
      size: side at which pictures are compared, pixels.
      background: RGB under transparent pixels.
      cache: JSON file in which results are kept, by the fingerprints of the sources; None keeps none.
      bar: progress bar to move, one step a picture.

    Raises:
      ValueError: no record of the reference has that style.
    """
    path = epath.Path(cache) if cache is not None else None
    known = _read(path)
    keys = {name: _key(source, reference, style, size, background) for name, source in splits.items()}
    missing = {name: source for name, source in splits.items() if keys[name] not in known}
    if missing:
        bar = bar or tqdm(disable=True)
        bar.total = (bar.total or 0) + sum(map(len, missing.values())) + len(reference)
        bar.set_description("pixel baseline")
        texts = {name: retrieval.unique_texts([r.captions for r in _records(s)]) for name, s in missing.items()}
        wanted = {text for distinct, _ in texts.values() for text in distinct}
        pictures, names, styles = [], [], set()
        for record in _records(reference):
            styles.add(record.style)
            if record.captions and (not style or record.style == style) and wanted.intersection(record.captions):
                pictures.append(images.fit(images.decode(record.image, background, size), size))
                names.append(record.captions)
            bar.update()
        if style and style not in styles:
            there = ", ".join(sorted(styles - {""})) or "none"
            raise ValueError(f"config.evaluate.reference_style={style!r}: the styles of {reference.name} are {there}")
        references = _stack(pictures, size)
        for split, source in missing.items():
            held_out = []
            for record in _records(source):
                held_out.append(images.fit(images.decode(record.image, background, size), size))
                bar.update()
            distinct, image_to_text = texts[split]
            known[keys[split]] = retrieval.pixel_baseline(
                _stack(held_out, size), image_to_text, distinct, references, names
            )
        _write(path, known)
    return {name: known[key] for name, key in keys.items()}


def _records(source: Source) -> Iterator:
    return (source[i] for i in range(len(source)))


def _stack(pictures: Sequence[np.ndarray], size: int) -> np.ndarray:
    return np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)


def _key(source: Source, reference: Source, *settings: object) -> str:
    what = [_VERSION, source.fingerprint(), reference.fingerprint(), *settings]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(path: epath.Path | None) -> dict[str, retrieval.Measures]:
    """What the file holds; a file that cannot be read as JSON is worth no more than none, and is written anew."""
    if path is None or not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: epath.Path | None, known: dict[str, retrieval.Measures]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
