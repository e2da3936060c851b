"""Text that came with data (names, captions, labels), as a terminal may show it."""

from __future__ import annotations

import re

# What a terminal obeys, or what hides or reorders the text around it: C0 and C1 controls, bidirectional controls,
# characters of no width, tags, halves of surrogate pairs (bytes of a name that is not UTF-8). The zero-width joiners
# stay: Persian, Hindi and emoji are written with them.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_CONTROLS_OF_A_LINE = re.compile(_CONTROLS.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def escaped(text: str, *, lines: bool = False) -> str:
    r"""The text with every control character as Python and JSON write it, \u001b and the like.

    Args:
      text: anything.
      lines: line ends and tabs stay as they are.
    """
    pattern = _CONTROLS_OF_A_LINE if lines else _CONTROLS
    return text if text.isascii() and text.isprintable() else pattern.sub(_escape, text)


def one_line(text: object, limit: int = 0) -> str:
    """A text, or what an error says, on one line, escaped; cut to a limit, if there is one."""
    plain = escaped(" ".join(str(text).split()))
    if not plain and isinstance(text, BaseException):
        return type(text).__name__
    return plain if not limit or len(plain) <= limit else plain[: limit - 1] + "…"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
