"""Text that came with data (names, captions, labels), as a terminal may show it."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # with which Persian, Hindi and emoji are written


def escaped(text: str, *, lines: bool = False) -> str:
    r"""The text with what a terminal obeys, or what hides or reorders the text around it, written as \u001b.

    These are control characters (C0, C1), bidirectional ones, those without a width, halves of surrogate pairs (bytes
    of a name that is not UTF-8) and whatever else Unicode does not call printable, but for spaces, joiners and emoji
    that are younger than this Python's Unicode.

    Args:
      text: anything.
      lines: line ends and tabs stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_harmless(char) or (lines and char in "\n\t") else _escape(char) for char in text)


def one_line(text: object, limit: int = 0) -> str:
    """A text, or what an error says, on one line, escaped; cut to a limit, if there is one."""
    plain = escaped(" ".join(str(text).split()))
    if not plain and isinstance(text, BaseException):
        return type(text).__name__
    return plain if not limit or len(plain) <= limit else plain[: limit - 1] + "…"


def _is_harmless(char: str) -> bool:
    return (
        char.isprintable()
        or char in _JOINERS
        or unicodedata.category(char) == "Zs"
        or (unicodedata.category(char) == "Cn" and 0x1F000 <= ord(char) < 0x20000)
    )


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
