"""What a person reads about a data set: a manifest or a description as lines of text."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any

from coca_jax.config import printing
from coca_jax.data.records import REASONS

_WIDTH = 24  # of the first column
_LISTED = 10  # formats, labels, styles
_COLUMNS = ("mean", "min", "p5", "p50", "p95", "p99", "max")


def statistics(summary: Mapping[str, Any]) -> list[str]:
    """Lines about what Statistics.summary counted (with captions.tokens where tokens were)."""
    captions, pictures = summary["captions"], summary["pictures"]
    lines = ["", f"{'':<{_WIDTH}}" + "".join(f"{name:>9}" for name in _COLUMNS)]
    rows = {
        "width, pixels": pictures["width"],
        "height, pixels": pictures["height"],
        "picture, KiB": pictures["kibibytes"],
        "captions per record": captions["per_record"],
        "caption, characters": captions["characters"],
    }
    tokens = captions.get("tokens")
    if tokens:
        rows["caption, tokens"] = tokens["tokens"]
    lines += [f"  {name:<{_WIDTH - 2}}" + _row(values) for name, values in rows.items() if values]
    lines += ["", _line("captions", captions["number"])]
    if captions["blank_left_out"]:
        lines.append(_line("blank captions", f"{captions['blank_left_out']} left out"))
    if tokens:
        share = f"{tokens['truncated']:.2%} of captions are longer"
        seen = f"of {tokens['captions']} captions, {tokens['characters_per_token']} characters each"
        lines += [_line("tokens", seen), _line(f"cut at {tokens['length']} tokens", share)]
        lines.append(_line("normalization", tokens["normalization"]))
    lines.append(_line("formats", _listed(pictures["formats"])))
    if pictures["resized"]:
        lines.append(_line("resized", pictures["resized"]))
    for what in ("labels", "styles"):
        if summary[what]["number"]:
            lines.append(_line(what, f"{summary[what]['number']}: {_listed(summary[what]['most_common'])}"))
    return lines


def dropped(counts: Mapping[str, int]) -> list[str]:
    """Lines about records that cannot be used, by reason."""
    return [f"  {count:>9}  {reason}: {REASONS[reason]}" for reason, count in counts.items()]


def converted(folder: object, manifest: Mapping[str, Any]) -> str:
    """A page about a converted set."""
    shards = {name: file for name, file in manifest["files"].items() if "records" in file}
    size = sum(file["bytes"] for file in shards.values())
    settings = manifest["settings"]
    lines = [
        f"{folder}: {_many(manifest['records'], 'record')} in {_many(len(shards), 'shard')}, {bytes_text(size)}",
        f"from {settings['source']}, {_many(settings['records'], 'record')}",
        *statistics(manifest),
    ]
    if manifest["dropped"]:
        lines += ["", f"left out ({folder}/dropped.jsonl says which)", *dropped(manifest["dropped"])]
    double = manifest["duplicate_keys"]
    if double["number"]:
        keys = ", ".join(map(repr, double["examples"][:3]))
        lines += ["", f"{_many(double['number'], 'key')} of a record before, e.g. {keys}; both are kept"]
    lines += ["", f"read it as array_record:{glob.escape(str(folder))}/*.array_record"]
    if settings["vocab_size"]:
        lines.append(f"with data.tokenizer={folder}/tokenizer.model, {manifest['vocab_size']} pieces")
    return "\n".join(lines)


def bytes_text(size: float) -> str:
    """12.3 MiB and the like."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def one_line(text: str, limit: int = 200) -> str:
    """A text out of the data, which may hold anything, for a terminal."""
    return printing.one_line(text, limit)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _line(name: str, value: object) -> str:
    return f"  {name:<{_WIDTH - 2}} {value}"


def _row(values: Mapping[str, float]) -> str:
    return "".join(f"{values[name]:>9g}" if name != "mean" else f"{values[name]:>9.1f}" for name in _COLUMNS)


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{one_line(str(name), 30)} {count}" for name, count in list(counts.items())[:_LISTED]]
    return ", ".join([*shown, "..."] if len(counts) > _LISTED else shown)
