"""report.html: one self-contained page that shows what a run learned."""

from __future__ import annotations

import base64
import datetime
import functools
import io
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import markupsafe
from etils import epath
from PIL import Image

from coca_jax import config as config_lib
from coca_jax.data import addresses, images, side_files
from coca_jax.evaluate import curves, suite, tables, template
from coca_jax.evaluate import notes as figure_notes
from coca_jax.evaluate.figures import ABSENT, duration, million, percent, plain

REPORT_FILE = "report.html"

_THUMBNAIL = 96  # pixels
_CAPTIONS = 96  # shown at most, so that the page stays a few MB


def write(
    workdir: epath.PathLike,
    config: config_lib.Config,
    results: suite.Results | None = None,
    *,
    parameters: int | None = None,
    machine: str = "",
    seconds: float | None = None,
    date: datetime.datetime | None = None,
    attribution: str = "",
) -> epath.Path:
    """Writes `report.html` into the workdir, from the results and from `metrics.jsonl` beside it.

    Args:
      workdir: of the run; a bucket works.
      config: of the run.
      results: of `suite.run`; None takes the newest measures in metrics.jsonl and leaves the galleries out.
      parameters: how many the model has.
      machine: what it ran on; empty: this machine.
      seconds: wall time of the training.
      date: when it ended; None: now.
      attribution: licences and authors of the pictures, plain text.

    Returns:
      The path of the page.
    """
    workdir = addresses.path(workdir)
    history = curves.read(workdir / "metrics.jsonl")
    results = results or suite.Results({})
    metrics = history.last() | results.metrics
    when = (date or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%d %H:%M %Z").strip()
    splits = [
        name
        for name in suite.split_names(config.evaluate.splits).values()
        if any(f"{name}/{key}" in metrics for key in ("image_to_text/r1", "caption_loss"))
    ]
    last_step = max((int(steps[-1]) for steps, _ in history.series.values()), default=None)
    thumbnail = functools.lru_cache(maxsize=4096)(functools.partial(_thumbnail, background=config.data.background))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_printable
    )
    page = environment.from_string(template.TEMPLATE.lstrip()).render(
        title=f"CoCa: {workdir.name or 'run'}",
        style=markupsafe.Markup(template.STYLE),
        subtitle=f"Image-text pretraining on {config.data.train or 'unnamed data'}, finished {when}.",
        notes=_notes(history, metrics),
        tiles=_tiles(metrics, splits),
        facts=_facts(config, last_step, parameters, machine or this_machine(), when, seconds),
        charts=curves.charts(history, splits),
        recall=[tables.recall(metrics, name) for name in splits if f"{name}/image_to_text/r1" in metrics],
        has_pixels=any(f"{name}/pixel/image_to_text/r1" in metrics for name in splits),
        tables=tables.others(metrics, config, splits),
        classes=tables.classes(results.classes),
        gallery=_gallery(results.queries, thumbnail),
        captions=_captions(results.captions, thumbnail),
        metrics=[(name, plain(value)) for name, value in sorted(metrics.items())],
        config=config_lib.to_json(config),
        attribution=attribution,
        date=when,
    )
    path = workdir / REPORT_FILE
    workdir.mkdir(parents=True, exist_ok=True)
    side_files.write_text(path, page)  # a page that is there is whole
    return path


def _printable(value: Any) -> Any:
    """Text without what HTML does not allow: control characters and halves of surrogate pairs."""
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", value)
    return value


def this_machine() -> str:
    """The devices, processors and versions of this process, in one line."""
    kind = jax.devices()[0].device_kind
    return (
        f"{jax.device_count()} x {kind}, {os.cpu_count()} processor cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, JAX {jax.__version__}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page


def _notes(history: curves.History, metrics: Mapping[str, float]) -> list[str]:
    notes = []
    bad = [name for name in ("loss", "loss/contrastive", "loss/captioning") if not math.isfinite(metrics.get(name, 0))]
    if bad:
        notes.append(f"The newest value of {', '.join(bad)} is not finite: training has diverged.")
    if history.unreadable:
        notes.append(
            f"Lines of metrics.jsonl that cannot be read, as a run that was killed leaves them: {history.unreadable}."
        )
    if not history.series:
        notes.append("metrics.jsonl has no entries yet, so there are no curves.")
    return notes + [f"{note}." for note in figure_notes.of_metrics(metrics)]


def _tiles(metrics: Mapping[str, float], splits: Sequence[str]) -> list[dict[str, str]]:
    tiles = []
    for name in splits[:1]:
        for direction, title in zip(tables.DIRECTIONS, ("Image to text", "Text to image"), strict=True):
            if f"{name}/{direction}/r1" in metrics:
                pixel = metrics.get(f"{name}/pixel/{direction}/r1")
                beside = f"nearest pixels {percent(pixel)}, " if pixel is not None else ""
                beside += f"chance {percent(metrics.get(f'{name}/chance/r1'))}"
                value = percent(metrics[f"{name}/{direction}/r1"])
                tiles.append({"name": f"{title}, R@1 ({name})", "value": value, "beside": beside})
    if "zero_shot/top1" in metrics:
        beside = f"chance {percent(metrics.get('zero_shot/chance/top1'))}"
        if "zero_shot/classes" in metrics:
            beside = f"{plain(metrics['zero_shot/classes'])} classes, {beside}"
        tiles.append({"name": "Zero-shot, top 1", "value": percent(metrics["zero_shot/top1"]), "beside": beside})
    for name in splits[:1]:
        if f"{name}/perplexity" in metrics:
            beside = f"loss {plain(metrics.get(f'{name}/caption_loss'))} nats a token"
            value = plain(metrics[f"{name}/perplexity"])
            tiles.append({"name": f"Caption perplexity ({name})", "value": value, "beside": beside})
    return tiles


def _objective(loss: config_lib.Loss) -> str:
    text = f"{loss.lambda_con:g} x contrastive + {loss.lambda_cap:g} x captioning"
    text += f" + {loss.lambda_match:g} x matching" if loss.lambda_match else ""
    return text + (f" + {loss.lambda_cls:g} x classification" if loss.lambda_cls else "")


def _facts(
    config: config_lib.Config,
    step: int | None,
    parameters: int | None,
    machine: str,
    when: str,
    seconds: float | None,
) -> list[tuple[str, str]]:
    image, text, pooler = config.model.image, config.model.text, config.model.pooler
    optimizer, loss = config.optimizer, config.loss
    done = f"{step:,} of {config.steps:,}" if step is not None else f"{config.steps:,} planned"
    facts = [
        ("Image", f"ViT, {image.depth} layers of width {image.width}, {image.size} px in patches of {image.patch}"),
        ("Text", f"{text.n_uni} unimodal + {text.n_multi} multimodal layers of width {text.width}"),
        ("Poolers", f"{pooler.kind}, {pooler.queries} queries; {config.model.embed_dim} shared dimensions"),
        ("Objective", _objective(loss)),
        ("Steps", f"{done}, batch {config.batch_size:,}"),
        ("Optimiser", f"{optimizer.name}, peak rate {optimizer.peak_lr:g}, {optimizer.schedule} decay"),
        ("Precision", f"{config.model.dtype} compute, {config.model.param_dtype} parameters; seed {config.seed}"),
        ("Data", config.data.train or ABSENT),
        ("Parameters", million(parameters) if parameters is not None else ABSENT),
        ("Machine", machine),
        ("Finished", when),
        ("Wall time", duration(seconds) if seconds is not None else ABSENT),
    ]
    return facts


def _gallery(queries: Sequence[suite.Query], thumbnail: Any) -> list[dict[str, Any]]:
    splits: dict[str, dict[str, Any]] = {}
    for query in queries:
        title = "Zero-shot classification" if query.direction == "zero_shot" else query.split
        split = splits.setdefault(title, {"name": title, "images": [], "texts": [], "what": "texts"})
        if query.direction == "zero_shot":
            split["what"] = "classes"
        answers = [
            {"text": answer.text, "right": answer.right, "picture": answer.picture and thumbnail(answer.picture)}
            for answer in query.answers
        ]
        found = any(answer.right for answer in query.answers)
        rank = min(query.rank, query.candidates)
        split["texts" if query.direction == "text_to_image" else "images"].append(
            {
                "text": query.text,
                "picture": query.picture and thumbnail(query.picture),
                "answers": answers,
                "found": found,
                "rank": f"Right answer at rank {rank:,} of {query.candidates:,}",
            }
        )
    return list(splits.values())


def _captions(captions: Sequence[suite.Caption], thumbnail: Any) -> dict[str, Any] | None:
    if not captions:
        return None
    shown = [
        {
            "text": caption.text,
            "reference": " / ".join(caption.references),
            "exact": caption.exact,
            "picture": thumbnail(caption.picture),
        }
        for caption in captions[:_CAPTIONS]
    ]
    right = sum(caption.exact for caption in captions)
    text = (
        f"{captions[0].split}: {len(captions):,} pictures evenly spaced through the split, not chosen by their result; "
        f"{right:,} captions are the reference word for word (green, ticked)."
    )
    if len(captions) > len(shown):
        text += f" The first {len(shown)} are shown."
    return {"text": text, "shown": shown}


def _thumbnail(encoded: bytes, background: tuple[int, int, int]) -> str:
    """A small PNG as a data URI; empty where the picture cannot be decoded, which the page then says."""
    try:
        picture = Image.fromarray(images.decode(encoded, background))
    except (ValueError, OSError):
        return ""
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    picture.quantize(128).save(out, "png", optimize=True)  # a palette: a third of the bytes, no visible difference
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
