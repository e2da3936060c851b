"""The folder of a workdir's checkpoints: which steps there are, which are kept, which are set aside."""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any

from absl import logging
from etils import epath

from coca_jax import config
from coca_jax.data import side_files
from coca_jax.train.checkpoint import manifest
from coca_jax.train.checkpoint.paths import is_bucket, one_line

UNFINISHED = ".orbax-checkpoint-tmp"  # in the names that Orbax gives
ASIDE = ".quarantined"  # and in those of damaged steps
REASON = "reason.txt"
EVALUATION = "evaluation.json"  # in a step that was saved before its evaluation was made


class Folder:
    """Steps by their number. `begin`, `prepare`, `set_aside` and `remove_old` are for the first process alone."""

    def __init__(self, path: epath.Path, c: config.Checkpoint | None, best: str) -> None:
        self.path, self._c, self._best = path, c, best
        self._good: set[int] = set()  # seen to be whole by this run
        self._bad: set[int] = set()  # seen to be damaged, and impossible to rename
        self._metrics: dict[int, dict[str, float] | None] = {}

    def all(self) -> list[int]:
        """Those that have appeared, in order. Raises OSError where the storage does not answer."""
        try:
            names = [path.name for path in self.path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = sorted(int(name) for name in names if name.isdecimal())
        if is_bucket(self.path):  # there a step is written in its place, and whole once the marker is there
            steps = [step for step in steps if (self.path / str(step) / manifest.MARKER).exists()]
        return [step for step in steps if step not in self._bad]

    def aside(self) -> list[str]:
        """Names of the damaged steps."""
        try:
            return sorted(path.name for path in self.path.iterdir() if ASIDE in path.name)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def begin(self) -> None:
        """Makes the folder, and removes what killed saves have left. What goes wrong is met again when saving."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.iterdir():
                if UNFINISHED in path.name:
                    path.rmtree()
                elif path.name.isdecimal() and int(path.name) not in self.all():
                    path.rmtree()  # in a bucket: a step without its marker

    def prepare(self, step: int) -> tuple[bool, str]:
        """Sees that a step can be written.

        Returns:
          Whether it is there already; and what is wrong, or nothing.
        """
        probe = self.path / f"probe-{uuid.uuid4().hex[:8]}{UNFINISHED}"
        try:
            if step in self.all():
                return True, ""
            self.path.mkdir(exist_ok=True)  # not its parents: where a mount has vanished, they are another disk's
            self._remove_unfinished(step)
            probe.write_bytes(bytes(1 << 12))
            probe.unlink()
        except Exception as error:  # of buckets, of many kinds
            with contextlib.suppress(Exception):
                probe.unlink(missing_ok=True)
            return False, one_line(error)
        return False, ""

    def unfinished(self, step: int) -> epath.Path:
        """Where a step is being written."""
        for path in self.path.iterdir():
            if _unfinished_step(path) == step:
                return path
        return self.path / str(step)

    def _remove_unfinished(self, step: int) -> None:
        for path in list(self.path.iterdir()):
            if _unfinished_step(path) == step:
                path.rmtree()

    def set_aside(self, step: int, reason: str) -> epath.Path | None:
        """Renames a damaged step, so that it is never taken again, and removes what was not finished of it.

        Returns:
          Where it is now; None where there is none, or where it cannot be renamed.
        """
        with contextlib.suppress(Exception):
            self._remove_unfinished(step)
        folder = self.path / str(step)
        try:
            if not folder.exists():
                return None
            names = {path.name for path in self.path.iterdir()}
            number = next(n for n in range(1, len(names) + 2) if f"{step}{ASIDE}-{n}" not in names)
            where = self.path / f"{step}{ASIDE}-{number}"
            folder.rename(where)
        except Exception as error:
            self._bad.add(step)
            logging.warning("%s cannot be renamed (%s)", folder, one_line(error))
            return None
        self._good.discard(step)
        with contextlib.suppress(Exception):
            (where / REASON).write_text(reason + "\n")
        return where

    def is_good(self, step: int, metrics: dict[str, float] | None = None) -> None:
        """A step was read and is what was saved."""
        self._good.add(step)
        self._bad.discard(step)
        if metrics:
            self._metrics[step] = metrics

    def was_evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps with a step what an evaluation of it gave that was made after the step was saved."""
        path = self.path / str(step) / EVALUATION
        try:
            side_files.write_text(path, json.dumps(metrics))
        except Exception as error:  # of buckets, of many kinds; then the next start makes it again
            logging.warning("%s cannot be written: %s", path, one_line(error))
        self._metrics[step] = metrics

    def remove_old(self) -> None:
        """Removes the steps that are not to be kept, and what was not finished of earlier ones.

        None before the newest one was seen to be good.
        """
        try:
            steps = self.all()
            assert self._c
            if not self._good or steps[-1] not in self._good:
                return
            keep = {*steps[-self._c.keep :], *self._best_of(steps), max(self._good)}
            for step in steps:
                if step not in keep:
                    (self.path / str(step)).rmtree()
            # A save that failed leaves writes that were begun with the one that did, and may end after `set_aside`.
            for path in list(self.path.iterdir()):
                if (unfinished := _unfinished_step(path)) is not None and unfinished < max(self._good):
                    path.rmtree()
        except Exception as error:
            logging.warning("%s: an old checkpoint cannot be removed: %s", self.path, one_line(error))

    def _best_of(self, steps: list[int]) -> list[int]:
        assert self._c
        if not self._best or not self._c.keep_best:
            return []
        for step in steps:
            if step not in self._metrics:
                self._metrics[step] = read_metrics(self.path / str(step))
        less = any(word in self._best for word in ("loss", "rank", "perplexity"))
        values = {step: found[self._best] for step in steps if (found := self._metrics[step]) and self._best in found}
        return sorted(values, key=lambda step: (-values[step] if less else values[step], step))[-self._c.keep_best :]


def _unfinished_step(path: epath.Path) -> int | None:
    """Of which step this is an unfinished folder; None where it is of none."""
    number, unfinished, _ = path.name.partition(UNFINISHED)
    return int(number) if unfinished and number.isdecimal() else None


def read_metrics(folder: epath.Path) -> dict[str, float] | None:
    """Of the evaluation of a step, whether it was saved with it or made later."""
    for path in (folder / "metrics" / "metrics", folder / EVALUATION):
        with contextlib.suppress(side_files.Unreadable):
            found = side_files.read_json(path)
            if isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values()):
                return found
    return None


def read_place(folder: epath.Path) -> dict[str, Any]:
    """The place in the data that a step was saved with. Raises OSError, ValueError, RecursionError."""
    place: dict[str, Any] = json.loads((folder / "data" / "metadata").read_text())
    if read_metrics(folder) is not None:
        place.pop("evaluated", None)  # it was, when the step had been saved
    return place
