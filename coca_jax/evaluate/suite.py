"""All measures of one model: what a run evaluates, and the material of the report's gallery."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from coca_jax.config import Config
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import BadExample
from coca_jax.data.sources import Source, Spec
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import caption_scores, captioning, pixels, retrieval, zero_shot

# images uint8 [b, s, s, 3], tokens int32 [b, t], index int64 [b], valid bool [b], bad int64 (rows, or -1)
Batch = Mapping[str, Any]
Array = np.ndarray

GALLERY = 8  # queries a split and a direction, evenly spaced
SHOWN = 5  # answers a query


@dataclasses.dataclass(frozen=True)
class Functions:
    """The model, its parameters bound. A half that was not trained is None, and its measures are absent.

    Results are numpy arrays. With several processes, each calls them alike and gets all of the result.

    Attributes:
      encode_image: images uint8 `[b, s, s, 3]` -> features `[b, d]`, unit length.
      encode_text: tokens int32 `[b, t]` -> features `[b, d]`, unit length.
      caption_loss: (images, tokens) -> (sum of negative log-likelihoods in nats `[b]`, target tokens `[b]`).
      generate: images -> tokens int32 `[b, t]`.
    """

    encode_image: Callable[[Array], Array] | None = None
    encode_text: Callable[[Array], Array] | None = None
    caption_loss: Callable[[Array, Array], tuple[Array, Array]] | None = None
    generate: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that evaluate together, each of which calls `run`, and this one among them.

    Attributes:
      index: of this one. Process 0 shows progress, measures the pixel baseline and gets the gallery.
      count: how many.
      gather: what JSON can hold -> the values of all processes, by index; called by all alike.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One of the top answers: a name, and in a search for pictures the picture (encoded, as in the record)."""

    text: str
    right: bool
    picture: bytes = b""


@dataclasses.dataclass(frozen=True)
class Query:
    """A retrieval query of the gallery. `text` holds the right names of a picture, or the name that is asked for."""

    split: str
    direction: str  # image_to_text | text_to_image
    text: str
    answers: tuple[Answer, ...]
    rank: int  # of the best right answer, from 1
    candidates: int
    picture: bytes = b""  # asked about, in image_to_text


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated caption with its picture and references."""

    split: str
    text: str
    references: tuple[str, ...]
    exact: bool
    picture: bytes


@dataclasses.dataclass(frozen=True)
class Results:
    """What `run` found: metrics by name (plain floats), the same in all processes, and in process 0 the gallery."""

    metrics: dict[str, float]
    queries: tuple[Query, ...] = ()
    captions: tuple[Caption, ...] = ()


def split_names(specs: Sequence[str]) -> dict[str, str]:
    """Short metric prefixes of sources: `emoji:seen` -> seen, `array_record:/data/coco-val.array_record` -> coco-val,
    `tfds:coco_captions/2014:1.1.0?split=val` -> coco_captions-2014.

    A name met before gets a number: val, val-2.
    """
    names: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        parsed = Spec.parse(spec)
        if parsed.kind == "tfds":
            stem = parsed.location.partition(":")[0].replace("/", "-")
        else:
            stem = re.sub(r"\.\w+$", "", parsed.location.rstrip("/").rpartition("/")[2])
        stem = name = re.sub(r"[^\w-]+", "_", stem).strip("_-") or "split"
        number = 1
        while name in names.values() or name == "zero_shot":  # the prefix of the zero-shot measures
            number += 1
            name = f"{stem}-{number}"
        names[spec] = name
    return names


def run(
    functions: Functions,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    config: Config,
    batches: Callable[[Source], Iterable[Batch]],
    *,
    reference: Source | None = None,
    reference_style: str = "",
    cache: epath.PathLike | None = None,
    processes: Processes = Processes(),
    progress: bool = True,
) -> Results:
    """Evaluates every split of `config.evaluate`; a progress bar runs along.

    Metrics, per split: `seen/images`, `seen/texts` (how many are ranked), `seen/image_to_text/r1` (r5, r10,
    median_rank), `seen/text_to_image/...`, `seen/chance/...`, `seen/pixel/image_to_text/...` and so on,
    `seen/caption_loss` (nats a token, against the caption in the batch), `seen/perplexity`; of the first split
    `seen/caption_exact_match`, the share of the generated captions that is right word for word; with
    `config.evaluate.score_captions` of all pictures `seen/captions/cider` and the rest of `caption_scores.scores`; and
    `zero_shot/top1` with the rest of `zero_shot.classify`.

    With several processes, each calls this with the same arguments and reads its share: the texts of every n-th record,
    and those rows of the pictures' batches that `batches` gives it.

    Args:
      functions: the model.
      sources: each of `config.evaluate.splits` and `config.evaluate.zero_shot`, by that string.
      tokenizer: of the model.
      config: the run's.
      batches: a source -> its batches, every record once, all of one shape; `images` and `tokens` are for `functions`
        alone, `index` and `valid` are numpy arrays of the whole batch on every process, `bad` of what was read in this
        one.
      reference: the training source that the pixel baseline looks names up in; None leaves the baseline out, as do
        sources of more than `pixels.LIMIT` records.
      reference_style: the style of the pictures it uses; empty: all.
      cache: JSON file in which the pixel baseline is kept between evaluations; None computes it each time.
      processes: with whom the work is shared; alone unless told.
      progress: whether to show the bar.

    Raises:
      ValueError: a source that is missing, empty, unlabelled (zero-shot), or not covered by its batches.
    """
    evaluate = config.evaluate
    names = split_names(evaluate.splits)
    specs = dict.fromkeys([*names, *([evaluate.zero_shot] if evaluate.zero_shot and functions.encode_image else [])])
    for spec in specs:
        if spec not in sources or not len(sources[spec]):
            raise ValueError(f"config.evaluate names {spec!r}, which is {'empty' if spec in sources else 'not loaded'}")
    encodes = functions.encode_image is not None and functions.encode_text is not None
    tables = {spec: _Table.read(sources[spec], processes) for spec in specs}
    bar = tqdm(
        total=sum(len(t.captions) + (len(t.texts) if encodes else 0) for t in tables.values()),
        desc="evaluate",
        unit=" examples",
        disable=not progress or processes.index > 0,
        leave=None,  # inside the training's bar it goes away when it is done
        dynamic_ncols=True,
    )

    def encode(texts: Sequence[str]) -> Array:
        assert functions.encode_text is not None
        rows = []
        for start in range(0, len(texts), evaluate.batch_size):
            part = texts[start : start + evaluate.batch_size]
            tokens = tokenizer.encode_batch(part, config.model.text.length)
            rows.append(np.asarray(functions.encode_text(captioning.fill(tokens, evaluate.batch_size)))[: len(part)])
            bar.update(len(part))
        return np.concatenate(rows)

    metrics: dict[str, float] = {}
    queries: list[Query] = []
    captions: list[Caption] = []
    with bar:
        for spec, table in tables.items():
            source, name = sources[spec], names.get(spec, "zero_shot")
            bar.set_description(name)
            is_first = functions.generate is not None and list(names)[:1] == [spec]
            in_split, scores = spec in names, spec in names and evaluate.score_captions
            got = _forward(functions, batches(source), len(source), name, bar, losses=in_split, captions=scores)
            bad = {row for rows in processes.gather(sorted(got.bad)) for row in rows}
            if bad:  # neither right nor wrong: they are left out of every figure, and counted
                metrics[f"{name}/bad"] = float(len(bad))
                table, got = table.without(bad), got.without(bad)
            shown = [table.rows[i] for i in spread(len(table.rows), evaluate.captions if is_first else 0)]
            if spec in names and encodes:
                texts = encode(table.texts)
                found = retrieval.recall(got.features, texts, table.image_to_text)
                metrics |= {f"{name}/images": float(len(table.rows)), f"{name}/texts": float(len(table.texts))}
                metrics |= _flat(found, name)
                if processes.index == 0:
                    queries += _queries(source, name, table, got.features, texts)
            if spec in names and functions.caption_loss is not None:
                metrics |= _flat(captioning.summary(got.nll, got.tokens), name)
            if scores and functions.generate is not None:
                asked = [row for row, texts in enumerate(table.captions) if texts]
                said = [tokenizer.decode(got.said[row].tolist()) for row in asked]
                scored, _ = caption_scores.scores(said, [table.captions[row] for row in asked])
                metrics |= _flat(scored, f"{name}/captions")
            if len(shown) and functions.generate is not None:
                new = _captions(functions.generate, source, name, shown, tokenizer, config)
                metrics[f"{name}/caption_exact_match"] = float(np.mean([caption.exact for caption in new]))
                captions += new
            if spec == evaluate.zero_shot and encodes:
                labelled = np.array([label != "" for label in table.labels])
                classes, labels = np.unique(np.array(table.labels)[labelled], return_inverse=True)
                if not len(classes):
                    raise ValueError(
                        f"config.evaluate.zero_shot={spec!r} has no labels: name a labelled source, or none"
                    )
                called = zero_shot.class_names(classes.tolist(), source.class_names)
                bar.total += sum(map(len, called)) * len(zero_shot.expand(evaluate.prompts))
                features = zero_shot.class_features(encode, called, evaluate.prompts)
                metrics |= _flat(zero_shot.classify(got.features[labelled], labels, features), "zero_shot")
                metrics |= {"zero_shot/classes": float(len(classes)), "zero_shot/images": float(labelled.sum())}
        if reference is not None and encodes:
            held_out = {name: sources[spec] for spec, name in names.items() if len(sources[spec]) <= pixels.LIMIT}
            if len(reference) > pixels.LIMIT or len(held_out) < len(names):
                text = "the pixel baseline is left out where a source has more than %d records"
                logging.log_first_n(logging.INFO, text, 1, pixels.LIMIT)
            held_out = held_out if len(reference) <= pixels.LIMIT else {}
            pixel: dict[str, Any] = {}
            if processes.index == 0:
                background = config.data.background
                pixel = pixels.baselines(
                    held_out, reference, reference_style, background=background, cache=cache, bar=bar
                )
            for name, measures in processes.gather(pixel)[0].items():
                metrics |= _flat(measures, f"{name}/pixel")
    return Results(metrics, tuple(queries), tuple(captions))


def spread(length: int, count: int) -> list[int]:
    """Up to `count` different rows of `length`, evenly spaced: a fixed choice that nobody made by looking."""
    return sorted({(2 * i + 1) * length // (2 * count) for i in range(count)})


@dataclasses.dataclass(frozen=True)
class _Table:
    """The text of a source: numbers, captions and labels of its records, and the distinct captions."""

    rows: list[int]
    captions: list[tuple[str, ...]]
    labels: list[str]
    texts: list[str]
    image_to_text: list[list[int]]

    @classmethod
    def read(cls, source: Source, processes: Processes) -> _Table:
        def text(row: int) -> tuple[tuple[str, ...], str]:
            try:
                record = source[row]
            except BadExample:  # the pass over the pictures finds it too, and leaves it out
                return (), ""
            return tuple(caption for caption in record.captions if caption.strip()), record.label

        rows = range(processes.index, len(source), processes.count)
        shares = processes.gather([text(row) for row in rows])
        records = [shares[i % processes.count][i // processes.count] for i in range(len(source))]
        captions, labels = [tuple(record[0]) for record in records], [record[1] for record in records]
        return cls(list(range(len(source))), captions, labels, *retrieval.unique_texts(captions))

    def without(self, rows: Collection[int]) -> _Table:
        kept = [i for i, row in enumerate(self.rows) if row not in rows]
        captions = [self.captions[i] for i in kept]
        unique = retrieval.unique_texts(captions)
        return _Table([self.rows[i] for i in kept], captions, [self.labels[i] for i in kept], *unique)


@dataclasses.dataclass
class _Forward:
    """What one pass over a source gave, by row of the source."""

    features: Array  # [m, d]
    nll: Array  # [m]
    tokens: Array  # [m]
    said: Array  # [m, t] ids of generated captions, where they are asked for
    bad: list[int]  # rows whose picture could not be used, of those that this process has read

    def without(self, rows: Collection[int]) -> _Forward:
        kept = [row for row in range(len(self.nll)) if row not in rows]
        return _Forward(self.features[kept], self.nll[kept], self.tokens[kept], self.said[kept], [])


def _forward(
    functions: Functions, batches: Iterable[Batch], length: int, name: str, bar: tqdm, *, losses: bool, captions: bool
) -> _Forward:
    got = _Forward(np.zeros((length, 0)), np.zeros(length), np.zeros(length, np.int64), np.zeros((length, 0)), [])
    covered = np.zeros(length, bool)
    for batch in batches:
        valid = batch["valid"]
        index = batch["index"][valid]
        if functions.encode_image is not None:
            features = np.asarray(functions.encode_image(batch["images"]))[valid]
            if not got.features.shape[1]:
                got.features = np.zeros((length, features.shape[1]), np.float32)
            got.features[index] = features
        if losses and functions.caption_loss is not None:
            nll, tokens = functions.caption_loss(batch["images"], batch["tokens"])
            got.nll[index], got.tokens[index] = np.asarray(nll)[valid], np.asarray(tokens)[valid]
        if captions and functions.generate is not None:
            said = np.asarray(functions.generate(batch["images"]))[valid]
            if not got.said.shape[1]:
                got.said = np.zeros((length, said.shape[1]), np.int64)
            got.said[index] = said
        got.bad += [row for row in batch["bad"].tolist() if row >= 0]
        covered[index] = True
        bar.update(len(index))
    if not covered.all():
        first = int(np.argmin(covered))
        raise ValueError(f"{name}: {length - covered.sum()} of {length} records are in no batch; the first is {first}")
    return got


def _queries(source: Source, name: str, table: _Table, images: Array, texts: Array) -> list[Query]:
    """The gallery of a split, both ways."""
    queries = []
    rows = spread(len(images), GALLERY)
    truth = [table.image_to_text[row] for row in rows]
    ranks, best = retrieval.ranks(images[rows], texts, truth), retrieval.top(images[rows], texts, SHOWN)
    for row, right, rank, answers in zip(rows, truth, ranks.tolist(), best.tolist(), strict=True):
        found = tuple(Answer(table.texts[a], a in right) for a in answers)
        text = " / ".join(table.captions[row])
        queries.append(Query(name, "image_to_text", text, found, rank, len(texts), source[table.rows[row]].image))
    text_to_image = retrieval.invert(table.image_to_text, len(texts))
    rows = spread(len(texts), GALLERY)
    truth = [text_to_image[row] for row in rows]
    ranks, best = retrieval.ranks(texts[rows], images, truth), retrieval.top(texts[rows], images, SHOWN)
    for row, right, rank, answers in zip(rows, truth, ranks.tolist(), best.tolist(), strict=True):
        found = tuple(Answer(" / ".join(table.captions[a]), a in right, source[table.rows[a]].image) for a in answers)
        queries.append(Query(name, "text_to_image", table.texts[row], found, rank, len(images)))
    return queries


def _captions(
    generate: Callable[[Array], Array],
    source: Source,
    name: str,
    rows: list[int],
    tokenizer: Tokenizer,
    config: Config,
) -> list[Caption]:
    # Few: every process reads them all.
    records, data = [source[row] for row in rows], config.data
    preprocessor = Preprocessor.from_config(config.model.image.size, data)
    images = preprocessor.pixels(record.image for record in records)
    texts = captioning.captions(generate, images, tokenizer, config.evaluate.batch_size)
    captions = []
    for record, text in zip(records, texts, strict=True):
        match = captioning.exact(text, record.captions, tokenizer, config.model.text.length)
        captions.append(Caption(name, text, record.captions, match, record.image))
    return captions


def _flat(measures: Mapping, prefix: str) -> dict[str, float]:
    """Nested measures as `prefix/outer/inner`."""
    flat: dict[str, float] = {}
    for name, value in measures.items():
        flat |= _flat(value, f"{prefix}/{name}") if isinstance(value, Mapping) else {f"{prefix}/{name}": value}
    return flat
