"""The command line: `python -m coca_jax.data.prepare convert | describe | emoji`."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from coca_jax.data import addresses
from coca_jax.data.prepare import emoji_set, page
from coca_jax.data.prepare.beam import RUNNERS
from coca_jax.data.prepare.checking import QUALITY
from coca_jax.data.prepare.convert import SHARD_SIZE, convert
from coca_jax.data.prepare.describe import contact_sheet, describe, text
from coca_jax.data.prepare.shards import DROP, STOP
from coca_jax.data.records import DataError

_SOURCE = """\
A source is what training reads: array_record:, webdataset:, tfds:, parquet:, folder:, emoji:, each with its options
(docs/data.md has them); or, only here, tfrecord:PATTERN?image=FEATURE&caption=FEATURE&label=FEATURE&key=FEATURE.
Several are written 'A + B': all records of A come first."""
COMMANDS = ("convert", "describe", "emoji")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status: 0, or 1 with one line on standard error.

    A wrong command line exits with status 2, an interruption (Ctrl-C) returns 130.
    """
    options = _parser().parse_args(_command_first(sys.argv[1:] if argv is None else argv))
    try:
        print(options.run(options))
    except DataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of this output, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _command_first(argv: Sequence[str]) -> list[str]:
    """Lets a command be spelt as a flag, wherever it stands: `--describe SPEC`, `--describe=SPEC`, `--source=SPEC
    --describe`. Behind a command it is that command's own: `emoji --describe`."""
    if argv and argv[0] in COMMANDS:
        return list(argv)
    for number, argument in enumerate(argv):
        command, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and command in COMMANDS:
            return [command, *argv[:number], *([f"--source={value}"] if value else []), *argv[number + 1 :]]
    return list(argv)


class _Command(argparse.ArgumentParser):
    """Says that a flag is unknown before it says what is missing, which may be what was mistyped."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = [name for action in self._actions for name in action.option_strings]
        for argument in itertools.takewhile(lambda one: one != "--", args or ()):
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                near = "".join(f": did you mean {other}?" for other in difflib.get_close_matches(name, known, 1))
                self.error(f"unknown flag {name}{near}")
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coca_jax.data.prepare",
        description="Converts, checks and describes data sets of pictures with captions.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)
    _add_convert(commands)
    _add_describe(commands)
    emoji_set.add_parser(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, about: str, more: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    about = "a source of any kind -> checked ArrayRecord shards, a manifest and, if asked for, a vocabulary"
    more = f"""\
{_SOURCE}

Every picture is decoded and every text looked at. What cannot be used is left out and listed in dropped.jsonl;
manifest.json has counts, sizes, checksums and statistics. Interrupted at any moment, the same command goes on and the
result is the same to the byte, with any number of workers, and on Beam.

  python -m coca_jax.data.prepare convert --source='webdataset:/data/cc12m/{{00000..01242}}.tar' \\
      --out=/data/cc12m_records --max_side=512 --vocab_size=64000"""
    parser = _command(commands, "convert", about, more)
    required = parser.add_argument_group("what")
    required.add_argument("--source", required=True, metavar="SPEC", help="what to read")
    required.add_argument("--out", required=True, metavar="FOLDER", help="where to write; a bucket works")
    required.add_argument(
        "--name", default="", help="of the shards: NAME-00000-of-00042.array_record (default: FOLDER's)"
    )

    form = parser.add_argument_group("form")
    size = form.add_mutually_exclusive_group()
    size.add_argument(
        "--shard_size",
        type=_size,
        default=SHARD_SIZE,
        metavar="BYTES",
        help="about so large, judged by a sample, e.g. 200MB, 1GiB (default: 512MiB)",
    )
    size.add_argument(
        "--records_per_shard", type=_whole(1), default=0, metavar="N", help="records of the source that go into a shard"
    )
    form.add_argument(
        "--max_side",
        type=_whole(0),
        default=0,
        metavar="PIXELS",
        help="resizes pictures whose longer side has more; the others keep their bytes (default: 0, none)",
    )
    form.add_argument(
        "--quality",
        type=_whole(1, 100),
        default=QUALITY,
        metavar="N",
        help=f"of the JPEG that a resized picture becomes (default: {QUALITY}); palettes and transparency become PNG",
    )
    form.add_argument("--shuffle", action="store_true", help="write the records in another order than the source's")
    form.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="N", help="of that order (default: 0)")

    bad = parser.add_argument_group("bad records")
    bad.add_argument("--bad", choices=(DROP, STOP), default=DROP, help="leave them out, or stop (default: drop)")
    bad.add_argument(
        "--max_bad",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="stop if more than this share of all records cannot be used (default: 0.1)",
    )

    words = parser.add_argument_group("words")
    words.add_argument(
        "--vocab_size", type=_whole(0), default=0, metavar="N", help="train a vocabulary of N pieces (default: 0, none)"
    )
    words.add_argument(
        "--tokenizer_sample",
        type=_whole(1),
        default=1_000_000,
        metavar="N",
        help="records whose captions train it, and are counted in tokens (default: 1000000)",
    )
    _add_tokens(words)

    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=_whole(0), default=0, metavar="N", help="cores to use (default: 0, all)")
    work.add_argument(
        "--runner", choices=RUNNERS, default="", help="Apache Beam instead; needs pip install 'coca_jax[beam]'"
    )
    work.add_argument(
        "--beam_args",
        default="",
        metavar="ARGS",
        help="of Beam's runner, e.g. '--project=p --region=r --temp_location=gs://b/t'",
    )
    parser.set_defaults(run=_convert)


def _add_describe(commands: argparse._SubParsersAction) -> None:
    about = "what a data set holds: sizes, formats, captions, tokens, labels, examples, bad records; a contact sheet"
    parser = _command(commands, "describe", about, _SOURCE)
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("spec", metavar="SPEC", nargs="?", help="what to read")
    named.add_argument("--source", metavar="SPEC", help="the same, as convert has it")
    parser.add_argument(
        "--sample",
        type=_whole(0),
        default=1000,
        metavar="N",
        help="records to read, evenly over all; 0: all (default: 1000)",
    )
    parser.add_argument(
        "--contact_sheet", default="", metavar="FILE.jpg", help="write thumbnails with captions there; a bucket works"
    )
    _add_tokens(parser)
    parser.set_defaults(run=_describe)


def _add_tokens(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="vocabulary to count tokens by, as data.tokenizer (default: that of the source, if it brings one)",
    )
    group.add_argument(
        "--length", type=_whole(3), default=64, metavar="N", help="tokens that the model will read (default: 64)"
    )


def _convert(options: argparse.Namespace) -> str:
    if options.beam_args and not options.runner:
        raise DataError("--beam_args is for Beam: name a --runner too")
    manifest = convert(**{name: value for name, value in vars(options).items() if name not in ("run", "command")})
    return page.converted(options.out, manifest)


def _describe(options: argparse.Namespace) -> str:
    addresses.check(options.contact_sheet)  # before minutes of reading
    found = describe(options.spec or options.source, options.sample, options.tokenizer)
    said = text(found, options.length)
    if options.contact_sheet:
        contact_sheet(found.examples, options.contact_sheet)
        said += f"\n\ncontact sheet: {options.contact_sheet}"
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{number} is not {least}{' or more' if most is None else f' to {most}'}")
        return number

    return parse


def _share(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a share, 0 to 1")
    return number


def _size(value: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]I?)?B?", value.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size: write 500MB, 1GiB or a number of bytes")
    return size
