"""The loop and nothing else: batches in, steps, metrics out, checkpoints on the way."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from coca_jax import config
from coca_jax.data import pipeline
from coca_jax.data import tally as tallies
from coca_jax.data.classes import Task
from coca_jax.data.mixture import Mixture, Schedule
from coca_jax.data.tally import Tally
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.model import flops
from coca_jax.sharding import batch_sharding
from coca_jax.train import init, skipped
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import Progress, Writer
from coca_jax.train.profile import Profile, Steps
from coca_jax.train.skipped import Diverged
from coca_jax.train.snapshot import Snapshot, Snapshots
from coca_jax.train.state import TrainState
from coca_jax.train.step import compile_step
from coca_jax.train.stopping import Interrupted, Stopped, Stopping
from coca_jax.train.watchdog import Watchdog

# Of a state and of what is to be called at every batch: it raises Interrupted where the run is to stop.
Evaluator = Callable[[TrainState, Callable[[], None]], dict[str, float]]


class _Due(NamedTuple):
    """A checkpoint that is to be written: of which step, its state, position in the data and the batch's records, what
    came of the evaluation there, and whether there is none to make up for."""

    step: int
    snapshot: Snapshot
    position: int
    records: np.ndarray
    results: dict[str, float] | None
    evaluated: bool


def train(
    c: config.Config,
    workdir: epath.Path,
    mesh: Mesh,
    mixture: Mixture,
    tokenizer: Tokenizer,
    stop: Stopping,
    evaluate: Evaluator | None = None,
    profile_steps: Steps | None = None,
    begin_with: states.Parameters | None = None,
    labels: tuple[str, ...] = (),
) -> TrainState:
    """Trains to `c.steps`, going on from the newest checkpoint of the workdir if there is one.

    Step N is dispatched before the metrics of step N-1 are read, and before the checkpoint of step N-1 is written, from
    a copy: the host waits for the device and never the other way.

    Args:
      c: configuration, checked.
      workdir: for checkpoints and metrics.
      mesh: of all devices.
      mixture: training data.
      tokenizer: of the captions.
      stop: entered; says when the run is to end.
      evaluate: called every `c.evaluate.every` steps and at the end, with `c.evaluate.first` also before all steps; its
        metrics are written with the step's. One that was left because the run was to stop is made up for by the next
        start.
      profile_steps: traced into `workdir/profile`.
      begin_with: parameters, some of the model's, that a run without a checkpoint begins with.
      labels: the classes that model.head tells apart, by number.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: the tokenizer does not fit the model, or nothing would be trained.
      DataError: more of the examples than `c.data.max_bad` cannot be used.
      Diverged: too many updates had to be left out, or the state is not finite; nothing is saved from then on.
      Stopped: on SIGTERM or SIGINT, after saving.
    """
    tokenizer.check(c.model.text)
    identity = pipeline.position_key(mixture, seed=c.seed)
    optimizer = optimizers.of_run(c, states.abstract_parameters(c))

    with jax.set_mesh(mesh), Checkpoints(workdir, c.checkpoint, c.evaluate.best) as checkpoints:
        abstract = states.abstract(c, optimizer, mesh)
        restored = checkpoints.restore(abstract, identity)
        state, place = restored or (states.real(c, optimizer, mesh), {"position": 0})
        if begin_with and not restored:
            state = init.with_parameters(state, begin_with)
        first, position, tally = int(state.step), int(place["position"]), Tally(place.get("tally"))
        # A changed mixture holds from here on.
        schedule = Schedule.from_json(place.get("schedule", [[0, mixture.weights]])).changed(position, mixture.weights)
        iterator = iter(_batches(c, mesh, mixture, tokenizer, Task.of(c, labels), schedule, position))
        listed = tallies.List(mixture, workdir, jax.process_index())
        left_out = skipped.List(mixture, workdir, first)
        if first:
            logging.info("resumed %s at step %d", checkpoints.folder, first)
        step_function = compile_step(c, optimizer, mesh, abstract)
        evaluated = bool(place.get("evaluated", True))
        writer, progress = Writer(workdir, first, evaluated), Progress(first, c.steps, c.batch_size, flops.of_step(c))
        profile, watchdog = Profile(workdir, profile_steps, first), Watchdog(c.guard, workdir, progress.say)
        snapshots, to_save = Snapshots(abstract), None
        pending: tuple[int, int, np.ndarray, dict[str, Any]] | None = None

        def pause() -> None:
            """Before what is no step."""
            progress.pause()
            watchdog.pause()

        def diverged(at: int, what: str, index: np.ndarray, state: TrainState, position: int) -> Diverged:
            nonlocal to_save
            pause()
            to_save = None
            kept = left_out.keep(at, index, state, placed(position), identity)
            return Diverged(f"step {at}: {what}; {kept}; the last checkpoint is step {checkpoints.latest()}")

        def save(due: _Due) -> None:
            nonlocal to_save
            to_save = None
            settle()
            watchdog.pause()
            saved, place = due.snapshot.state, placed(due.position, due.evaluated)
            if not due.snapshot.finite:  # such a state is never saved
                what = "parameters or optimiser are not finite any more"
                raise diverged(due.step, what, due.records, saved, due.position)
            checkpoints.save(saved, place, identity, due.results)

        def settle() -> None:
            """Reads the metrics of the step before and shows them."""
            nonlocal pending
            if pending is None:
                return
            (at, seen, index, metrics), pending = pending, None
            tally.add(c.batch_size, np.asarray(metrics.pop("problems")))
            metrics = {name: float(value) for name, value in metrics.items()}
            progress.update(at, metrics)
            if at % c.log_every == 0 or at == c.steps:
                epochs = mixture.epochs(schedule.counts(seen))
                writer.write(at, metrics | progress.rates | tally.metrics() | epochs)
            if metrics["guard/in_a_row"]:
                progress.say(left_out.add(at, metrics, index))
                for name, key in (("in_a_row", "max_in_a_row"), ("skipped", "max_skipped")):
                    if 0 < getattr(c.guard, key) <= metrics[f"guard/{name}"]:
                        what = f"{skipped.reason(metrics)}, and config.guard.{key}={getattr(c.guard, key)} is reached: "
                        what += "lower config.optimizer.peak_lr, or look at the data"
                        raise diverged(at, what, index, state, position)
            tally.check(c.data.max_bad, listed.path)

        def placed(position: int, evaluated: bool = True) -> dict[str, Any]:
            """The place in the data, and whether there is an evaluation to make up for."""
            place = {"position": position, "schedule": schedule.to_json(), "tally": tally.to_json()}
            return place if evaluated else place | {"evaluated": False}

        def evaluation(step: int) -> dict[str, float] | None:
            """Makes it; None where the run is to stop before it is done."""
            assert evaluate
            settle()
            pause()
            try:
                results = evaluate(state, stop.check)
            except Interrupted:
                return None
            if results:
                writer.write(step, results)
            return results

        try:
            if evaluate and first and not evaluated and evaluation(first) is None:
                raise Stopped(f"stopped at step {first} of {c.steps}, where it was before")
            if evaluate and c.evaluate.first and not first and evaluation(0) is None:
                raise Stopped(f"stopped before the first step of {c.steps}: nothing was there to save")
            for step in range(first + 1, c.steps + 1):
                watchdog.begin(step, progress.seconds_per_step)
                asked = time.monotonic()
                batch = next(iterator)
                position += c.batch_size
                waited = time.monotonic() - asked
                with profile.step(step):
                    state, metrics = step_function(
                        state, {k: v for k, v in batch.items() if k not in pipeline.HOST_KEYS}
                    )
                stop.unsaved = True
                listed.add(batch["index"], batch["reason"])
                settle()
                stopping = stop.asked()
                if to_save and (to_save.results or not stopping):  # a run that stops saves this step
                    written = to_save.snapshot
                    save(to_save)
                    written.drop()
                to_save = None
                pending = (step, position, batch["index"], metrics | {"data_wait_seconds": waited})
                if profile.after(step, metrics):
                    pause()
                if step == first + 2:
                    snapshots.prepare()

                last, results = step == c.steps, None
                due = bool(evaluate) and (last or bool(c.evaluate.every and step % c.evaluate.every == 0))
                if due and not stopping:
                    results = evaluation(step)
                    stopping, due = results is None, results is None
                if results and c.evaluate.best and c.evaluate.best not in results:
                    # Found out hours into a run: said at every evaluation, and the run goes on.
                    near = ", ".join(difflib.get_close_matches(c.evaluate.best, results, n=3, cutoff=0.0))
                    progress.say(f"config.evaluate.best={c.evaluate.best!r} is not measured; near it: {near}")
                    results = None
                keep_best = bool(results) and bool(c.evaluate.best)
                if last or stopping or keep_best or step % c.checkpoint.every == 0 or checkpoints.due(step):
                    to_save = _Due(step, snapshots.take(state), position, batch["index"], results, not due)
                    if last or stopping or not to_save.snapshot.copied:
                        settle()
                        pause()
                        save(to_save)
                if stopping and (due or not last):
                    checkpoints.wait()
                    raise Stopped(f"stopped at step {step} of {c.steps}, saved in {checkpoints.folder}")
            checkpoints.wait()
            stop.unsaved = False
        except Exception:
            # The step after it could not be made. Several processes might not all come here, and would wait for ever.
            if to_save and jax.process_count() == 1:
                save(to_save)
            raise
        finally:
            watchdog.close()
            profile.close()
            iterator.close()  # its threads would else be torn down with the interpreter, complaining
            writer.close()
            progress.close()
    return state


def _batches(
    c: config.Config,
    mesh: Mesh,
    source: Mixture,
    tokenizer: Tokenizer,
    task: Task,
    schedule: Schedule,
    position: int,
) -> grain.IterDataset:
    """Global batches on the mesh, from a position of the data's stream on; each process reads its rows of them."""
    place = batch_sharding(mesh)
    loader = pipeline.train_loader(
        source,
        tokenizer,
        c.data,
        image_size=c.model.image.size,
        length=c.model.text.length,
        batch_size=c.batch_size,
        seed=c.seed,
        schedule=schedule,
        rows=pipeline.process_rows(place, c.batch_size),
        start=position,
        task=task,
    )
    return pipeline.place(loader, place, c.batch_size, c.data.prefetch)
