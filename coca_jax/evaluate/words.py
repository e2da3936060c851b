"""Captions cut into words as the COCO evaluation does: the Penn Treebank's rules, lower case, punctuation left out.

The official evaluation starts Stanford's PTBTokenizer (CoreNLP 3.4.1), a Java program. These are its rules as far as
captions meet them: clitics are words of their own (`do n't`, `man 's`, `they 'll`), and so are the parts of `can not`
and `gon na`; hyphens, slashes and points inside a word stay; numbers keep their points, commas and colons; known
abbreviations keep their last point. Brackets become `-lrb-` and the like, which the official evaluation does not leave
out either. On the 102 recorded texts of tests/evaluate/caption_scores.json, chosen to be hard, all words are the same.
"""

from __future__ import annotations

import re

# What is left out, as the official evaluation does: not `!!` nor `-lrb-`, which it lets pass.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_LETTERS = str.maketrans(
    # Typographic quotes, dashes, dots and blanks; the euro and the pound as Stanford writes them.
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "--", "\u2026": "..."}
    | {"€": "$", "£": "#", "\u00a0": " "}
)
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|ave|blvd|rd|sr|jr|inc|ltd|co|corp|vs|etc|no|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|"
    "mt|ft|gen|gov|sgt|capt|lt|col|rev|hon"
)
# One word, two: `cannot`, `gonna`.
_JOINED = {
    **{"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")},
    **{"lemme": ("lem", "me"), "gimme": ("gim", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was")},
}
_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll|n)(?![^\W_]))"
_TOKEN = re.compile(
    rf"""
      https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+          # addresses
    | (?:[^\W\d_]\.){{2,}} | (?:{_ABBREVIATIONS})\.(?=\s|$)   # u.s.  p.m.  mr.
    | 'n'(?!\w) | '\d\ds?(?!\w) | '(?:tis|twas)(?!\w) | o'clock(?!\w) | y'(?=all\b) | d'ye\b
    | {_CLITIC}
    | -\d+(?:[.,:]\d+)*(?!\w) | \d+(?:[.,:]\d+)+          # 3.5  10:30  1,000
    | [#@]\w+(?<!\#\d)                                      # #sunset
    | \w+?(?=n't(?!\w)) | \w+(?:[-/.&+]\w+)*?(?={_CLITIC}(?!\w)) | \w+(?:[-/.&+]\w+)*
    | \.\.\.+ | [!?][!?]+ | --+ | ''
    | [^\s]
    """,
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """The words of a caption, as COCO's metrics count them."""
    text = _quotes(text.translate(_LETTERS).lower())
    found: list[str] = []
    for token in _TOKEN.findall(text):
        found += _JOINED.get(token, (_BRACKETS.get(token, token),))
    return [word for word in found if word not in _PUNCTUATION]


def _quotes(text: str) -> str:
    return text.replace('"', " '' ").replace("°", " ° ")
