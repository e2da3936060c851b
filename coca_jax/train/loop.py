"""The loop and nothing else: batches in, steps, metrics out, checkpoints on the way."""

from __future__ import annotations

import difflib
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from coca_jax import config
from coca_jax.data import pipeline
from coca_jax.data import tally as tallies
from coca_jax.data.mixture import Mixture, Schedule
from coca_jax.data.tally import Tally
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.model import flops
from coca_jax.sharding import batch_sharding
from coca_jax.train import init
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import Progress, Writer
from coca_jax.train.profile import Profile, Steps
from coca_jax.train.state import TrainState
from coca_jax.train.step import compile_step

Evaluator = Callable[[TrainState], dict[str, float]]


class NotFinite(RuntimeError):
    """The loss became infinite or not-a-number. The message names the step; the last checkpoint is from before it."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), saved its state, and can go on from there."""


def train(
    c: config.Config,
    workdir: epath.Path,
    mesh: Mesh,
    mixture: Mixture,
    tokenizer: Tokenizer,
    evaluate: Evaluator | None = None,
    profile_steps: Steps | None = None,
    begin_with: states.Parameters | None = None,
) -> TrainState:
    """Trains to `c.steps`, going on from the newest checkpoint of the workdir if there is one.

    Step N is dispatched before the metrics of step N-1 are read: the host waits for the device and never the other way.

    Args:
      c: configuration, checked.
      workdir: for checkpoints and metrics.
      mesh: of all devices.
      mixture: training data.
      tokenizer: of the captions.
      evaluate: called every `c.evaluate.every` steps and at the end; its metrics are written with the step's.
      profile_steps: traced into `workdir/profile`.
      begin_with: parameters, some of the model's, that a run without a checkpoint begins with.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: the tokenizer does not fit the model, or nothing would be trained.
      DataError: more of the examples than `c.data.max_bad` cannot be used.
      NotFinite: the loss is not a number any more; nothing is saved from then on.
      Stopped: on SIGTERM or SIGINT, after saving.
    """
    tokenizer.check(c.model.text)
    identity = pipeline.position_key(mixture, seed=c.seed)
    optimizer = optimizers.make_optimizer(c.optimizer, c.steps, states.abstract_parameters(c))

    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, c.checkpoint, c.evaluate.best) as checkpoints,
        _stop_signals() as asked_to_stop,
    ):
        abstract = states.abstract(c, optimizer, mesh)
        restored = checkpoints.restore(abstract, identity)
        state, place = restored or (states.real(c, optimizer, mesh), {"position": 0})
        if begin_with and not restored:
            state = init.with_parameters(state, begin_with)
        first, position, tally = int(state.step), int(place["position"]), Tally(place.get("tally"))
        # A changed mixture holds from here on.
        schedule = Schedule.from_json(place.get("schedule", [[0, mixture.weights]])).changed(position, mixture.weights)
        iterator = iter(_batches(c, mesh, mixture, tokenizer, schedule, position))
        listed = tallies.List(mixture, workdir, jax.process_index())
        if first:
            logging.info("resumed %s at step %d", checkpoints.folder, first)
        step_function = compile_step(c, optimizer, mesh, abstract)
        writer, progress = Writer(workdir, first), Progress(first, c.steps, c.batch_size, flops.of_step(c))
        profile = Profile(workdir, profile_steps, first)
        pending: tuple[int, int, dict[str, Any]] | None = None

        def settle() -> None:
            """Reads the metrics of the step before and shows them."""
            nonlocal pending
            if pending is None:
                return
            (at, seen, metrics), pending = pending, None
            tally.add(c.batch_size, np.asarray(metrics.pop("problems")))
            metrics = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(metrics["loss"]):
                raise NotFinite(
                    f"the loss of step {at} is {metrics['loss']}; the last checkpoint, step {checkpoints.latest()}, is "
                    "from before it: lower config.optimizer.peak_lr, or look at the data"
                )
            progress.update(at, metrics)
            if at % c.log_every == 0 or at == c.steps:
                epochs = mixture.epochs(schedule.counts(seen))
                writer.write(at, metrics | progress.rates | tally.metrics() | epochs)
            tally.check(c.data.max_bad, listed.path)

        try:
            for step in range(first + 1, c.steps + 1):
                asked = time.monotonic()
                batch = next(iterator)
                position += c.batch_size
                waited = time.monotonic() - asked
                with profile.step(step):
                    state, metrics = step_function(
                        state, {k: v for k, v in batch.items() if k not in pipeline.HOST_KEYS}
                    )
                listed.add(batch["index"], batch["reason"])
                settle()
                pending = (step, position, metrics | {"data_wait_seconds": waited})
                if profile.after(step, metrics):
                    progress.pause()

                last, results = step == c.steps, None
                stopping = asked_to_stop(step) and not last
                if evaluate and not stopping and (last or (c.evaluate.every and step % c.evaluate.every == 0)):
                    settle()
                    progress.pause()
                    results = evaluate(state)
                    if results:
                        writer.write(step, results)
                if results and c.evaluate.best and c.evaluate.best not in results:
                    # Found out hours into a run: said at every evaluation, and the run goes on.
                    near = ", ".join(difflib.get_close_matches(c.evaluate.best, results, n=3, cutoff=0.0))
                    progress.say(f"config.evaluate.best={c.evaluate.best!r} is not measured; near it: {near}")
                    results = None
                keep_best = bool(results) and bool(c.evaluate.best)
                if last or stopping or keep_best or step % c.checkpoint.every == 0 or checkpoints.due(step):
                    settle()  # a state whose loss is not finite is never saved
                    progress.pause()
                    place = {"position": position, "schedule": schedule.to_json(), "tally": tally.to_json()}
                    checkpoints.save(state, place, identity, results)
                if stopping:
                    checkpoints.wait()
                    raise Stopped(f"stopped at step {step} of {c.steps}, saved in {checkpoints.folder}")
            checkpoints.wait()
        finally:
            profile.close()
            iterator.close()  # its threads would else be torn down with the interpreter, complaining
            writer.close()
            progress.close()
    return state


def _batches(
    c: config.Config, mesh: Mesh, source: Mixture, tokenizer: Tokenizer, schedule: Schedule, position: int
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
    )
    return pipeline.place(loader, place, c.batch_size, c.data.prefetch)


@contextmanager
def _stop_signals() -> Iterator[Callable[[int], bool]]:
    """SIGTERM and the first SIGINT ask the run to stop; a second SIGINT interrupts as usual.

    Yields a function of the step that has been made: whether to stop after it. With several processes it is to be
    called at every step, and one that is asked stops all of them after one and the same step.
    """
    several = jax.process_count() > 1
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)

    before: dict[signal.Signals, Any] = {}
    try:
        # With several processes SIGTERM is JAX's: it tells the others, and all agree on a step that none has made yet.
        for name in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            before[name] = signal.signal(name, note)
    except ValueError:  # not in the main thread (a notebook's worker): signals are not ours to take
        pass
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
