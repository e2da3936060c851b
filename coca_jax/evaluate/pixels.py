"""The pixel-nearest-neighbour baseline of whole splits, read from their records once and kept in a small JSON file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from coca_jax.data import addresses, images, side_files
from coca_jax.data.records import BadExample, Record
from coca_jax.data.sources import Source, content
from coca_jax.evaluate import retrieval
from coca_jax.evaluate.splits import TextKeys

LIMIT = 20_000  # records of a source: beyond it the lookup would take longer than the rest of an evaluation
_VERSION = 2  # of the computation: raise it where the figures change


def baselines(
    splits: Mapping[str, Source],
    reference: Source,
    style: str = "",
    *,
    keys: TextKeys | None = None,
    size: int = 32,
    background: tuple[int, int, int] = (255, 255, 255),
    cache: epath.PathLike | None = None,
    bar: tqdm | None = None,
) -> dict[str, retrieval.Measures]:
    """`retrieval.pixel_baseline` of each split, against the pictures of a training source.

    Args:
      splits: held-out sources by name.
      reference: a training source. All its records are read, those with a name of some split are decoded. Here as in
        the splits, records that cannot be used are left out.
      style: the style of the reference pictures, e.g. a designer; empty: all of them.
      keys: Tells which texts count as the same, as for the model beside which the baseline stands; None: equal ones.
      size: side at which pictures are compared, pixels.
      background: RGB under transparent pixels.
      cache: JSON file in which results are kept, by the fingerprints of the sources; None keeps none.
      bar: progress bar to move, one step a picture.

    Raises:
      ValueError: no record of the reference has that style.
    """
    path = addresses.path(cache) if cache is not None else None
    known = _read(path)
    reads = keys.fingerprint() if keys else ""
    entries = {name: _key(source, reference, style, size, background, reads) for name, source in splits.items()}
    missing = {name: source for name, source in splits.items() if entries[name] not in known}
    if missing:
        bar = bar or tqdm(disable=True)
        bar.total = (bar.total or 0) + sum(map(len, missing.values())) + len(reference)
        bar.set_description("pixel baseline")
        held_out = {name: _pictures(source, size, background, bar, keys) for name, source in missing.items()}
        wanted = {text for captions, _ in held_out.values() for texts in captions for text in texts}
        styles: set[str] = set()

        def useful(record: Record) -> bool:
            styles.add(record.style)
            return (not style or record.style == style) and not wanted.isdisjoint(_texts(record, keys))

        names, references = _pictures(reference, size, background, bar, keys, useful)
        if style and style not in styles:
            raise ValueError(no_such_style(style, reference, styles))
        for name, (captions, pictures) in held_out.items():
            distinct, image_to_text = retrieval.unique_texts(captions)
            known[entries[name]] = retrieval.pixel_baseline(pictures, image_to_text, distinct, references, names)
        _write(path, known)
    return {name: known[entry] for name, entry in entries.items()}


def no_such_style(style: str, reference: Source, styles: set[str]) -> str:
    """What is said where no record of the reference has the configured style."""
    there = ", ".join(sorted(styles - {""})) or "none"
    wanted = f"config.evaluate.reference_style={style!r}: the styles of {reference.name} are {there}"
    return f"{wanted}; --config.evaluate.reference_style= takes all its pictures"


def _pictures(
    source: Source,
    size: int,
    background: tuple[int, int, int],
    bar: tqdm,
    keys: TextKeys | None,
    useful: Callable[[Record], bool] = lambda record: True,
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Texts, and pixels uint8 `[m, size, size, 3]`, of the records that are useful and can be used."""
    captions, pictures = [], []
    for row in range(len(source)):
        with contextlib.suppress(BadExample):
            record = source[row]
            if useful(record):
                pictures.append(images.decode_and_fit(record.image, size, background=background))
                captions.append(_texts(record, keys))
        bar.update()
    return captions, np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)


def _texts(record: Record, keys: TextKeys | None) -> tuple[str, ...]:
    """What a record's captions are compared by."""
    return record.captions if keys is None else keys(text for text in record.captions if text.strip())


def _key(source: Source, reference: Source, *settings: object) -> str:
    what = [_VERSION, *((s.fingerprint(), content.of_source(s)) for s in (source, reference)), *settings]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(path: epath.Path | None) -> dict[str, retrieval.Measures]:
    """What the file holds; a file that cannot be read as JSON is worth no more than none, and is written anew."""
    known = None if path is None else side_files.take_json(path)
    if not isinstance(known, dict):
        return {}
    return {key: found for key, found in known.items() if _are_measures(found)}


def _are_measures(found: Any) -> bool:
    parts = list(found.values()) if isinstance(found, dict) else [None]
    return all(isinstance(part, dict) and all(isinstance(x, int | float) for x in part.values()) for part in parts)


def _write(path: epath.Path | None, known: dict[str, retrieval.Measures]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side_files.write_text(path, json.dumps(known, indent=1))
    except OSError as error:  # it is only a cache
        logging.warning("%s cannot be written: %s", path, error)
