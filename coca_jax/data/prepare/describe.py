"""What a data set holds, from a sample of its records; and a sheet of thumbnails with their captions."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import textwrap
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import tqdm

from coca_jax.data import addresses, images
from coca_jax.data.prepare import page
from coca_jax.data.prepare.checking import Dropped, check, in_words
from coca_jax.data.prepare.inputs import open_inputs
from coca_jax.data.prepare.statistics import Statistics, token_statistics
from coca_jax.data.preview import caption_line
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources.base import one_line
from coca_jax.data.tokenizer import Tokenizer

SHEET = 48  # thumbnails at most
_COLUMNS, _SIDE, _GAP, _FONT, _LINES = 8, 160, 8, 12, 4  # pixels but for the columns and the lines of a caption


@dataclasses.dataclass(frozen=True)
class Description:
    """What a sample of a source shows.

    Attributes:
      name: the specification.
      records: of the source.
      statistics: of the sample.
      captions: of the sample.
      examples: some of its records.
      bad: those that cannot be used.
      attribution: of the source.
      tokenizer: counts tokens.
      remarks: of the source.
    """

    name: str
    records: int
    statistics: Statistics
    captions: list[str]
    examples: list[Record]
    bad: list[Dropped]
    attribution: str
    tokenizer: Tokenizer | None = None
    remarks: Sequence[str] = ()


def describe(source: str, sample: int = 1000, tokenizer: str = "", *, progress: bool = True) -> Description:
    """Reads and checks a sample of a source, as convert would.

    Args:
      source: see inputs.open_inputs.
      sample: records, evenly over the source; 0: all.
      tokenizer: SentencePiece model for counting tokens; empty: that of the source, if it brings one.
      progress: shows a bar.

    Raises:
      DataError: the source or the tokenizer cannot be opened, or the source is damaged.
    """
    inputs = open_inputs(source)
    total = len(inputs)
    path = tokenizer or (os.fspath(inputs.tokenizer_path) if inputs.tokenizer_path else "")
    model = Tokenizer(path) if path else None
    sample = min(sample or total, total)
    shown = {k * sample // min(SHEET, sample) for k in range(min(SHEET, sample))}
    found = Description(inputs.name, total, Statistics(), [], [], [], inputs.attribution, model, inputs.remarks)
    for k in tqdm.trange(sample, desc="describe", unit=" records", disable=not progress, leave=False):
        index = k * total // sample
        key: str | None = None
        try:
            record = inputs[index]
            key = record.key
            checked = check(record)
        except BadExample as error:
            found.statistics.drop(error.reason)
            found.bad.append(Dropped(index, key, error.reason, in_words(error)))
            continue
        found.statistics.add(checked)
        found.captions.extend(checked.record.captions)
        if k in shown:
            found.examples.append(checked.record)
    return found


def text(found: Description, length: int) -> str:
    """A page about it; `length` is what the model will read of a caption, in tokens."""
    statistics = found.statistics
    sampled = statistics.records + statistics.bad
    of_them = "all of them read" if sampled == found.records else f"{sampled} of them read, evenly over all"
    lines = [f"{found.name}: {found.records} records, {of_them}"]
    if statistics.records:
        summary = statistics.summary()
        if found.tokenizer is not None:
            summary["captions"]["tokens"] = token_statistics(found.captions, found.tokenizer, length)
        lines += page.statistics(summary)
    lines += ["", f"{statistics.bad} of {sampled} cannot be used"]
    lines += page.dropped(statistics.summary()["dropped"])
    lines += [f"    e.g. {page.one_line(bad.message)}" for bad in found.bad[:3]]
    if unnamed := statistics.counts["captions_per_record"][0]:
        lines.append(f"{unnamed} of {sampled} have no caption but a label that is no name: name them by ?classes=FILE")
    lines += [page.one_line(remark, 1000) for remark in found.remarks]
    if found.examples:
        lines += ["", f"examples{', as the model reads them' if found.tokenizer else ''}"]
        for record in found.examples[:5]:
            lines.append(f"  {caption_line(record, found.tokenizer, length)}")
    if found.attribution:
        lines += ["", found.attribution]
    return "\n".join(lines)


def contact_sheet(examples: Sequence[Record], file: str | os.PathLike[str]) -> None:
    """Writes a JPEG of thumbnails with the beginning of their first captions below.

    The letters are those of Pillow's own font, which has the Latin ones; what it lacks is drawn as boxes.

    Raises:
      DataError: there are no examples, or the file cannot be written.
    """
    addresses.check(file)
    if not examples:
        raise DataError(f"{file}: there is no picture for it among the records that were read; raise --sample")
    font = PIL.ImageFont.load_default(_FONT)
    line = math.ceil(_FONT * 1.25)
    columns = min(_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    step, height = _SIDE + _GAP, _SIDE + _LINES * line + 2 * _GAP
    sheet = PIL.Image.new("RGB", (columns * step + _GAP, rows * height + _GAP), "white")
    letters = int(_SIDE / font.getlength("abcdefghij klmnopqrst") * 21)
    for number, record in enumerate(examples):
        left, top = _GAP + number % columns * step, _GAP + number // columns * height
        small = PIL.Image.fromarray(images.decode(record.image, (255, 255, 255), _SIDE))
        small.thumbnail((_SIDE, _SIDE))
        sheet.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        caption = page.one_line(next(iter(record.captions), ""))
        wrapped = textwrap.wrap(caption, letters, max_lines=_LINES, placeholder=" …")
        below = PIL.Image.new("RGB", (_SIDE, _LINES * line), "white")  # of its own: letters may be wide
        PIL.ImageDraw.Draw(below).multiline_text((0, 0), "\n".join(wrapped), "black", font, spacing=2)
        sheet.paste(below, (left, top + _SIDE + _GAP // 2))
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=90)
    try:
        addresses.path(file).write_bytes(out.getvalue())
    except Exception as error:  # of buckets, of many kinds
        raise DataError(f"{file} cannot be written: {one_line(error)}; name another file") from error
