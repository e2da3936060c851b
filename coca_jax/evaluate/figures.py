"""Numbers as a person reads them."""

from __future__ import annotations

import math

ABSENT = "\N{EN DASH}"


def percent(value: float | None) -> str:
    """A share as a percentage with two or three telling digits; an absent one as a dash."""
    if value is None or not math.isfinite(value):
        return ABSENT if value is None else "not a number"
    percent = 100 * value
    digits = 1 if percent >= 1 or percent == 0 else 2 if percent >= 0.01 else 4
    return f"{percent:.{digits}f}%"


def plain(value: float | None) -> str:
    """Four telling digits; whole numbers with thousands separated."""
    if value is None or math.isnan(value):
        return ABSENT if value is None else "not a number"
    if math.isinf(value):
        return "infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def million(count: int) -> str:
    """A large count in millions or billions, with the exact figure behind."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit} ({count:,})"
    return f"{count:,}"
