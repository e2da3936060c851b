"""What is done to sound files, so that they are nearly right: Hypothesis strategies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1)
_EDITS = ("byte", "number", "cut", "repeat", "insert", "truncate", "splice")


@st.composite
def damaged(
    draw: st.DrawFn, seeds: Sequence[bytes], repair: Callable[[bytes], bytes] | None = None, most: int = 5
) -> bytes:
    """One of the files after up to `most` edits; or no file at all, in one case of twenty.

    Args:
      draw: of Hypothesis.
      seeds: sound files.
      repair: sets checksums right, in half of the cases: without it none but the first check would ever be met.
      most: edits.
    """
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=600))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        _edit(draw, data, seeds)
    return repair(bytes(data)) if repair is not None and draw(st.booleans()) else bytes(data)


def _edit(draw: st.DrawFn, data: bytearray, seeds: Sequence[bytes]) -> None:
    size = len(data)
    # Headers are short and decide the most; some formats have them at the end.
    near = min(size, 600)
    at = draw(st.one_of(st.integers(0, size), st.integers(0, near), st.integers(size - near, size)))
    span = draw(st.one_of(st.integers(1, 8), st.integers(1, 600)))
    match draw(st.sampled_from(_EDITS)):
        case "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        case "number":
            width = draw(st.sampled_from((2, 4, 8)))
            value = draw(st.sampled_from(_NUMBERS)) % 256**width
            data[at : at + width] = value.to_bytes(width, draw(st.sampled_from(("little", "big"))))
        case "cut":
            del data[at : at + span]
        case "repeat":
            data[at:at] = data[at : at + span] * draw(st.integers(1, 40))
        case "insert":
            data[at:at] = draw(st.binary(max_size=40))
        case "truncate":
            del data[at:]
        case "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            data[at : at + span] = other[start : start + span]


# ---------------------------------------------------------------------------------------------------------------------
# Values: JSON and what is like it

# Written as text, they become what no writer of JSON would write.
_RAW = {"@many digits@": "9" * 5000, "@deep@": "[" * 100_000, "@half a pair@": '"\\ud800"'}
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**63, 10**12, 10**30, -(10**30)),
    *(0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "float32", "../../escaped", "/escaped", "a\0b", "a{99999999999999999999}", "(" * 50, "x" * 5000),
    *([], [[]], {}, {"": {}}, [1], [0.5] * 3, ["a"] * 3, [None] * 3, *_RAW),
)
_SIMPLE = st.one_of(st.sampled_from(_ODD), st.integers(), st.floats(), st.text(max_size=8))
_VALUES = st.one_of(_SIMPLE, st.lists(_SIMPLE, max_size=4), st.dictionaries(st.text(max_size=6), _SIMPLE, max_size=3))


@st.composite
def changed_values(
    draw: st.DrawFn, seeds: Sequence[Any], most: int = 3, others: st.SearchStrategy | None = None
) -> Any:
    """One of some nested values with up to `most` of its parts replaced, removed or added."""
    values = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        new = copy.deepcopy(draw(_VALUES if others is None else st.one_of(_VALUES, others)))
        places = list(_places(values))
        if not places:
            return new
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("replace", "replace", "remove", "add"))):
            case "replace":
                holder[key] = new
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = new
            case "add":
                holder.append(new)
    return values


def _places(values: Any) -> Any:
    """Every (dictionary or list, key or index) in nested values."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield values, key
        yield from _places(value)


def to_json(values: Any) -> bytes:
    """The values as JSON text, and what `_RAW` stands for in it."""
    text = json.dumps(values)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def changed_json(seeds: Sequence[Any], most: int = 3) -> st.SearchStrategy[bytes]:
    """JSON files: values changed, or (one in six) the text damaged."""
    sound = [to_json(seed) for seed in seeds]
    of_values = changed_values(seeds, most).map(to_json)
    return st.one_of(of_values, of_values, of_values, of_values, of_values, damaged(sound))
