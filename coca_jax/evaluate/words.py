"""Captions cut into words as the COCO evaluation does: the Penn Treebank's conventions, lower case, no punctuation.

The official evaluation starts Stanford's PTBTokenizer (CoreNLP 3.4.1), a Java program, and removes punctuation from its
output. The rules here were written from its outputs, without its source. tests/evaluate/caption_scores_test.py lists
the recorded texts whose words differ.

A text goes through three steps:

1. Its shape, a string of the same length: ASCII as it is, `é` for any other letter, `0` for any other digit, U+0300 for
   a combining mark, `•` for a symbol, NUL for what leaves no word (emoji, quotes, dashes).
2. One regular expression over the shape, whose first rule that matches wins. What a rule reads without a match is
   bounded or belongs to the next word anyway, so that the time is linear in the length.
3. What is written as one word is split in two: `cannot`, `gonna`.
"""

from __future__ import annotations

import re
import unicodedata

# Removed after tokenization. `!!` and `-lrb-` are not in the official list and stay.
_PUNCTUATION = frozenset(["'", "''", "\u2019", '"', "`", ".", "...", "?", "!", ",", ":", ";", "-", "--", "---", "----"])
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN |= {"€": "$", "\u20a0": "$", "¤": "$", "£": "#", "¢": "cents", "\ue000": "<", "\ue001": ">"}
# How a longer word, such as `(555) 123-4567`, writes what it contains.
_INSIDE = str.maketrans({" ": "\xa0"} | {sign: _WRITTEN[sign] for sign in "()\ue000\ue001"})
_WRITTEN |= {f"\u2019{end}": f"'{end}" for end in ("s", "m", "d", "re", "ve", "ll")} | {"n\u2019t": "n't"}
_WRITTEN |= {"½": "1/2", "¼": "1/4", "¾": "3/4", "\u2153": "1/3", "\u2154": "2/3"}

# Entities that stand for one character. `<` and `>` become private characters, which never form a tag.
_ENTITIES = {"&amp;": "&", "&lt;": "\ue000", "&gt;": "\ue001", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITIES |= {"&mdash;": "\u2014", "&ndash;": "\u2013", "&md;": "\u2014"}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)

_SPLIT = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}
_SPLIT |= {"lemme": ("lem", "me"), "gimme": ("gim", "me")}


def _ranges(text: str) -> frozenset[int]:
    """The code points of hexadecimal ranges, `a-b` or `a`."""
    pairs = [(part.split("-") * 2)[:2] for part in text.split()]
    return frozenset(code for first, last in pairs for code in range(int(first, 16), int(last, 16) + 1))


# Combining marks that stay in a word. Those of other scripts (Kannada, Burmese, Khmer) split it and leave no word.
_MARKS = _ranges(
    "300-36f 483-487 591-5c7 615-61a 64b-65e 670 6d6-6ed 711 730-74a 7a6-7b0 7eb-7f3 900-903 93c-94e 951-955 962-963 "
    "981-9e3 a01-a4d a81-acd b82 bbe-bcd c01-c56 d3e-d48 e31-e4e eb1-ecd 1885-1886"
)
# Blocks whose symbols, numbers and brackets are words of their own. Those of other blocks leave no word.
_SYMBOLS = _ranges(
    "21-7e a1-ac ae-ba bf-f7 37e-387 589 5be 5c0-5f4 600-603 606-60c 614-61f 66a 66d 6d4 6de-6e9 700-70d 7f6-7f8 "
    "964-965 e3f-e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044 2070-208e 20a4 2100-214f 2155-215e "
    "2190-249b 249c-2b59 3001-3002 3012 30fb ff01-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"
)
_NO_WORD = frozenset("«»\u2039\u203a\u2018\u201b\u201c\u201d\u2013\u2014\u2015\u2026")


class _Shapes(dict[int, str]):
    """The shape of every character, found when it is first met."""

    def __missing__(self, code: int) -> str:
        char, kind = chr(code), unicodedata.category(chr(code))
        shape = "\0"
        if 0x20 < code < 0x7F or char == "\u2019":
            shape = char
        elif char.isspace():
            shape = " "
        elif char in "\u2010\u2011\u058a":  # other hyphens
            shape = "\u2010"
        elif code <= 0xFFFF and (kind[0] == "L" or kind == "Nd"):
            shape = "é" if kind[0] == "L" else "0"
        elif kind[0] == "M" and code in _MARKS:
            shape = "\u0300"
        elif char in _WRITTEN or (code in _SYMBOLS and kind[0] in "SPNC" and char not in _NO_WORD):
            shape = "•"
        self[code] = shape
        return shape


# Abbreviations keep their point: in any case, capitalized, before a number.
_ANY = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt "
    "cf cie cmdr co col colo comdr conn corp cos cpl ct dec dept dr drs elec ens esq est etc ext feb fla fri ft ga "
    "gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn "
    "mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof pte pty pvt rd rep "
    "reps rev sen sens sep sept seq sgt sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis "
    "wisc wm wyo"
)
_CAPITALIZED = "ark del ill la mass miss ore pa tex wash"
_NUMBERED = "art ca fig figs no nos op pp prop"
# Words that begin a sentence: a letter's point before them ends the sentence before (`vitamin A. The`).
_STARTS = (
    "A About According After An As At But He Her Here However If In It Last Many More Mr Ms Now Once One Other Our "
    "She Since So Some Such That The Their Then There These They This We What When While Yet You"
)

# A letter; a character of a word; one that is no combining mark; an apostrophe.
_L, _W, _N, _Q = "[A-Za-zé]", "[A-Za-zé0-9\u0300]", "[A-Za-zé0-9]", "['\u2019]"
_END = f"(?!{_W})"
_URL = '[^\\s\\0<>|"(){}]'
_PLAIN = rf"{_N}++{_END}(?:_{_N}++{_END})*+"  # letters and digits, single underscores between them
_HYPHENS = rf"(?:\.?[-\u2010]{_PLAIN})*+"
_ASCII = r"[A-Za-z0-9]++(?:[-_][A-Za-z0-9]++)*+"
_TAIL = rf"(?i:{_Q}(?:s|m|d|re|ve|ll|em|n))(?![A-Za-z\u0300])"  # what is parted from the word before it
_RULES = (
    # The common case: letters up to a blank or a comma.
    r"[A-Za-z]++(?=[ ,]|$)",
    # Web addresses with and without a scheme, e-mail addresses.
    rf"(?i:https?)://(?=[^\s.]{{1,99}}\.){_URL}{{1,999}}(?<![.,!?;:'])",
    rf"(?:(?i:www)\.[A-Za-z0-9-]{{1,99}}|[A-Za-z][A-Za-z0-9]*+)(?:\.[A-Za-z0-9-]++){{0,9}}?\.(?i:com|net|org|edu)"
    rf"(?!\.?[A-Za-z0-9])(?:/{_URL}{{2,999}}(?<![.,!?;:']))?",
    rf"<?(?![@'&]){_URL[:-1]}@•€£¢$]{{1,64}}+@(?!@){_URL[:-1]}@]{{1,255}}(?<!\.)>?",
    # Tags and numeric entities: <br/>, <a href="x">, <!-- x -->, &#39;.
    r"""</?[A-Za-z][\w:.-]*+(?: +[A-Za-z]\w*+(?:=(?:"[^"<>]*+"|'[^'<>]*+'))?)*+ */?>|<[!?][^<>]++>""",
    r"&#\d++;",
    # Blanks inside a number: 1 1/2, (555) 123-4567, 800 555 1212.
    r"\d++ \d++/\d++(?!/)|\(\d{2,3}\)[ -]?\d{3,4}[- ]\d{4}(?!\d)|(?:\+\d\d? )?\d{3} \d{3,4} \d{4}(?!\d)",
    # Faces.
    r"[:;=]['-]?[(){DPpd|\\\[\]@O](?![A-Za-z0-9])|\(\^[_.]\^\)|\^_\^|=_=|>_<|-_-",
    # Names with signs: R&B, C+C, c++, F#, US$; files that begin with a digit: 5a.jpg; degrees: Ph.D.
    r"[A-Z]++(?:[&+][A-Z]++)++|[Cc]\+\+|[CFc]#|[A-Z]{1,3}\$",
    r"\d[A-Za-z0-9]*+\.(?:jpe?g|png|gif|html?|pdf|txt|zip)(?=\.?(?:\s|$))",
    r"(?i:(?:ph|ed)\.d)\.",
    # Letters with points: u.s., a.m.-p.m.
    rf"(?:[A-Za-z]\.){{2,}}(?!{_L})(?:-(?:[A-Za-z]\.){{2,}})?{_HYPHENS}",
    # A point, `!` or `?` between letters: foo.com, water.The, Wow!The.
    rf"{_L}{_W}*+(?:[.!?]{_L}{_W}*+)++{_HYPHENS}",
    # A single letter with its point, unless a sentence ends there: J. K.
    rf"[A-Za-z]\.(?! +(?:{_STARTS.replace(' ', '|')})(?![\w']))",
    # Abbreviations with their point; any word with its point where a comma follows.
    rf"(?:(?i:{_ANY.replace(' ', '|')})|(?=[A-Z])(?i:{_CAPITALIZED.replace(' ', '|')}))\.(?![-A-Za-zé])",
    rf"(?i:{_NUMBERED.replace(' ', '|')})\.(?= ?\d)",
    rf"{_PLAIN}{_HYPHENS}\.(?=[,;:])",
    # Clitics: n't, 'n', 's, 'til, the 't of 'tis and 'twas.
    rf"''|(?i:n['\u2019`]t){_L}*+|{_Q}[nN]{_Q}|{_TAIL}|(?i:{_Q}(?:til|till|cause)){_END}|(?i:'t(?=is|was))",
    # Years and decades: '57, '90s.
    rf"{_Q}(?:\d\d|\d0[sS])(?![A-Za-zé0-9\u0300'\"])",
    # Words with an apostrophe: ma'am, o'clock and d'Artagnan, the y' of y'all.
    rf"(?i:ma'am|e'er|ne'er|ev'ry|nor'easter|c'mon|c'est|li'l|nat'l|shi'ite|hawai'i){_END}|(?i:ol|somethin|dunkin)'{_END}",
    rf"[DdLlNnOo][`'\u2019](?!(?:ll|re|ve|em){_END}){_L}{_L}{_W}*+|[DdJjLlYy]{_Q}(?={_L})(?!(?:s|m|d|ll|re|ve|em){_END})",
    # A verb without its n't.
    r"[A-Za-z]+?(?=(?i:n['\u2019`]t))",
    # Up to three parts with slashes: and/or, 1/2/2004.
    rf"{_ASCII}(?:/{_ASCII}){{1,2}}",
    # Numbers: 5.5-inch, 10:30, 1,000; with a sign or a separator before them.
    rf"\d++(?:[.,]\d++)++(?!:\d){_HYPHENS}|\d++(?:[.,:]\d++)++|(?:[-+][.,:]?|[.,:])\d++(?:[.,:]\d++)*+",
    # Words, with hyphens (without combining marks) or single underscores.
    rf"{_PLAIN}{_HYPHENS}|{_W}++(?:_{_W}++)*+",
    # @name, #tag
    rf"@[A-Za-z_]\w*+|#{_L}++",
    # Repeated signs.
    r"[!?]{2,}+|\*{2,}+|_{2,}+|@{2,}+|#{2,}+|-{5,}+|--+|<<|>>|\.\.\.",
    # Any other character on its own.
    r"[^\s\0]",
)
_TOKEN = re.compile("|".join(_RULES))
_SHAPES = _Shapes()


def words(text: str) -> list[str]:
    """Cuts a caption into the words that COCO's metrics count."""
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0].lower()], text).replace("\xad", "")
    found: list[str] = []
    for match in _TOKEN.finditer(text.translate(_SHAPES)):
        token = text[match.start() : match.end()].lower()
        if token in _PUNCTUATION:
            continue
        token = _WRITTEN.get(token, token)
        if len(token) > 1 and not token.isalnum():
            token = token.translate(_INSIDE)
        found += _SPLIT.get(token, (token,))
    return found
