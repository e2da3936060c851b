"""The command `emoji`: prepares the built-in set, or describes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coca_jax.data import emoji


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the others."""
    text = "the built-in set: emoji of three designers with their Unicode names; needs pip install 'coca_jax[emoji]'"
    parser = commands.add_parser("emoji", help=text, description=text)
    parser.add_argument(
        "--out", type=Path, help="folder of the set (default: $COCA_JAX_CACHE/emoji, or ~/.cache/coca_jax/emoji)"
    )
    parser.add_argument("--force", action="store_true", help="prepare again even if it is there")
    parser.add_argument(
        "--describe", action="store_true", help="only check the files (checksums too) and say what is there"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    folder = options.out or emoji.default_folder()
    manifest = emoji.verify(folder, checksums=True) if options.describe else emoji.prepare(folder, force=options.force)
    return describe(folder, manifest)


def describe(folder: Path, manifest: dict[str, Any]) -> str:
    """A page about a prepared set: where it is, its splits, whose pictures it holds, what was left out."""
    lines = [f"{folder} (format {manifest['format_version']})", "", "split          pictures"]
    lines += [f"  {name:<12} {part['count']:>8}  {part['file']}" for name, part in manifest["splits"].items()]
    lines += ["", "designer       pictures  licence"]
    lines += [
        f"  {style:<12} {count:>8}  {manifest['licences'][style]}" for style, count in manifest["pictures"].items()
    ]
    lines += ["", "left out"]
    lines += [f"  {count:>6}  {reason}" for reason, count in manifest["dropped"].items()]
    lines += ["", f"vocabulary: {manifest['vocab_size']} pieces in {folder / emoji.TOKENIZER}"]
    return "\n".join(lines)
