"""What a profiler's trace says of the time of a compiled program: by part of the model, and how long nothing ran.

Works on the traces of CPUs, GPUs and TPUs alike: an event that names an operation of the program (`hlo_op`) is work of
the device. What part it belongs to is in the program's text, where an operation has the name of what it was made from.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

# The first pattern found in an operation's name decides.
PARTS = (
    ("image encoder", r"image_encoder"),
    ("poolers", r"pooler"),
    ("unimodal", r"text_decoder\.encode|unimodal|token_embedding|cls_norm"),
    ("multimodal", r"text_decoder\.decode|multimodal|final_norm"),
    ("losses", r"jvp\(|_projection"),
    ("optimiser", r"."),
    ("copies", r""),  # the compiler's own: they have no name
)
_CONTAINERS = ("while", "call", "conditional")  # what they hold has events of its own


class Event(NamedTuple):
    name: str
    start: float  # seconds
    end: float


def read(folder: Path) -> list[Event]:
    """The device's operations in the trace under a folder.

    XLA's CPU products go on after their event, in its thread pool, and say when they have ended, which may be before
    the event is over. An operation never runs twice at a time.

    Raises:
      ValueError: there is no trace, or no operation in it.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"no trace under {folder}")
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    events, ends = [], defaultdict(list)
    for plane in devices or planes:
        for line in plane.lines:
            if devices and line.name in ("XLA Modules", "Steps"):  # whole programs
                continue
            for event in line.events:
                if event.name.startswith("end: "):
                    ends[event.name[5:]].append(event.start_ns / 1e9)
                elif event.name.split(".")[0] not in _CONTAINERS and (
                    "hlo_op" in (stats := dict(event.stats)) or (devices and line.name == "XLA Ops")
                ):
                    name = str(stats.get("hlo_op", event.name))
                    events.append(Event(name, event.start_ns / 1e9, event.end_ns / 1e9))
    if not events:
        raise ValueError(f"no operation of a program in {files[-1]}")
    return ended(events, ends)


def ended(events: Sequence[Event], ends: Mapping[str, Sequence[float]]) -> list[Event]:
    """Events that end where their operation does: the first time, of those at which operations of their name have
    ended, that is not before their start, or where the event ends if that is later."""
    times = {name: sorted(values) for name, values in ends.items()}

    def end(event: Event) -> float:
        mine = times.get(event.name, [])
        at = bisect.bisect_left(mine, event.start)
        return max(event.end, mine[at]) if at < len(mine) else event.end

    return [event._replace(end=end(event)) for event in events]


def busy(events: Iterable[Event]) -> float:
    """Seconds in which at least one operation ran."""
    return sum(end - start for start, end in merged(events))


def merged(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The intervals in which something ran, in order, none touching another."""
    intervals: list[tuple[float, float]] = []
    for _, start, end in sorted(events, key=lambda event: event.start):
        if intervals and start <= intervals[-1][1]:
            intervals[-1] = intervals[-1][0], max(intervals[-1][1], end)
        else:
            intervals.append((start, end))
    return intervals


def shares(events: Sequence[Event], part_of: dict[str, str]) -> dict[str, float]:
    """Seconds by part, which add up to `busy`: where several operations run at a time, each has its share of it."""
    points = sorted(
        [(event.start, True, i) for i, event in enumerate(events)]
        + [(event.end, False, i) for i, event in enumerate(events)]
    )
    seconds: dict[str, float] = defaultdict(float)
    running: set[int] = set()
    last = 0.0
    for now, starts, i in points:
        for j in running:
            seconds[part_of.get(events[j].name, "copies")] += (now - last) / len(running)
        running.add(i) if starts else running.discard(i)
        last = now
    return dict(seconds)


def part_names(program: str) -> dict[str, str]:
    """Operation of a compiled program's text -> part."""
    parts = {}
    for line in program.splitlines():
        if found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            named = re.search(r'op_name="([^"]*)"', line)
            name = named.group(1) if named else ""
            parts[found.group(1)] = next(part for part, pattern in PARTS if re.search(pattern, name))
    return parts


def parts(folder: Path, program: str) -> dict[str, float]:
    """Seconds by part of the one step that was traced, and `idle`: in which nothing of it ran, from first to last."""
    events = read(folder)
    seconds = shares(events, part_names(program))
    span = max(event.end for event in events) - min(event.start for event in events)
    return {part: seconds.get(part, 0.0) for part, _ in PARTS} | {"idle": span - busy(events)}
