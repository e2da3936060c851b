"""What came of a file's tensors and of our parameters, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

Shape = tuple[int, ...]

LOADED, RESIZED, SKIPPED, INITIALISED = "loaded", "resized", "skipped", "initialised"


@dataclasses.dataclass(frozen=True)
class Line:
    """One parameter of ours, or one tensor of the file that has no place among them.

    Attributes:
      status: loaded | resized | skipped | initialised.
      name: loaded, resized, initialised: our parameter's path; skipped: the tensor's name.
      shape: of what the name says.
      tensors: loaded, resized: the file's tensors that it is made of.
      shown: loaded, resized: these in short, `blocks.{0..11}.norm1.weight`.
      detail: loaded, resized: what was done to fit it; skipped, initialised: why.
    """

    status: str
    name: str
    shape: Shape
    tensors: tuple[str, ...] = ()
    shown: str = ""
    detail: str = ""

    @property
    def explanation(self) -> str:
        return "; ".join(filter(None, [self.shown and f"from {self.shown}", self.detail]))


@dataclasses.dataclass(frozen=True)
class Report:
    """Each parameter of ours once, loaded, resized or initialised; each of the file's tensors in those or skipped.

    Attributes:
      file: that was read.
      layout: timm | big_vision | open_clip | coca_jax.
      lines: in the order loaded and resized, initialised, skipped.
      notes: in what the model differs from the one that the weights are from, and what the file does not tell.
      of_what: is filled.
    """

    file: str
    layout: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    of_what: str = "image encoder"

    def of(self, status: str) -> list[Line]:
        return [line for line in self.lines if line.status == status]

    def to_json(self) -> dict[str, Any]:
        """Plain values: file, layout, notes, and a row for each line."""
        rows = [
            {
                "status": line.status,
                "name": line.name,
                "shape": list(line.shape),
                "tensors": list(line.tensors),
                "detail": line.detail,
            }
            for line in self.lines
        ]
        return {"file": self.file, "layout": self.layout, "notes": list(self.notes), "lines": rows}

    def brief(self) -> str:
        """A few lines: counts, what was changed to fit or not loaded and why, the notes."""
        loaded, resized = self.of(LOADED), self.of(RESIZED)
        values = sum(math.prod(line.shape) for line in loaded + resized)
        more = f" and {len(resized)} resized" if resized else ""
        counts = f"{len(loaded)} parameters loaded{more}, {values:,} numbers"
        first = f"{self.of_what} from {self.file} ({self.layout}): {counts}"
        return "\n".join([first, *self._rest()])

    def _rest(self) -> list[str]:
        rest = []
        for status in (LOADED, RESIZED, INITIALISED, SKIPPED):
            names: dict[str, list[str]] = {}
            for line in (line for line in self.of(status) if line.detail):
                names.setdefault(line.detail, []).append(line.name)
            rest += [f"  {status}: {_few(several)}: {detail}" for detail, several in names.items()]
        return [*rest, *(f"  note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        """A table with a row for each line, then the notes."""
        rows = [(line.status, line.name, "x".join(map(str, line.shape)), line.explanation) for line in self.lines]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        return "\n".join([f"{self.file} ({self.layout})", *table, *(f"note: {note}" for note in self.notes)])


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
