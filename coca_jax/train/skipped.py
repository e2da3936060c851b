"""Which updates were left out, and what is kept when a run stops for them: for people to look at afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from coca_jax import config
from coca_jax.data import side_files
from coca_jax.data.mixture import Mixture
from coca_jax.data.records import BadExample
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import keep_until
from coca_jax.train.state import TrainState

SKIPPED_FILE = "skipped_steps.jsonl"
FOLDER = "diverged"


class Diverged(RuntimeError):
    """Too many updates were not finite or spikes, or the state is not finite. The message names step and files."""


class List:
    """A JSON line for each step whose update was left out: why, the loss, the gradient's norm, the batch's records.

    Each process lists the rows that it has read, in a file of its own. Lines of steps that are made again are dropped.
    """

    def __init__(self, source: Mixture, workdir: epath.Path, start_step: int) -> None:
        self._process, self._workdir, self._source = jax.process_index(), workdir, source
        name = SKIPPED_FILE if not self._process else f"skipped_steps-{self._process:05d}.jsonl"
        self.path = workdir / name
        if side_files.is_there(self.path):
            try:
                keep_until(self.path, start_step)
            except Exception as error:  # OSError, and what libraries for buckets raise
                logging.warning("%s cannot be written (%s): the run goes on", self.path, error)

    def add(self, step: int, metrics: Mapping[str, float], index: np.ndarray) -> str:
        """Lists a step; returns what to say of it, in a line.

        Args:
          step: its number.
          metrics: of the step.
          index: int64 `[b]`, the records that this process read for it.
        """
        why, norm, bound = reason(metrics), metrics["gradient_norm"], metrics["guard/bound"]
        records: dict[str, list[int]] = {}
        for at in index.tolist():
            number, record = self._source.locate(at)
            records.setdefault(self._source.sources[number].name, []).append(record)
        numbers = {"loss": metrics["loss"], "gradient_norm": norm, "bound": bound}
        line = {"step": step, "reason": why} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        where = f"its records are in {self.path}"
        try:
            side_files.make_room(self.path)
            with self.path.open("a") as file:
                file.write(side_files.as_line(line | {"records": records}))
        except Exception as error:
            where = f"{self.path} cannot be written ({error})"
        said = f"the update of step {step} is left out: {why}, {metrics['guard/in_a_row']:.0f} in a row, "
        return said + f"{metrics['guard/skipped']:.0f} in all; {where}"

    def keep(
        self, step: int, index: np.ndarray, state: TrainState, place: dict[str, Any], identity: dict[str, Any]
    ) -> str:
        """Writes the records of a step's batch and the state beside the run; says where. All processes call it.

        Args:
          step: whose batch it is.
          index: as in `add`.
          state: of the last accepted step; a later start does not go on from it.
          place, identity: as Checkpoints.save takes them.
        """
        folder = self._workdir / FOLDER
        path = folder / f"batch-{step}-{self._process:05d}.jsonl"
        lines = []
        for at in index.tolist():
            number, record = self._source.locate(at)
            source = self._source.sources[number]
            try:
                key = source[record].key
            except BadExample:
                key = None
            lines.append({"source": source.name, "record": record, "key": key})
        records = f"{path} has the records of its batch"
        try:
            side_files.make_room(folder, folder=True)
            folder.mkdir(parents=True, exist_ok=True)
            side_files.write_lines(path, lines)
        except Exception as error:  # of whatever kind a disk or a bucket has: why the run stops matters more
            records = f"{path} could not be written ({error})"
        try:
            with Checkpoints(folder, config.Checkpoint(keep=1)) as checkpoints:
                checkpoints.save(state, place, identity)
                checkpoints.wait()
        except Exception as error:
            logging.error("%s: the state could not be written: %s", folder, error)
            return f"{records}; the state could not be written ({error})"
        return f"{records}, {folder / 'checkpoints'} the state"


def reason(metrics: Mapping[str, float]) -> str:
    """Why a step was not accepted."""
    if not math.isfinite(metrics["loss"]):
        return f"the loss is {metrics['loss']}"
    norm, bound = metrics["gradient_norm"], metrics["guard/bound"]
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    if norm > bound:
        return f"the gradient's norm {norm:.3g} is a spike, above {bound:.3g}"
    return "the run is to stop"
