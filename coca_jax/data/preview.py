"""A few captions as the model reads them, for whoever starts a run or describes a data set."""

from __future__ import annotations

from coca_jax.data import label_names
from coca_jax.data.prepare.page import one_line
from coca_jax.data.records import BadExample, DataError, Record
from coca_jax.data.sources import Source
from coca_jax.data.sources.unlisted import worded
from coca_jax.data.tokenizer import Tokenizer

_COUNT = 5


def caption_line(record: Record, tokenizer: Tokenizer | None = None, length: int = 0) -> str:
    """The key of a record and its first caption, through templates and the tokenizer: `a.jpg: a red card`.

    Args:
      record: what a source gave.
      tokenizer: its tokens are made text again; None: the caption stays as it is.
      length: of the tokens, with bos and eos; 0: as many as there are.
    """
    captions = [caption for caption in record.captions if caption.strip()]
    label = f"  [{one_line(record.label, 30)}]" if record.label else ""
    if not captions:
        return f"{one_line(record.key, 40)}: {one_line(label_names.why_no_caption(record.label))}"
    text = captions[0]
    if tokenizer is not None:
        whole = tokenizer.decode(tokenizer.encode_batch([text], len(text.encode()) * 2 + 3)[0])
        text = tokenizer.decode(tokenizer.encode(text, length)) if length else whole
        label += f"  (cut at {length} tokens)" if text != whole else ""
    label += f"  (1 of {len(captions)} captions)" if len(captions) > 1 else ""
    return f"{one_line(record.key, 40)}: {one_line(text, 400 if tokenizer else 100)}{label}"


def preview(source: Source, tokenizer: Tokenizer, length: int) -> list[str]:
    """Lines with the captions of five records, evenly over the source, as the model will read them.

    Raises:
      DataError: their labels are no names, and they have no other captions; or no caption has a word.
    """
    count = min(_COUNT, len(source))
    lines, problems, wordless = [], [], []
    for index in (number * len(source) // count for number in range(count)):
        try:
            record = source[index]
            lines.append(caption_line(record, tokenizer, length))
        except BadExample as error:
            lines.append(f"record {index} cannot be used: {one_line(str(error))}")
            continue
        if not any(map(str.strip, record.captions)) and label_names.needs_name(record.label):
            problems.append(f"{source.name}: {label_names.no_name(record.label)}")
        elif record.captions and not worded(record.captions):
            wordless.append(record.captions[0])
    if problems and len(problems) == count:
        raise DataError(problems[0])
    if len(wordless) == count and any(not text.strip().isdigit() for text in wordless):  # house numbers may be meant
        raise DataError(
            f"{source.name}: its captions hold no words, e.g. {one_line(wordless[0], 40)!r}: are they labels, file "
            "names or annotations of objects? Name what holds captions by ?caption=, or labels by ?label= and "
            "?classes=FILE"
        )
    return lines
