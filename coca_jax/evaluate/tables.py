"""Measures as tables: for the terminal, and for report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax import config as config_lib
from coca_jax.evaluate import notes, retrieval, suite
from coca_jax.evaluate.figures import ABSENT, percent, plain

DIRECTIONS = ("image_to_text", "text_to_image")
_LIKELIHOOD = (  # ways of ranking by likelihood, and what they are called
    ("image_to_text", "image to text, log P(text | image)"),
    ("image_to_text_pmi", "image to text, log P(text | image) - log P(text)"),
    ("text_to_image", "text to image, log P(text | image)"),
)
_CLASSIFIERS = (  # of zero-shot classification
    ("zero_shot", "CoCa, contrastive"),
    ("zero_shot/likelihood_contrastive", "contrastive, the pictures below"),
    ("zero_shot/likelihood", "caption likelihood, log P(prompt | image)"),
    ("zero_shot/likelihood_pmi", "caption likelihood, less log P(prompt)"),
)
_SCORES = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")


def summary(c: config_lib.Config, metrics: Mapping[str, float]) -> list[str]:
    """What an evaluation found, for the terminal: lines."""
    lines = []

    def recalls(name: str, way: str, who: str, path: str) -> None:
        if f"{path}r1" in metrics:
            found = "  ".join(f"R@{k} {metrics[f'{path}r{k}']:.4f}" for k in (1, 5, 10))
            lines.append(f"{name:14} {way:13} {who:14} {found}  median rank {metrics[f'{path}median_rank']:g}")

    for name in suite.split_names(c.evaluate.splits).values():
        for direction in DIRECTIONS:
            for kind in ("", "pixel/", "chance/"):
                path = f"{name}/{kind}" + ("" if kind == "chance/" else f"{direction}/")
                recalls(name, direction, {"": "model", "pixel/": "nearest pixels", "chance/": "chance"}[kind], path)
        for way, _ in _LIKELIHOOD:
            who = "pmi" if way.endswith("_pmi") else "likelihood"
            recalls(name, way.removesuffix("_pmi"), who, f"{name}/likelihood/{way}/")
        if f"{name}/likelihood/log_prob" in metrics:
            recalls(name, "likelihood", "chance", f"{name}/likelihood/chance/")
            value, count = (metrics[f"{name}/likelihood/{key}"] for key in ("log_prob", "images"))
            lines.append(f"{name:14} log P(caption | image) {value:.3f} nats, of {count:g} pictures")
        if f"{name}/captions/cider" in metrics:
            scores = "  ".join(f"{key} {metrics[f'{name}/captions/{key}']:.4f}" for key in _SCORES)
            lines.append(f"{name:14} captions      {scores}")
        if f"{name}/classification/top1" in metrics:
            kinds = ("top1", "top5", "largest_class", "chance/top1")
            top1, top5, largest, chance = (f"{metrics[f'{name}/classification/{kind}']:.4f}" for kind in kinds)
            what = f"top-1 {top1}, top-5 {top5}, always the largest class {largest}, chance {chance}"
            if unknown := metrics.get(f"{name}/classification/unknown"):
                what += f"; {unknown:g} of {metrics[f'{name}/classification/records']:g} records have an unknown class"
            lines.append(f"{name:14} classes       {what}")
        if f"{name}/caption_loss" in metrics:
            loss, perplexity = metrics[f"{name}/caption_loss"], metrics[f"{name}/perplexity"]
            lines.append(f"{name:14} captioning loss {loss:.3f}, perplexity {perplexity:.2f}")
    for path, title in _CLASSIFIERS:
        if f"{path}/top1" in metrics:
            kinds = ("top1", "top5", "mean_per_class", "chance/top1")
            top1, top5, mean, chance = (f"{metrics[f'{path}/{kind}']:.4f}" for kind in kinds)
            who = "" if path == "zero_shot" else f"{title}: "
            lines.append(f"zero-shot      {who}top-1 {top1}, top-5 {top5}, mean of classes {mean}, chance {chance}")
    return lines + [f"note: {note}" for note in notes.of_metrics(metrics)]


def recall(metrics: Mapping[str, float], name: str) -> dict[str, Any]:
    """A split's part of the table of retrieval."""
    rows = []
    for title, prefix in (("CoCa", name), ("Nearest pixels", f"{name}/pixel"), ("Chance", f"{name}/chance")):
        cells = []
        for direction, candidates in zip(DIRECTIONS, ("texts", "images"), strict=True):
            where = prefix if title == "Chance" else f"{prefix}/{direction}"
            for k in retrieval.KS:
                value = metrics.get(f"{where}/r{k}")
                cells.append({"text": percent(value), "share": _share(value)})
            median, most = metrics.get(f"{where}/median_rank"), metrics.get(f"{name}/{candidates}", math.inf)
            # Beyond the last candidate: most queries have no answer that could be right.
            text = f"> {plain(most)}" if median is not None and median > most else plain(median)
            cells.append({"text": text, "share": ""})
        if title != "Nearest pixels" or f"{prefix}/image_to_text/r1" in metrics:
            rows.append({"name": title, "cells": cells})
    sizes = [metrics.get(f"{name}/{what}") for what in ("images", "texts")]
    return {"name": name, "size": f"{plain(sizes[0])} images, {plain(sizes[1])} texts", "rows": rows}


def others(metrics: Mapping[str, float], config: config_lib.Config, splits: Sequence[str]) -> list[dict[str, Any]]:
    """The tables below that of retrieval: those of which there are figures."""
    tables = (_classification(metrics, splits), _likelihood(metrics, splits))
    return [*tables[0], *tables[1], *_zero_shot(metrics, config), *_captioning(metrics, splits)]


def classes(scores: Sequence[suite.ClassScore]) -> list[dict[str, Any]]:
    """Rows of the table of classes, the worst first."""
    return [
        {
            "label": one.label,
            "names": ", ".join(one.names),
            "pictures": plain(one.pictures),
            "cells": [{"text": percent(value), "share": _share(value)} for value in (one.top1, one.top5)],
        }
        for one in sorted(scores, key=lambda one: (one.top1, one.top5, one.label))
    ]


def _share(value: float | None) -> str:
    """How much of a cell is filled."""
    return f"{100 * value:.1f}%" if value is not None and math.isfinite(value) else ""


def _table(title: str, text: str, head: list[str], rows: list[dict[str, Any]], examples: Sequence[str] = ()) -> Any:
    return [{"title": title, "text": text, "examples": examples, "head": head, "rows": rows}] if rows else []


def _classification(metrics: Mapping[str, float], splits: Sequence[str]) -> Any:
    kinds = ("top1", "top5", "mean_per_class", "largest_class", "chance/top1")
    rows = [
        {
            "name": name,
            "cells": [plain(metrics.get(f"{name}/classification/{count}")) for count in ("records", "unknown")]
            + [percent(metrics.get(f"{name}/classification/{kind}")) for kind in kinds],
            "soft": False,
        }
        for name in splits
        if f"{name}/classification/top1" in metrics
    ]
    text = (
        "The trained classifier on labelled records; a class that it does not know is always wrong, and not in the "
        "mean over classes. Beside it, answering always with the largest class, and chance."
    )
    head = ["split", "records", "of an unknown class"]
    head += ["top 1", "top 5", "top 1, mean over classes", "largest class", "chance"]
    return _table("Classification", text, head, rows)


def _likelihood(metrics: Mapping[str, float], splits: Sequence[str]) -> Any:
    rows = []
    for name in splits:
        prefix = f"{name}/likelihood"
        for way, title in (*_LIKELIHOOD, ("chance", "chance")):
            if f"{prefix}/{way}/r1" in metrics:
                cells = [percent(metrics[f"{prefix}/{way}/r{k}"]) for k in retrieval.KS]
                median = plain(metrics[f"{prefix}/{way}/median_rank"])
                sizes = f"{plain(metrics.get(f'{prefix}/images'))} x {plain(metrics.get(f'{prefix}/texts'))}"
                rows.append({"name": f"{name}: {title}", "cells": [*cells, median, sizes], "soft": way == "chance"})
    text = (
        "What the captioning half alone finds: every text is scored for every picture by log P(text | image). P(text) "
        "is the mean over these pictures; without it, short and common texts come first."
    )
    return _table("Retrieval by caption likelihood", text, ["", "R@1", "R@5", "R@10", "median", "images x texts"], rows)


def _zero_shot(metrics: Mapping[str, float], config: config_lib.Config) -> Any:
    get = metrics.get
    kinds = ("top1", "top5", "mean_per_class")
    rows = [
        {
            "name": title,
            "cells": [*(percent(get(f"{path}/{kind}")) for kind in kinds), plain(get(f"{path}/images") or some)],
            "soft": path == "zero_shot/likelihood_contrastive",
        }
        for path, title in _CLASSIFIERS
        if f"{path}/top1" in metrics
        for some in [get("zero_shot/likelihood/images")]
    ]
    if not rows:
        return []
    first = next(path for path, _ in _CLASSIFIERS if f"{path}/top1" in metrics)
    top1, top5 = get(f"{first}/chance/top1"), get(f"{first}/chance/top5")
    largest = percent(get(f"{first}/largest_class"))
    rows += [
        {"name": "Chance", "cells": [percent(top1), percent(top5), percent(top1), ABSENT], "soft": True},
        {"name": "Always the largest class", "cells": [largest, ABSENT, percent(top1), ABSENT], "soft": True},
    ]
    text = (
        f"{plain(get('zero_shot/images'))} pictures into {plain(get('zero_shot/classes'))} classes. No classifier is "
        "trained: a class is the mean text feature of its prompts, or as likely as the first prompt with its name is "
        "as a caption. Prompts:"
    )
    head = ["", "top 1", "top 5", "top 1, mean over classes", "pictures"]
    return _table("Zero-shot classification", text, head, rows, config.evaluate.prompts)


def _captioning(metrics: Mapping[str, float], splits: Sequence[str]) -> Any:
    rows = [
        {
            "name": name,
            "cells": [plain(metrics.get(f"{name}/{key}")) for key in ("caption_loss", "perplexity")]
            + [percent(metrics.get(f"{name}/caption_exact_match"))],
            "soft": False,
        }
        for name in splits
        if f"{name}/caption_loss" in metrics
    ]
    text = (
        "Loss of the reference captions, every token counting the same. Exact: the share of generated captions that "
        "are a reference word for word."
    )
    scored = [
        {"name": name, "cells": [percent(metrics.get(f"{name}/captions/{key}")) for key in _SCORES], "soft": False}
        for name in splits
        if f"{name}/captions/cider" in metrics
    ]
    about = (
        "A greedy caption of every picture against its references, as the COCO evaluation computes it, times 100 as "
        "papers print it."
    )
    return [
        *_table("Captioning", text, ["split", "loss, nats a token", "perplexity", "exact captions"], rows),
        *_table(
            "Caption scores",
            about,
            ["split", "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"],
            scored,
        ),
    ]
