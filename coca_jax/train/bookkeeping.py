"""What is read, written and saved of the steps, each of them when the next is under way."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from coca_jax import config
from coca_jax.data import tally as tallies
from coca_jax.data.mixture import Mixture, Schedule
from coca_jax.data.tally import Tally
from coca_jax.model import flops
from coca_jax.train import skipped
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import Progress, Writer
from coca_jax.train.skipped import Diverged
from coca_jax.train.snapshot import Snapshot
from coca_jax.train.state import TrainState
from coca_jax.train.stopping import Interrupted, Stopping
from coca_jax.train.watchdog import Watchdog

# Of a state and of what is to be called at every batch: it raises Interrupted where the run is to stop.
Evaluator = Callable[[TrainState, Callable[[], None]], dict[str, float]]


class Dispatched(NamedTuple):
    """A step whose metrics are still to be read: its number, position in the data after it, its batch's records."""

    step: int
    position: int
    records: np.ndarray
    metrics: dict[str, Any]


class Due(NamedTuple):
    """A checkpoint that is to be written: of which step, its state, position in the data and the batch's records, what
    came of the evaluation there, and whether there is none to make up for."""

    step: int
    snapshot: Snapshot
    position: int
    records: np.ndarray
    results: dict[str, float] | None
    evaluated: bool


class Bookkeeping:
    """Metrics, the data's place, lists of what could not be used, checkpoints: all that a run keeps of its steps.

    Attributes:
      state, position: the newest, dispatched or not; the loop sets them.
      first: the step that the run goes on after.
      schedule: of the mixture's weights, by position.
      pending: the step whose metrics are to be read next; the loop sets it.
      to_save: the checkpoint to be written beside the next step; the loop sets it.
      writer, progress, watchdog, listed: of metrics; the progress line; of slow steps; of examples that cannot be used.
    """

    def __init__(
        self,
        c: config.Config,
        workdir: epath.Path,
        mixture: Mixture,
        checkpoints: Checkpoints,
        identity: dict[str, Any],
        state: TrainState,
        place: dict[str, Any],
    ) -> None:
        """
        Args:
          c: configuration.
          workdir: for metrics and lists.
          mixture: training data.
          checkpoints: of the workdir.
          identity: saved with every checkpoint: the data's order, see `pipeline.position_key`, and digests of them.
          state: that the run begins with.
          place: where in the data it does, as a checkpoint has it.
        """
        self._c, self._mixture, self._checkpoints, self._identity = c, mixture, checkpoints, identity
        self.state, self.position, self.first = state, int(place["position"]), int(state.step)
        self._tally = Tally(place.get("tally"))
        # A changed mixture holds from here on.
        begun = Schedule.from_json(place.get("schedule", [[0, mixture.weights]]))
        self.schedule = begun.changed(self.position, mixture.weights)
        self._evaluated = bool(place.get("evaluated", True))
        self.listed = tallies.List(mixture, workdir, jax.process_index())
        self._left_out = skipped.List(mixture, workdir, self.first)
        self.writer = Writer(workdir, self.first, self._evaluated)
        self.progress = Progress(self.first, c.steps, c.batch_size, flops.train_step_flops(c))
        self.watchdog = Watchdog(c.guard, workdir, self.progress.say)
        self.pending: Dispatched | None = None
        self.to_save: Due | None = None

    def pause(self) -> None:
        """Before what is no step."""
        self.progress.pause()
        self.watchdog.pause()

    def settle(self) -> None:
        """Reads the metrics of the step before and shows them.

        Raises:
          DataError: more of the examples than `c.data.max_bad` cannot be used.
          Diverged: too many updates had to be left out.
        """
        if self.pending is None:
            return
        (at, seen, records, metrics), self.pending, c = self.pending, None, self._c
        self._tally.add(c.batch_size, np.asarray(metrics.pop("problems")))
        metrics = {name: float(value) for name, value in metrics.items()}
        self.progress.update(at, metrics)
        if at % c.log_every == 0 or at == c.steps:
            epochs = self._mixture.epochs(self.schedule.counts(seen))
            self.writer.write(at, metrics | self.progress.rates | self._tally.metrics() | epochs)
        if metrics["guard/in_a_row"]:
            self.progress.say(self._left_out.add(at, metrics, records))
            for name, key in (("in_a_row", "max_in_a_row"), ("skipped", "max_skipped")):
                if 0 < getattr(c.guard, key) <= metrics[f"guard/{name}"]:
                    what = f"{skipped.reason(metrics)}, and config.guard.{key}={getattr(c.guard, key)} is reached: "
                    what += "lower config.optimizer.peak_lr, or look at the data"
                    raise self._diverged(at, what, records, self.state, self.position)
        self._tally.check(c.data.max_bad, self.listed.path)

    def evaluate(self, step: int, evaluator: Evaluator, stop: Stopping) -> dict[str, float] | None:
        """Makes an evaluation of the newest state and writes its metrics.

        Returns:
          The metrics; None where the run is to stop before it is done; none where the one that tells which checkpoint
          is the best is not among them.
        """
        self.settle()
        self.pause()
        try:
            results = evaluator(self.state, stop.check)
        except Interrupted:
            return None
        if not results:
            return results
        self.writer.write(step, results)
        best = self._c.evaluate.best
        if best and best not in results:
            # Found out hours into a run: said at every evaluation, and the run goes on.
            near = ", ".join(difflib.get_close_matches(best, results, n=3, cutoff=0.0))
            self.progress.say(f"config.evaluate.best={best!r} is not measured; near it: {near}")
            return {}
        return results

    def make_up(self, evaluator: Evaluator, stop: Stopping) -> bool:
        """Makes the evaluation that the checkpoint was saved without. False: the run is to stop before it is done."""
        if self._evaluated:
            return True
        results = self.evaluate(self.first, evaluator, stop)
        if results is not None:
            self._checkpoints.was_evaluated(self.first, results)
        return results is not None

    def save(self) -> None:
        """Writes the checkpoint that is due, if one is.

        Raises:
          Diverged: the state is not finite.
        """
        if self.to_save is None:
            return
        due, self.to_save = self.to_save, None
        self.settle()
        self.watchdog.pause()
        saved, place = due.snapshot.state, self._place(due.position, due.evaluated)
        if not due.snapshot.finite:  # such a state is never saved
            what = "parameters or optimiser are not finite any more"
            raise self._diverged(due.step, what, due.records, saved, due.position)
        self._checkpoints.save(saved, place, self._identity, due.results)

    def close(self) -> None:
        """Ends the watching, the files and the line."""
        self.watchdog.close()
        self.writer.close()
        self.progress.close()

    def _place(self, position: int, evaluated: bool = True) -> dict[str, Any]:
        """The place in the data, and whether there is an evaluation to make up for."""
        place = {"position": position, "schedule": self.schedule.to_json(), "tally": self._tally.to_json()}
        return place if evaluated else place | {"evaluated": False}

    def _diverged(self, at: int, what: str, records: np.ndarray, state: TrainState, position: int) -> Diverged:
        """Keeps what people will want to look at; nothing is saved from then on."""
        self.pause()
        self.to_save = None
        kept = self._left_out.keep(at, records, state, self._place(position), self._identity)
        return Diverged(f"step {at}: {what}; {kept}; the last checkpoint is step {self._checkpoints.latest()}")
