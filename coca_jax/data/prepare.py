"""Prepares data sets: `python -m coca_jax.data.prepare emoji`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coca_jax.data import emoji
from coca_jax.data.records import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares (or describes) the set that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coca_jax.data.prepare", description=__doc__)
    sets = parser.add_subparsers(dest="name", required=True, metavar="SET")
    text = "the built-in set: emoji of three designers with their Unicode names; needs pip install 'coca_jax[emoji]'"
    emoji_set = sets.add_parser("emoji", help=text, description=text)
    emoji_set.add_argument(
        "--out", type=Path, help="folder of the set (default: $COCA_JAX_CACHE/emoji, or ~/.cache/coca_jax/emoji)"
    )
    emoji_set.add_argument("--force", action="store_true", help="prepare again even if it is there")
    emoji_set.add_argument(
        "--describe", action="store_true", help="only check the files (checksums too) and say what is there"
    )
    options = parser.parse_args(argv)
    folder = options.out or emoji.default_folder()
    try:
        if options.describe:
            manifest = emoji.verify(folder, checksums=True)
        else:
            manifest = emoji.prepare(folder, force=options.force)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(folder, manifest))
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
