"""A whole run, as `main` starts it: check, train or resume, evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from coca_jax import commandline, config, distributed, peers, sharding, start, supervise
from coca_jax.config import ConfigError
from coca_jax.data import classes, preview, sources
from coca_jax.data.addresses import remedy
from coca_jax.data.classes import Task
from coca_jax.data.mixture import Mixture, open_mixture
from coca_jax.data.readers import ReaderLost
from coca_jax.data.records import DataError, named_in
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import asked, report, tables
from coca_jax.evaluator import Evaluator
from coca_jax.train import checkpoint, contents, loop, stopping
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from coca_jax.train.profile import Steps, read_steps
from coca_jax.train.skipped import Diverged


def run(
    values: Mapping[str, Any],
    workdir: str,
    *,
    evaluate_only: bool = False,
    profile: str = "",
    processes: Mapping[str, str] | None = None,
    timeout: float = distributed.TIMEOUT,
    heartbeat: int = distributed.HEARTBEAT,
) -> int | str:
    """Trains (or only evaluates) and writes the report. Each process of a job calls it with the same arguments.

    Args:
      values: the configuration, a ConfigDict.
      workdir: folder or bucket.
      evaluate_only: evaluate the newest checkpoint instead of training.
      profile: steps to trace, `start:stop`; empty: none.
      processes: flags of `distributed.initialize`; None or empty values: as the environment says.
      timeout: seconds to wait for the other processes.
      heartbeat: seconds of silence after which one of them is taken for lost, and the others end.

    Returns:
      What to exit with: 0, EXIT_STOPPED, EXIT_LOST where the others did not come, or what is wrong, in a line or a
      list. In a job of several processes, one in which something is wrong prints that and ends here, so that the others
      do not wait for it.
    """
    started, beating = time.monotonic(), supervise.Beating()
    commandline.quiet()
    try:
        c = config.from_config_dict(values)
        config.check(c)
        supervise.end_with_supervisor(c.checkpoint.grace)
        profile_steps = read_steps(profile, c.steps)
        distributed.initialize(processes, timeout, heartbeat)
        with stopping.Stopping(c.checkpoint.grace) as stop:
            config.check(c, jax.device_count(), slice_count=sharding.slice_count(), platform=jax.default_backend())
            return _run(c, checkpoint.workdir_at(workdir), evaluate_only, profile_steps, started, stop, beating)
    except stopping.Stopped as stopped:
        _say(stopped)
        return stopping.EXIT_STOPPED
    except distributed.Absent as error:
        print(f"error: {error}", file=sys.stderr)
        return distributed.EXIT_LOST
    except ReaderLost as error:
        print(distributed.leave(f"error: {error}", distributed.EXIT_LOST), file=sys.stderr)
        return distributed.EXIT_LOST
    except (ConfigError, DataError, checkpoint.CheckpointError, Diverged, distributed.DistributedError) as error:
        return distributed.leave(f"error: {error}")
    except Exception as error:
        if distributed.lost(error):
            distributed.wait_for_verdict(error, heartbeat)
        distributed.leave(traceback.format_exc())
        raise


def _run(
    c: config.Config,
    workdir: epath.Path,
    evaluate_only: bool,
    profile_steps: Steps | None,
    started: float,
    stop: stopping.Stopping,
    beating: supervise.Beating,
) -> int | str:
    slices = sharding.slice_count()
    shape = config.mesh_shape(c.mesh, jax.device_count(), slice_count=slices)
    mesh = sharding.make_mesh(shape, dcn=config.dcn_shape(c.mesh, slices))
    if not c.data.train:
        raise ConfigError(
            "config.data.train is empty: set it to a source, e.g. --config.data.train=emoji:train (built in, prepared "
            "by `python -m coca_jax.data.prepare emoji`) or --config.data.train=array_record:/data/train-*.array_record"
        )
    with named_in("data.train", c.data.train):
        source = open_mixture(c.data.train)
    place = checkpoint.saved_place(workdir)
    labels = _labels(c, source, workdir, place)
    if labels:
        head = dataclasses.replace(c.model.head, classes=len(labels))
        c = dataclasses.replace(c, model=dataclasses.replace(c.model, head=head))
    begun = start.read(c, workdir, mesh, labels, parameters=not evaluate_only)
    c = begun.config
    config.check(c, jax.device_count(), slice_count=slices, platform=jax.default_backend())
    tokenizer = _tokenizer(c, source, begun.tokenizer, workdir, place)
    tokenizer.check(c.model.text)
    held_out = asked.open_sources(c.evaluate)
    asked.check(c, held_out, source)
    digests = contents.of_run(tokenizer, labels, source.sources, held_out.values())
    abstract = states.abstract_parameters(c)
    optimizers.of_run(c, abstract)  # says what is wrong with its patterns
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.asdict(c))
    distributed.check_same(
        {"config." + sharding.path_of(path).replace("/", "."): value for path, value in leaves}
        | {f"the content of {name}": value for name, value in contents.in_short(digests).items()}
        | {f"the fingerprint of {s.name}": s.fingerprint() for s in (source, *held_out.values())}
        | {"the version of jax": jax.__version__, "evaluation alone": evaluate_only}
    )
    lines = [] if evaluate_only else _preview(c, source, tokenizer, labels)
    _begin(c, workdir, tokenizer, labels, None if evaluate_only else stop.held)

    sharding.warn_unsharded(abstract, mesh)
    parameters = states.parameter_count(abstract)
    evaluator = Evaluator(c, workdir, mesh, source, held_out, tokenizer, labels=labels)
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    of_processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    _say(f"{parameters / 1e6:.1f}M parameters, {devices}{of_processes}, mesh {dict(mesh.shape)}")
    page = workdir / report.REPORT_FILE
    with checkpoint.Checkpoints(workdir) as found:
        at, reported = distributed.gather([found.latest(), page.is_file()])[0]
    beating.goes_on_from(at or 0)
    peers.newest_checkpoint = at
    if at == c.steps and reported and not evaluate_only:
        _say(f"complete: {workdir} has been trained to step {at}; the report is {page}")
        return 0
    if not evaluate_only:
        contents.check(place, digests, accept=c.data.accept_changes)
    if evaluate_only:
        if jax.process_count() > 1:  # JAX keeps the signal for a training that could save
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        results = evaluator.from_checkpoint()
    else:
        if lines:
            _say("\n".join(lines))
        begun.tell(workdir)
        state = loop.train(
            *(c, workdir, mesh, source, tokenizer, stop, evaluator, profile_steps, begun.params, labels, digests)
        )
        results = evaluator.results or evaluator.of(state)
    if distributed.is_first():
        seconds = time.monotonic() - started
        if evaluator.first is not None:
            print("before training:\n" + "\n".join(tables.summary(c, evaluator.first)) + "\nafter training:")
        print("\n".join(tables.summary(c, results.metrics)))
        try:
            report.write(workdir, c, results, parameters=parameters, seconds=seconds, attribution=source.attribution)
        except OSError as error:
            done = "the figures are those above" if evaluate_only else "the model is trained and saved"
            fix = f"{remedy(str(error))}, and start again to write it"
            return f"error: the report cannot be written ({error}); {done}: {fix}"
        print(f"report: {page}")
    return 0


def _begin(
    c: config.Config,
    workdir: epath.Path,
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
    held: contextlib.ExitStack | None,
) -> None:
    """Makes the workdir, or sees that it is this run's: by the first process; then all see that it is one folder.

    Args:
      held: what holds the workdir's lock until the run ends; None: the workdir is only read, and may be in use.

    Raises:
      ConfigError: it cannot be made, is another run's or in use by one, or the processes do not share it.
    """
    problem, kept, path = "", "", workdir / checkpoint.CONFIG_FILE
    if distributed.is_first():
        try:
            if held is None:
                checkpoint.check_config(workdir, c)
            else:
                workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(checkpoint.Lock(workdir))
                checkpoint.keep_config(workdir, c)
                contents.keep(workdir / checkpoint.TOKENIZER_FILE, tokenizer.to_bytes())
                if labels:
                    contents.keep(workdir / classes.FILE, classes.to_bytes(labels))
            kept = path.read_text()
        except OSError as error:
            problem = f"--workdir={workdir} cannot be made or written: {error}"
        except (ConfigError, checkpoint.CheckpointError, checkpoint.Locked) as error:
            problem = str(error)
    problem, kept = distributed.gather([problem, kept])[0]
    if problem:
        raise ConfigError(problem)
    deadline = time.monotonic() + 30
    # A network folder may show what another host has written some seconds later.
    while not (seen := path.exists() and path.read_text() == kept) and time.monotonic() < deadline:
        time.sleep(0.5)
    if blind := [str(index) for index, sees in enumerate(distributed.gather(seen)) if not sees]:
        raise ConfigError(
            f"--workdir={workdir} is not one folder: what process 0 wrote into it is not seen by process "
            f"{', '.join(blind)}; checkpoints need a folder or bucket that all hosts share"
        )


def _say(text: object) -> None:
    """Prints, from the first process."""
    if distributed.is_first():
        print(text)


def _preview(c: config.Config, source: Mixture, tokenizer: Tokenizer, labels: tuple[str, ...]) -> list[str]:
    """Returns what the source says of its files, and some captions as the model will read them, for the first process.

    Raises:
      ConfigError: the captions are to be made of labels that are no names.
    """
    problem, lines = "", list[str]()
    if distributed.is_first():
        try:
            lines = preview.preview(source, tokenizer, c.model.text.length) if Task.of(c, labels).texts else []
        except DataError as error:
            problem = f"config.data.train: {error}"
    if problem := distributed.gather(problem)[0]:
        raise ConfigError(problem)
    return [*source.remarks, *(["captions as the model reads them:"] if lines else []), *lines]


def _labels(c: config.Config, source: sources.Source, workdir: epath.Path, place: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of model.head, by number, the same in all processes; none without it.

    Raises:
      ConfigError: they are not to be found, or not as many as model.head.classes says.
    """
    if not c.loss.lambda_cls:
        return ()
    found: Any = ((), "")
    if distributed.is_first():
        try:
            found = (
                contents.own_labels(
                    *(workdir, c.data.classes, lambda: classes.of_source(source), place), accept=c.data.accept_changes
                ),
                "",
            )
        except (ConfigError, DataError) as error:
            found = (), str(error)
    labels, problem = distributed.gather(found)[0]
    if not problem and c.model.head.classes not in (0, len(labels)):
        where = f"{c.data.classes} has" if c.data.classes else "the labels are"
        problem = f"config.model.head.classes={c.model.head.classes}, and {where} {len(labels)}: leave it 0"
    if problem:
        raise ConfigError(problem)
    return tuple(labels)


def _tokenizer(
    c: config.Config,
    source: sources.Source,
    begun_with: Tokenizer | None,
    workdir: epath.Path,
    place: Mapping[str, Any],
) -> Tokenizer:
    if begun_with is not None and not c.data.tokenizer:
        given, name = begun_with, f"the vocabulary of config.init.checkpoint={c.init.checkpoint!r}"
        return contents.own_tokenizer(workdir, given, name, place, accept=c.data.accept_changes)
    path = c.data.tokenizer or source.tokenizer_path
    if not path:
        raise ConfigError(
            f"config.data.tokenizer is empty and {c.data.train!r} brings none: set it to a vocabulary's file; "
            "python -m coca_jax.data.prepare convert with --vocab_size=N trains one (docs/data.md)"
        )
    name = f"config.data.tokenizer={path!r}" if c.data.tokenizer else f"{path}, which config.data.train brings,"
    return contents.own_tokenizer(workdir, Tokenizer(path), name, place, accept=c.data.accept_changes)
