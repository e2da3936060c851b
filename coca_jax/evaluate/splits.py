"""One source under evaluation: its texts, one pass of the model over its pictures, and what is kept of that."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from coca_jax.config import Config
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import BadExample
from coca_jax.data.sources import Source, Spec
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import captioning, retrieval
from coca_jax.evaluate.pieces import Pieces
from coca_jax.evaluate.results import Functions, Processes

# images uint8 [b, s, s, 3], tokens int32 [b, t], index int64 [b], valid bool [b], bad int64 (rows, or -1)
Batch = Mapping[str, Any]
# A source, and how many batches to leave out -> the batches after those.
Batches = Callable[[Source, int], Iterable[Batch]]
Array = np.ndarray

_PIECE = 16  # batches of pictures, or of texts, that are kept together


def _features(functions: Functions, batch: Batch) -> dict[str, Array]:
    assert functions.encode_image is not None
    return {"features": functions.encode_image(batch["images"])}


def _losses(functions: Functions, batch: Batch) -> dict[str, Array]:
    assert functions.caption_loss is not None
    nll, tokens = functions.caption_loss(batch["images"], batch["tokens"])
    return {"nll": nll, "tokens": tokens}


def _said(functions: Functions, batch: Batch) -> dict[str, Array]:
    assert functions.generate is not None
    return {"said": functions.generate(batch["images"])}


def _classes(functions: Functions, batch: Batch) -> dict[str, Array]:
    assert functions.classify is not None
    return {"class_logits": functions.classify(batch["images"], batch["tokens"])}


# What one pass over the pictures can compute: (functions, batch) -> arrays with a row for each picture, `[b, ...]`. An
# evaluator names those that it needs, and each is computed once however many do.
PASSES: dict[str, Callable[[Functions, Batch], dict[str, Array]]] = {
    "features": _features,
    "losses": _losses,
    "said": _said,
    "classes": _classes,
}


@dataclasses.dataclass(frozen=True)
class TextKeys:
    """Tells which texts the model reads as the same one, such as texts that differ in blanks or beyond its length.

    Attributes:
      tokenizer: The model's.
      length: Token ids that the model reads of a text.
    """

    tokenizer: Tokenizer
    length: int

    def __call__(self, texts: Iterable[str]) -> tuple[str, ...]:
        """A digest of the token ids of each text: equal where the model reads the same."""
        rows = (self.tokenizer.encode(text, self.length).tobytes() for text in texts)
        return tuple(hashlib.blake2b(row, digest_size=16).hexdigest() for row in rows)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokenizer.to_bytes() + b"%d" % self.length).hexdigest()


@dataclasses.dataclass(frozen=True)
class Table:
    """The text of a source.

    Attributes:
      rows: Numbers of the records.
      captions, labels: Of each record.
      keys: Of each record's captions, see TextKeys.
      texts: The captions that the model reads differently.
      image_to_text: For each record the rows of its captions in `texts`.
    """

    rows: list[int]
    captions: list[tuple[str, ...]]
    labels: list[str]
    keys: list[tuple[str, ...]]
    texts: list[str]
    image_to_text: list[list[int]]

    @classmethod
    def of(
        cls, rows: list[int], captions: list[tuple[str, ...]], labels: list[str], keys: list[tuple[str, ...]]
    ) -> Table:
        return cls(rows, captions, labels, keys, *retrieval.unique_texts(captions, keys))

    @classmethod
    def read(cls, source: Source, processes: Processes, keys: TextKeys) -> Table:
        def text(row: int) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
            try:
                record = source[row]
                captions = tuple(caption for caption in record.captions if caption.strip())
                return captions, record.label, keys(captions)
            except BadExample:  # the pass over the pictures finds it too, and leaves it out
                return (), "", ()

        rows = range(processes.index, len(source), processes.count)
        shares = processes.gather([text(row) for row in rows])
        records = [shares[i % processes.count][i // processes.count] for i in range(len(source))]
        captions, labels, of_captions = ([record[i] for record in records] for i in range(3))
        return cls.of(list(range(len(source))), list(map(tuple, captions)), labels, list(map(tuple, of_captions)))

    @property
    def same_texts(self) -> int:
        """How many different captions the model reads as one before them."""
        return len({caption for captions in self.captions for caption in captions}) - len(self.texts)

    def only(self, kept: Sequence[int]) -> Table:
        """That of some of its rows."""
        columns = (self.rows, self.captions, self.labels, self.keys)
        return Table.of(*([column[i] for i in kept] for column in columns))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Split:
    """What an evaluator is given: a source of which one pass is done, and the means for more.

    Attributes:
      source, name: and what its metrics are called by.
      table: texts of the records that can be used.
      rows: what the pass has kept by name, a row for each of them, e.g. `features` `[m, d]`.
      functions, tokenizer, config, processes: of the evaluation.
      pieces: keeps what takes long.
      bar: of the progress.
      first: whether it is the first that config.evaluate.splits names.
    """

    source: Source
    name: str
    table: Table
    rows: Mapping[str, Array]
    functions: Functions
    tokenizer: Tokenizer
    config: Config
    processes: Processes
    pieces: Pieces
    bar: tqdm
    first: bool

    @property
    def keys(self) -> TextKeys:
        """Tells which texts the model reads as the same one."""
        return TextKeys(self.tokenizer, self.config.model.text.length)

    def encode(self, name: str, texts: Sequence[str]) -> Array:
        """Features of texts, `[n, d]`; `name` is what they are kept by."""
        functions, size = self.functions, self.config.evaluate.batch_size
        assert functions.encode_text is not None

        def compute(first: int) -> Iterable[dict[str, Array]]:
            for start in range(first * size * _PIECE, len(texts), size * _PIECE):
                rows = []
                for at in range(start, min(start + size * _PIECE, len(texts)), size):
                    part = texts[at : min(at + size, start + size * _PIECE)]
                    tokens = self.tokenizer.encode_batch(part, self.config.model.text.length)
                    rows.append(np.asarray(functions.encode_text(captioning.fill(tokens, size)))[: len(part)])  # type: ignore[misc]
                    self.bar.update(len(part))
                yield {"features": np.concatenate(rows)}

        return np.concatenate([piece["features"] for piece in self.pieces.each(name, compute)])

    def log_probs(self, name: str, rows: Sequence[int], texts: Sequence[str]) -> Array:
        """log P(text | picture) of every text for some rows of the table, float32 `[n, k]`; kept by `name`."""
        functions, size = self.functions, self.config.evaluate.batch_size
        assert functions.log_probs is not None
        tokens = self.tokenizer.encode_batch(texts, self.config.model.text.length)
        preprocessor = Preprocessor.from_config(self.config.model.image.size, self.config.data)
        self.bar.total += len(rows)

        def compute(first: int) -> Iterable[dict[str, Array]]:
            for start in range(first * size, len(rows), size):
                part = rows[start : start + size]
                pixels = preprocessor.pixels(self.source[self.table.rows[row]].image for row in part)
                filled = captioning.fill(pixels, min(size, len(rows)))
                yield {"log_probs": functions.log_probs(filled, tokens)[: len(part)]}  # type: ignore[misc]
                self.bar.update(len(part))

        return np.concatenate([piece["log_probs"] for piece in self.pieces.each(name, compute)])


def names_of(specs: Sequence[str]) -> dict[str, str]:
    """Short metric prefixes of sources: `emoji:seen` -> seen, `array_record:/data/coco-val.array_record` -> coco-val,
    `tfds:coco_captions/2014:1.1.0?split=val` -> coco_captions-2014, `karpathy:/data/dataset_coco.json?split=test` ->
    coco-test.

    A name met before gets a number: val, val-2.
    """
    names: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        parsed = Spec.parse(spec)
        if parsed.kind == "tfds":
            stem = parsed.location.partition(":")[0].replace("/", "-")
        else:
            stem = re.sub(r"\.\w+$", "", parsed.location.rstrip("/").rpartition("/")[2])
        if parsed.kind == "karpathy":
            stem = f"{stem.removeprefix('dataset_')}-{parsed.get('split')}"
        stem = name = re.sub(r"[^\w-]+", "_", stem).strip("_-") or "split"
        number = 1
        while name in names.values() or name == "zero_shot":  # the prefix of the zero-shot measures
            number += 1
            name = f"{stem}-{number}"
        names[spec] = name
    return names


def spread(length: int, count: int) -> list[int]:
    """Up to `count` different rows of `length`, evenly spaced: a fixed choice that nobody made by looking."""
    return sorted({(2 * i + 1) * length // (2 * count) for i in range(count)}) if length else []


def one_pass(
    functions: Functions,
    source: Source,
    name: str,
    batches: Batches,
    passes: Iterable[str],
    *,
    pieces: Pieces,
    processes: Processes,
    bar: tqdm,
) -> tuple[dict[str, Array], set[int]]:
    """Runs the passes over all pictures, or over those that are not yet kept.

    Returns:
      The arrays by name, a row for each record, and the records that cannot be used, of all processes.
    """
    passes = tuple(passes)
    length = len(source)
    covered, kept, unusable = np.zeros(length, bool), dict[str, Array](), set[int]()

    def compute(first: int) -> Iterable[dict[str, Array]]:
        if covered.all():
            return
        for group in _grouped(batches(source, first * _PIECE), _PIECE):
            parts: dict[str, list[Array]] = {}
            bad: list[int] = []
            for batch in group:
                valid = batch["valid"]
                arrays = {"index": batch["index"]}
                for one in passes:
                    arrays |= PASSES[one](functions, batch)
                for key, value in arrays.items():
                    parts.setdefault(key, []).append(np.asarray(value)[valid])
                bad += [row for row in batch["bad"].tolist() if row >= 0]
                bar.update(int(valid.sum()))
            everyone = sorted({row for rows in processes.gather(sorted(bad)) for row in rows})
            yield {key: np.concatenate(values) for key, values in parts.items()} | {"bad": np.array(everyone, np.int64)}

    told = bar.n
    for piece in pieces.each("-".join(["pictures", *sorted(passes)]), compute):
        index = piece["index"]
        if bar.n == told:  # kept from before
            bar.update(len(index))
        told = bar.n
        covered[index] = True
        unusable |= set(piece["bad"].tolist())
        for key in piece.keys() - {"index", "bad"}:
            if key not in kept:
                kept[key] = np.zeros((length, *piece[key].shape[1:]), piece[key].dtype)
            kept[key][index] = piece[key]
    if not covered.all():
        first = int(np.argmin(covered))
        raise ValueError(f"{name}: {length - covered.sum()} of {length} records are in no batch; the first is {first}")
    return kept, unusable


def _grouped(batches: Iterable[Batch], size: int) -> Iterable[Iterable[Batch]]:
    """Never more than one group's results at a time; a batch is let go as soon as it is computed."""
    iterator = iter(batches)
    for first in iterator:
        yield itertools.chain([first], itertools.islice(iterator, size - 1))


def without(rows: Mapping[str, Array], table: Table, unusable: Collection[int]) -> tuple[dict[str, Array], Table]:
    """Rows and table without the records that cannot be used."""
    if not unusable:
        return dict(rows), table
    kept = [at for at, row in enumerate(table.rows) if row not in unusable]
    return {key: value[kept] for key, value in rows.items()}, table.only(kept)
