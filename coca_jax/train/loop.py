"""The loop and nothing else: batches in, steps, metrics out, checkpoints on the way."""

from __future__ import annotations

import contextlib
import time

import grain
import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from coca_jax import config
from coca_jax.data import pipeline
from coca_jax.data.classes import Task
from coca_jax.data.mixture import Mixture, Schedule
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.sharding import batch_sharding
from coca_jax.train import contents, init
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from coca_jax.train.bookkeeping import Bookkeeping, Dispatched, Due, Evaluator
from coca_jax.train.checkpoint import Checkpoints, rehearse
from coca_jax.train.profile import Profile, Steps
from coca_jax.train.snapshot import Snapshots
from coca_jax.train.state import TrainState
from coca_jax.train.step import compile_step
from coca_jax.train.stopping import Stopped, Stopping


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
    digests: contents.Contents | None = None,
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
      digests: of what the run reads, kept in its checkpoints.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: the tokenizer does not fit the model, or nothing would be trained.
      DataError: more of the examples than `c.data.max_bad` cannot be used.
      Diverged: too many updates had to be left out, or the state is not finite; nothing is saved from then on.
      CheckpointError: the workdir cannot hold checkpoints, or the last state could not be saved.
      Stopped: on SIGTERM or SIGINT, after saving.
    """
    tokenizer.check(c.model.text)
    identity = pipeline.position_key(mixture, seed=c.seed)
    same = {"seed": c.seed} if c.data.accept_changes else identity
    optimizer = optimizers.of_run(c, states.abstract_parameters(c))

    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, c.checkpoint, c.evaluate.best) as checkpoints,
        contextlib.ExitStack() as opened,
    ):
        abstract = states.abstract(c, optimizer, mesh)
        rehearse(workdir, mesh, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)))
        restored = checkpoints.restore(abstract, same)
        state, place = restored or (states.real(c, optimizer, mesh), {"position": 0})
        if begin_with and not restored:
            state = init.with_parameters(state, begin_with)
        kept = identity | ({contents.KEY: digests} if digests else {})
        books = Bookkeeping(c, workdir, mixture, checkpoints, kept, state, place)
        opened.callback(books.close)
        del state  # the books' is the one that is stepped
        first, task = books.first, Task.of(c, labels)
        iterator = iter(_batches(c, mesh, mixture, tokenizer, task, books.schedule, books.position))
        opened.callback(iterator.close)  # its threads would else be torn down with the interpreter, complaining
        if first:
            logging.info("resumed %s at step %d", checkpoints.folder, first)
        step_function = compile_step(c, optimizer, mesh, abstract)
        profile, snapshots = Profile(workdir, profile_steps, first), Snapshots(abstract)
        opened.callback(profile.close)
        try:
            if evaluate and first and not books.make_up(evaluate, stop):
                raise Stopped(f"stopped at step {first} of {c.steps}, where it was before")
            if evaluate and c.evaluate.first and not first and books.evaluate(0, evaluate, stop) is None:
                raise Stopped(f"stopped before the first step of {c.steps}: nothing was there to save")
            for step in range(first + 1, c.steps + 1):
                books.watchdog.begin(step, books.progress.seconds_per_step)
                asked = time.monotonic()
                batch = next(iterator)
                books.position += c.batch_size
                waited = time.monotonic() - asked
                with profile.step(step):
                    books.state, metrics = step_function(
                        books.state, {k: v for k, v in batch.items() if k not in pipeline.HOST_KEYS}
                    )
                stop.unsaved = True
                records = batch["index"]
                books.listed.add(records, batch["reason"])
                books.settle()
                stopping = stop.asked()
                if stopping and books.to_save and not books.to_save.results:
                    books.to_save = None  # this step is saved instead
                if books.to_save:
                    copy = books.to_save.snapshot
                    books.save()
                    copy.drop()  # not the last one of a run, which may have to be saved once more
                books.pending = Dispatched(step, books.position, records, metrics | {"data_wait_seconds": waited})
                if profile.after(step, metrics):
                    books.pause()
                if step == first + 2:
                    snapshots.prepare()

                last, results = step == c.steps, None
                due = bool(evaluate) and (last or bool(c.evaluate.every and step % c.evaluate.every == 0))
                if evaluate and due and not stopping:
                    results = books.evaluate(step, evaluate, stop)
                    stopping, due = results is None, results is None
                best = bool(results) and bool(c.evaluate.best)
                if last or stopping or best or step % c.checkpoint.every == 0 or checkpoints.due(step):
                    copy = snapshots.take(books.state)
                    books.to_save = Due(step, copy, books.position, records, results, not due)
                    if last or stopping or not copy.copied:
                        books.settle()
                        books.pause()
                        books.save()
                if stopping and (due or not last):
                    checkpoints.wait()
                    raise Stopped(f"stopped at step {step} of {c.steps}, saved in {checkpoints.folder}")
            checkpoints.wait()
            stop.unsaved = False
        except Exception:
            # The step after it could not be made. Several processes might not all come here, and would wait for ever.
            if jax.process_count() == 1:
                books.save()
            raise
    return books.state


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
