"""Examples that could not be used: counted over the whole job, listed in a file, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from coca_jax.data import side_files
from coca_jax.data.mixture import Mixture
from coca_jax.data.records import REASONS, BadExample, DataError

BAD_EXAMPLES_FILE = "bad_examples.jsonl"
_ENOUGH = 10_000  # examples by which a share is judged, at least


class Tally:
    """How many examples of the whole job were asked for, and how many of them could not be used, by reason.

    Args:
      saved: what `to_json` gave, to go on from there.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        self.examples = int(saved["examples"]) if saved else 0
        self.counts = {reason: int(saved["bad"].get(reason, 0)) if saved else 0 for reason in REASONS}

    @property
    def bad(self) -> int:
        return sum(self.counts.values())

    def add(self, examples: int, problems: np.ndarray) -> None:
        """One batch: its size, and int `[len(REASONS)]`, how many had each reason."""
        self.examples += examples
        for reason, count in zip(REASONS, problems.tolist(), strict=True):
            self.counts[reason] += int(count)

    def metrics(self) -> dict[str, float]:
        """`data/bad`, all of them so far, and `data/bad/REASON` of the reasons that there were."""
        reasons = {f"data/bad/{reason}": float(count) for reason, count in self.counts.items() if count}
        return {"data/bad": float(self.bad)} | reasons

    def check(self, share: float, where: object) -> None:
        """Raises DataError, with the tally, if more than a share of the examples could not be used.

        Args:
          share: 0..1, of the examples so far, or of the first 10,000 while there are fewer.
          where: the list of them, for the message.
        """
        if self.bad > share * max(self.examples, _ENOUGH):
            reasons = ", ".join(
                f"{count} {reason} ({REASONS[reason]})" for reason, count in self.counts.items() if count
            )
            raise DataError(
                f"{self.bad} of {self.examples} training examples cannot be used, more than "
                f"config.data.max_bad={share:g}: {reasons}; see {where}, mend the data, or raise config.data.max_bad"
            )

    def to_json(self) -> dict[str, Any]:
        """In plain values."""
        return {"examples": self.examples, "bad": self.counts}


class List:
    """Which records could not be used: a JSON line for each, once, with its source, number, key and reason.

    Each process lists what it has read, in a file of its own. A run that goes on goes on with the list.
    """

    def __init__(self, source: Mixture, workdir: epath.Path, process: int = 0):
        self.path = workdir / (BAD_EXAMPLES_FILE if not process else f"bad_examples-{process:05d}.jsonl")
        self._source = source
        self._seen: set[tuple[str, int]] = set()
        self._cut = False
        try:
            for line in side_files.take_lines(self.path, _of_record):
                self._seen.add((line["source"], line["record"]))
        except Exception as error:  # OSError, and what libraries for buckets raise
            self._warn(error, "those before")

    def add(self, index: np.ndarray, reason: np.ndarray) -> None:
        """One batch: the records asked for, int64 `[b]`, and `[b]`, 0 or 1 + the number of the reason they fail for."""
        lines = []
        for at, code in zip(index[reason > 0].tolist(), reason[reason > 0].tolist(), strict=True):
            number, record = self._source.locate(at)
            source = self._source.sources[number]
            if (source.name, record) in self._seen:
                continue
            self._seen.add((source.name, record))
            try:
                # Names of files may hold bytes that are no text.
                key = source[record].key.encode(errors="backslashreplace").decode()
            except BadExample:
                key = None
            line = {"source": source.name, "record": record, "key": key, "reason": list(REASONS)[code - 1]}
            lines.append(side_files.as_line(line))
        if lines:
            try:
                side_files.make_room(self.path)
                with self.path.open("a") as file:
                    file.write("\n" * self._cut + "".join(lines))
                self._cut = False
            except Exception as error:  # they are counted all the same
                self._cut = True
                self._warn(error, f"{len(lines)} bad examples")

    def _warn(self, error: Exception, what: str) -> None:
        logging.warning("%s cannot be written (%s): %s are not listed", self.path, error, what)


def _of_record(line: dict[str, Any]) -> dict[str, Any] | None:
    return line if isinstance(line.get("source"), str) and isinstance(line.get("record"), int) else None
