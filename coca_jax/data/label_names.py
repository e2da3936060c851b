"""The name that a caption or a prompt uses for a label: one rule for training, zero-shot candidates and the demo."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A number in front that only sorts the classes: `001.Black_footed_Albatross`, `00_cat`, `n02085620-Chihuahua`.
_ORDINAL = re.compile(r"(?:\d+[.)]\s*|0\d*[-_ ]\s*|n\d{8}[-_ ]\s*)(?=.*[^\W\d_])")
_CAMEL = re.compile(r"[A-Z]?[a-z]{2,}(?:[A-Z][a-z]{2,})+")
_WORDNET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(
    r"(?:class|label|category|cls|cluster|id|batch|part|chunk|shard|folder|dir|subset|split|group|fold|images?|imgs?"
    r"|pictures?|photos?|data|frames?)[-_. ]*\d+",
    re.IGNORECASE,
)
_CAMERA = re.compile(r"[1-9]\d\d[A-Z\d_]{5}")  # 100APPLE, 101MSDCF: the folders of a camera's card
_HEXADECIMAL = re.compile(r"(?:0x)?(?=[a-f]*\d)[0-9a-f]{8,}", re.IGNORECASE)
_NO_NAMES = frozenset(
    ("true", "false", "none", "null", "nan", "na", "n/a", "unknown", "unlabeled", "unlabelled", "yes", "no")
)


def name_of(label: str) -> str:
    """The name of a label, as captions and prompts use it; empty where the label is no name.

    `_` becomes a blank. Where a label has neither `_` nor a blank, a `-` between two words of two letters or more does
    too (`fire-truck`, but `t-shirt`, `DC-10`), and CamelCase is taken apart (`SeaLake`, but `iPhone`, `McDonald`). A
    number that only sorts is left out: digits and a dot, digits that begin with 0, or a WordNet id, before a word.
    The case stays.

    No names are: numbers, dates, booleans, missing values (`nan`, `None`), WordNet ids, hexadecimal ids, and words
    for a class or a part with a number (`class_7`, `batch_1`, a camera's `100APPLE`).
    """
    text = label.strip()
    text = text[match.end() :] if (match := _ORDINAL.match(text)) else text
    plain = words_of(text)
    if "_" not in text and " " not in plain:
        plain = re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", plain)
        if _CAMEL.fullmatch(plain):
            plain = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain)
    return plain if _is_name(plain) else ""


def class_names_of(labels: Iterable[str]) -> dict[str, list[str]]:
    """`Source.class_names` of a dataset that lists its labels; those that are no name are left out."""
    return {label: [name] for label in labels if (name := name_of(label))}


def words_of(name: str) -> str:
    """A name that a person gave to a class, with blanks for `_`; all else is as it was written."""
    return " ".join(name.replace("_", " ").split()) or name


def needs_name(label: str) -> bool:
    """Whether it is a label, and no name."""
    return bool(label) and not name_of(label)


def is_wordnet(text: str) -> bool:
    """Whether it is the id of a noun of WordNet, as ImageNet's folders are called."""
    return _WORDNET.fullmatch(text) is not None


def _is_name(text: str) -> bool:
    """Whether anyone could describe an image by it: it has a letter or a symbol, and is not an id or a value."""
    if text.lower() in _NO_NAMES or _looks_like_number(text):
        return False
    if any(pattern.fullmatch(text) for pattern in (_WORDNET, _NUMBERED, _HEXADECIMAL, _CAMERA)):
        return False
    return any(char.isalpha() or ord(char) >= 0x2190 for char in text)  # from arrows on: emoji are names


def _looks_like_number(text: str) -> bool:
    try:
        float(text.replace(",", "").replace(" ", ""))
    except ValueError:
        return False
    return True


def no_name(label: str) -> str:
    """What is wrong with a label that is no name, and how to give it one."""
    known = "imagenet" if is_wordnet(label) else "FILE"
    how = "" if known == "imagenet" else " (a name a line, line n from 0 for label n; or JSON from labels to names)"
    return f"the label {label[:40]!r} is no name: give names by ?classes={known}{how}"


def why_no_caption(label: str) -> str:
    """Why a record with this label has no caption."""
    return f"it has no caption, and {no_name(label)}" if needs_name(label) else "it has no caption"
