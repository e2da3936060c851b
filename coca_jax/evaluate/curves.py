"""Curves of a run: metrics.jsonl read leniently, and drawn as SVG that takes its colours from the page."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np
from etils import epath

from coca_jax.data import addresses, side_files

# Drawn in colours that occur nowhere else, which become CSS variables of the page: light and dark from one drawing.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#070801", "#070802", "#070803", "#070804", "#070805", "#070806")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  # told apart without colour, too
_POINTS = 400  # drawn of a curve; more are averaged in bins

Series = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclasses.dataclass(frozen=True)
class History:
    """What metrics.jsonl holds.

    Attributes:
      series: by metric name, steps ascending and values (NaN and infinities included).
      unreadable: lines that were not JSON objects with a step, e.g. the last one of a run that was killed.
    """

    series: dict[str, Series]
    unreadable: int = 0

    def last(self) -> dict[str, float]:
        """The newest value of each metric."""
        return {name: float(values[-1]) for name, (_, values) in self.series.items()}


def read(path: epath.PathLike) -> History:
    """Reads metrics.jsonl: one JSON object a line, with `step` and numbers. No file is an empty history.

    A run that was resumed may have logged a step twice: the later line counts.
    """
    points: dict[str, dict[int, float]] = {}
    try:
        lines = side_files.read_lines(addresses.path(path), _with_step)
    except side_files.Unreadable:
        lines = side_files.Lines(bad=1)
    for entry in lines.objects:
        step = int(entry["step"])
        for name, value in entry.items():
            if value is None:
                value = math.nan  # how writers that keep to the JSON standard say it
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, {})[step] = _float(value)
    series = {}
    for name, found in points.items():
        steps = sorted(found)
        series[name] = (np.array(steps), np.array([found[step] for step in steps]))
    return History(series, lines.bad + lines.half)


def _with_step(entry: dict[str, Any]) -> dict[str, Any] | None:
    step = entry.get("step")
    return entry if isinstance(step, int) or (isinstance(step, float) and math.isfinite(step)) else None


def chart(number: int, label: str, unit: str, series: Mapping[str, Series]) -> str:
    """One line chart over the steps as an `<svg>` element.

    Args:
      number: of the chart in the page; makes its element ids unique.
      label: what a screen reader says, plain text.
      unit: label of the y axis.
      series: curves by legend name; values that are not finite are gaps.
    """
    import matplotlib  # as long as all else that a run imports: for the report at its end
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "coca_jax",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.parse_math": False,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (steps, values)) in enumerate(series.items()):
            x, y = thin(steps, values)
            marker = "o" if len(x) <= 20 else ""
            color, dash = _SERIES[i % len(_SERIES)], _DASHES[i % len(_DASHES)]
            axes.plot(
                x, y, color=color, linestyle=dash, linewidth=1.8, label=_legend(name), marker=marker, markersize=3.5
            )
        if unit not in ("loss", "nats a token"):
            axes.set_ylim(bottom=0)  # of shares, rates and norms a small change must look small
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", linewidth=0.7)
        axes.tick_params(length=0, pad=6)
        axes.legend(frameon=False, loc="best", handlelength=2.6)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(out.getvalue(), number, label)


def charts(history: History, splits: Sequence[str]) -> list[dict[str, str]]:
    """Every chart for which something was logged: `{"title", "text", "svg"}`, the SVG being markup that is safe.

    Args:
      history: of the run.
      splits: prefixes of the held-out measures.
    """
    recall = {name: f"{name}/image_to_text/r1" for name in splits}
    captioning = {"training": "loss/captioning"} | {name: f"{name}/caption_loss" for name in splits}
    ways = {way.replace("_", " "): f"accuracy/{way}" for way in ("image_to_text", "text_to_image")}
    wanted = [
        ("Loss", "loss", {name: name for name in ("loss", "loss/contrastive", "loss/captioning")}),
        ("Contrastive accuracy in the batch", "share right", ways),
        ("Held-out image to text, R@1", "share right", recall),
        ("Captioning loss", "nats a token", captioning),
        ("Gradient norm", "global norm", {"gradient norm": "gradient_norm"}),
        ("Throughput", "examples a second", {"examples a second": "examples_per_second"}),
    ]
    found: list[dict[str, str]] = []
    for title, unit, names in wanted:
        series = {label: history.series[name] for label, name in names.items() if name in history.series}
        # One evaluation at the end is a figure in the tables, not a curve; nor is the training loss drawn twice.
        if title.startswith(("Held-out", "Captioning")):
            lines = [line for label, line in series.items() if label != "training" and len(line[0]) > 1]
            series = series if lines else {}
        if any(np.isfinite(values).any() for _, values in series.values()):
            text = "; ".join(f"{label} {_ends(values)}" for label, (_, values) in series.items()) + "."
            svg = chart(len(found) + 1, f"{title} over the steps: {text}", unit, series)
            found.append({"title": title, "text": text, "svg": markupsafe.Markup(svg)})
    return found


def thin(steps: np.ndarray, values: np.ndarray, points: int = _POINTS) -> Series:
    """At most `points` points of a curve, each the mean of the finite values of its bin; NaN where there is none."""
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    if len(steps) <= points:
        return steps, values
    bins = np.arange(len(steps)) * points // len(steps)
    counts = np.bincount(bins, finite)
    with np.errstate(invalid="ignore"):
        means = np.bincount(bins, np.where(finite, values, 0.0)) / np.where(counts, counts, np.nan)
    return np.bincount(bins, steps) / np.bincount(bins), means


def _ends(values: np.ndarray) -> str:
    """From where to where a curve went, and how much of it was not finite."""
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    text = f"{finite[0]:.3g} to {finite[-1]:.3g}" if len(finite) else "never finite"
    return text + (f" ({lost} of {len(values)} not finite)" if lost and len(finite) else "")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond float64
        return math.inf


def _legend(name: str) -> str:
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name  # matplotlib hides names that start with _


def _inline(svg: str, number: int, label: str) -> str:
    """A matplotlib SVG file as an element of an HTML page: no prolog, no namespaces, unique ids, the page's colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    opening, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    prefix = f"chart{number}-"
    rest = re.sub(r'\bid="', f'id="{prefix}', rest)
    rest = rest.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}").replace("xlink:href", "href")
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)  # it would hold for the whole page
    rest = re.sub(r"font-family: [^;\"]*; ", "", rest)  # the page's own font
    for i, color in enumerate((_INK, _GRID, *_SERIES)):
        rest = rest.replace(color, f"var({('--ink-soft', '--grid')[i] if i < 2 else f'--series-{i - 1}'})")
    name = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg {view.group(0) if view else ""} role="img" aria-label="{name}">{rest}'
