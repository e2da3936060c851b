"""The evaluators: each takes one source's pass (`Split`) and gives figures and pictures.

To add one: a function `Split -> Results`, what it needs of the pass over the pictures (`splits.PASSES`), when it is
wanted, and a line in EVALUATORS. Metrics are named in full, `NAME/...`, and go into results.json and the page's list of
all metrics as they are; `report` makes tables of those it knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from coca_jax.config import Config
from coca_jax.data.images import Preprocessor
from coca_jax.evaluate import caption_scores, captioning, classification, likelihood, retrieval, zero_shot
from coca_jax.evaluate.results import Answer, Caption, ClassScore, Functions, Query, Results
from coca_jax.evaluate.splits import Split, spread

GALLERY = 8  # queries a split and a direction, evenly spaced
SHOWN = 5  # answers a query


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A kind of measure.

    Attributes:
      wanted: (functions, config, spec of the source) -> whether it measures that source.
      needs: names in `splits.PASSES`.
      measure: what it does. Called by all processes alike; only process 0 need make galleries.
    """

    wanted: Callable[[Functions, Config, str], bool]
    needs: tuple[str, ...]
    measure: Callable[[Split], Results]


def flat(measures: Mapping, prefix: str) -> dict[str, float]:
    """Nested measures as `prefix/outer/inner`."""
    found: dict[str, float] = {}
    for name, value in measures.items():
        found |= flat(value, f"{prefix}/{name}") if isinstance(value, Mapping) else {f"{prefix}/{name}": value}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def _retrieval(split: Split) -> Results:
    name, table, images = split.name, split.table, split.rows["features"]
    texts = split.encode("texts", table.texts)
    found = retrieval.recall(images, texts, table.image_to_text, compare=split.functions.compare)
    counts = {"images": len(table.rows), "texts": len(table.texts), "same_texts": table.same_texts}
    metrics = {f"{name}/{key}": float(count) for key, count in counts.items()} | flat(found, name)
    return Results(metrics, () if split.processes.index else _queries(split, images, texts))


def _queries(split: Split, images: np.ndarray, texts: np.ndarray) -> tuple[Query, ...]:
    """The gallery of a split, both ways."""
    name, table, source = split.name, split.table, split.source
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
    return tuple(queries)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def _losses(split: Split) -> Results:
    return Results(flat(captioning.summary(split.rows["nll"], split.rows["tokens"]), split.name))


def _scores(split: Split) -> Results:
    """All pictures captioned, and scored as COCO does."""
    asked = [row for row, texts in enumerate(split.table.captions) if texts]
    said = [split.tokenizer.decode(split.rows["said"][row].tolist()) for row in asked]
    found, _ = caption_scores.scores(said, [split.table.captions[row] for row in asked])
    return Results(flat(found, f"{split.name}/captions"))


def _shown_captions(split: Split) -> Results:
    """Some captions for the report, of the first split."""
    table, config, tokenizer = split.table, split.config, split.tokenizer
    rows = [table.rows[i] for i in spread(len(table.rows), config.evaluate.captions if split.first else 0)]
    if not rows:
        return Results({})
    assert split.functions.generate is not None
    records = [split.source[row] for row in rows]  # few: every process reads them all
    preprocessor = Preprocessor.from_config(config.model.image.size, config.data)
    images = preprocessor.pixels(record.image for record in records)
    texts = captioning.captions(split.functions.generate, images, tokenizer, config.evaluate.batch_size)
    captions = tuple(
        Caption(
            split.name,
            text,
            record.captions,
            captioning.exact(text, record.captions, tokenizer, config.model.text.length),
            record.image,
        )
        for record, text in zip(records, texts, strict=True)
    )
    share = float(np.mean([caption.exact for caption in captions]))
    return Results({f"{split.name}/caption_exact_match": share}, captions=captions)


def _likelihood(split: Split) -> Results:
    """Some pictures' captions by log P(caption | picture): each against those of all of these pictures."""
    chosen = [row for row, texts in enumerate(split.table.captions) if texts]
    chosen = [chosen[i] for i in spread(len(chosen), split.config.evaluate.likelihood)]
    table = split.table.only(chosen)
    matrix = split.log_probs("likelihood-texts", chosen, table.texts)
    own = np.concatenate([matrix[row, right] for row, right in enumerate(table.image_to_text)]).astype(np.float64)
    measures = likelihood.recall(matrix, table.image_to_text)
    prefix = f"{split.name}/likelihood"
    counts = {"images": len(chosen), "texts": len(table.texts), "same_texts": table.same_texts}
    metrics = {f"{prefix}/{key}": float(count) for key, count in counts.items()}
    return Results(metrics | {f"{prefix}/log_prob": float(own.mean())} | flat(measures, prefix))


# ---------------------------------------------------------------------------------------------------------------------
# A task's classes


def _classes(split: Split) -> Results:
    """The trained classifier on the records that have a label."""
    numbers = {label: number for number, label in enumerate(split.functions.classes)}
    asked = [row for row, label in enumerate(split.table.labels) if label]
    if not asked:
        raise ValueError(f"config.evaluate.splits names {split.source.name!r}, which has no labels to compare with")
    right = np.array([numbers.get(split.table.labels[row], -1) for row in asked])
    found = classification.accuracy(split.rows["class_logits"][asked], right)
    prefix = f"{split.name}/classification"
    return Results(flat(found, prefix) | {f"{prefix}/records": float(len(asked))})


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification


def _zero_shot(split: Split) -> Results:
    """By the contrastive half, and where `evaluate.likelihood` asks for it on some of the pictures by the captions'."""
    evaluate, table = split.config.evaluate, split.table
    labelled = np.flatnonzero([label != "" for label in table.labels])
    if not len(labelled):
        spec = evaluate.zero_shot
        raise ValueError(f"config.evaluate.zero_shot={spec!r} has no labels: name a labelled source, or none")
    own = [table.labels[row] for row in labelled]
    classes, called, rows = zero_shot.candidates(own, split.source.class_names, split.keys, evaluate.prompts)
    labels = np.array([rows[label] for label in own])
    counts = {
        "classes": len(classes),
        "classes_without_images": len(classes) - len(set(labels.tolist())),
        "same_classes": len(rows) - len(classes),
        "images": len(labelled),
    }
    results = Results({f"zero_shot/{key}": float(count) for key, count in counts.items()})
    ranks: np.ndarray | None = None
    if split.functions.encode_image is not None and split.functions.encode_text is not None:
        split.bar.total += sum(map(len, called)) * len(zero_shot.expand(evaluate.prompts))
        features = zero_shot.class_features(lambda texts: split.encode("classes", texts), called, evaluate.prompts)
        pictures = split.rows["features"][labelled]
        ranks = retrieval.ranks(pictures, features, labels[:, None].tolist(), compare=split.functions.compare)
        each = tuple(
            ClassScore(label, names, *zero_shot.of_class(ranks[labels == at], len(classes)))
            for at, (label, names) in enumerate(zip(classes, called, strict=True))
            if (labels == at).any()
        )
        results += Results(flat(zero_shot.accuracy(ranks, labels, len(classes)), "zero_shot"), classes=each)
        if not split.processes.index:
            results += Results({}, _classified(split, labelled, labels, called, pictures, features))
    if evaluate.likelihood and split.functions.log_probs is not None:
        some = np.array(spread(len(labelled), evaluate.likelihood))
        prompt = zero_shot.expand(evaluate.prompts)[0]
        texts = [prompt.replace("{}", name) for names in called for name in names]
        matrix = split.log_probs("likelihood-classes", labelled[some].tolist(), texts)
        truth = labels[some][:, None].tolist()
        by = {"likelihood": matrix, "likelihood_pmi": likelihood.pmi(matrix)}
        for name, scores in by.items():
            found = retrieval.ranks_of(likelihood.of_classes(scores, [len(names) for names in called]), truth)
            results += Results(flat(zero_shot.accuracy(found, labels[some], len(classes)), f"zero_shot/{name}"))
        results += Results({"zero_shot/likelihood/images": float(len(some))})
        if ranks is not None:  # of the same pictures, to compare with
            same = zero_shot.accuracy(ranks[some], labels[some], len(classes))
            results += Results(flat(same, "zero_shot/likelihood_contrastive"))
    return results


def _classified(
    split: Split,
    labelled: np.ndarray,
    labels: np.ndarray,
    called: list[tuple[str, ...]],
    pictures: np.ndarray,
    features: np.ndarray,
) -> tuple[Query, ...]:
    """Pictures with their likeliest classes."""
    shown = spread(len(labelled), 2 * GALLERY)
    ranks = retrieval.ranks(pictures[shown], features, labels[shown][:, None].tolist())
    best = retrieval.top(pictures[shown], features, SHOWN)
    queries = []
    for at, rank, answers in zip(shown, ranks.tolist(), best.tolist(), strict=True):
        found = tuple(Answer(called[a][0], a == labels[at]) for a in answers)
        picture = split.source[split.table.rows[labelled[at]]].image
        queries.append(Query("zero_shot", "zero_shot", called[labels[at]][0], found, rank, len(called), picture))
    return tuple(queries)


# ---------------------------------------------------------------------------------------------------------------------


def _encodes(functions: Functions) -> bool:
    return functions.encode_image is not None and functions.encode_text is not None


EVALUATORS: tuple[Evaluator, ...] = (
    Evaluator(lambda f, c, spec: spec in c.evaluate.splits and f.classify is not None, ("classes",), _classes),
    Evaluator(lambda f, c, spec: spec in c.evaluate.splits and _encodes(f), ("features",), _retrieval),
    Evaluator(lambda f, c, spec: spec in c.evaluate.splits and f.caption_loss is not None, ("losses",), _losses),
    Evaluator(
        lambda f, c, spec: spec in c.evaluate.splits and c.evaluate.score_captions and f.generate is not None,
        ("said",),
        _scores,
    ),
    Evaluator(lambda f, c, spec: spec in c.evaluate.splits and f.generate is not None, (), _shown_captions),
    Evaluator(
        lambda f, c, spec: spec in c.evaluate.splits and c.evaluate.likelihood > 0 and f.log_probs is not None,
        (),
        _likelihood,
    ),
    Evaluator(
        lambda f, c, spec: spec == c.evaluate.zero_shot and _encodes(f),
        ("features",),
        _zero_shot,
    ),
    # A captioner alone classifies by what it would say.
    Evaluator(
        lambda f, c, spec: (
            spec == c.evaluate.zero_shot and not _encodes(f) and c.evaluate.likelihood > 0 and f.log_probs is not None
        ),
        (),
        _zero_shot,
    ),
)
