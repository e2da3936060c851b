"""A whole run, as `main` starts it: check, train or resume, evaluate, report."""

from __future__ import annotations

import dataclasses
import logging as std_logging
import signal
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from coca_jax import config, distributed, sharding
from coca_jax.apply import Apply
from coca_jax.config import ConfigError
from coca_jax.data import pipeline, sources
from coca_jax.data.mixture import Mixture, open_mixture
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import report, suite
from coca_jax.train import checkpoint, loop
from coca_jax.train import state as states
from coca_jax.train.profile import Steps, read_steps
from coca_jax.train.state import TrainState

EXIT_STOPPED = 143  # 128 + SIGTERM: saved, and can go on


def run(
    values: Mapping[str, Any],
    workdir: str,
    *,
    evaluate_only: bool = False,
    profile: str = "",
    processes: Mapping[str, str] | None = None,
    timeout: float = distributed.TIMEOUT,
) -> int | str:
    """Trains (or only evaluates) and writes the report. Each process of a job calls it with the same arguments.

    Args:
      values: the configuration, a ConfigDict.
      workdir: folder or bucket.
      evaluate_only: evaluate the newest checkpoint instead of training.
      profile: steps to trace, `start:stop`; empty: none.
      processes: flags of `distributed.initialize`; None or empty values: as the environment says.
      timeout: seconds to wait for the other processes.

    Returns:
      What to exit with: 0, EXIT_STOPPED, or one line that says what is wrong. In a job of several processes, a process
      in which something is wrong prints that line and ends here, so that the others do not wait for it.
    """
    started = time.monotonic()
    _quiet()
    try:
        c = config.from_config_dict(values)
        config.check(c)
        profile_steps = read_steps(profile, c.steps)
        distributed.initialize(processes, timeout)
        config.check(c, jax.device_count(), slice_count=sharding.slice_count(), platform=jax.default_backend())
        return _run(c, checkpoint.absolute(workdir), evaluate_only, profile_steps, started)
    except loop.Stopped as stopped:
        _say(stopped)
        return EXIT_STOPPED
    except (ConfigError, DataError, checkpoint.CheckpointError, loop.NotFinite, distributed.DistributedError) as error:
        return distributed.leave(f"error: {error}")
    except Exception:
        distributed.leave(traceback.format_exc())
        raise


def _run(
    c: config.Config, workdir: epath.Path, evaluate_only: bool, profile_steps: Steps | None, started: float
) -> int | str:
    slices = sharding.slice_count()
    shape = config.mesh_shape(c.mesh, jax.device_count(), slice_count=slices)
    mesh = sharding.make_mesh(shape, dcn=config.dcn_shape(c.mesh, slices))
    if not c.data.train:
        raise ConfigError(
            "config.data.train is empty: set it to a source, e.g. --config.data.train=emoji:train (built in, prepared "
            "by `python -m coca_jax.data.prepare emoji`) or --config.data.train=array_record:/data/train-*.array_record"
        )
    source = open_mixture(c.data.train)
    tokenizer = _tokenizer(c, source)
    tokenizer.check(c.model.text)
    held_out = {spec: sources.open_source(spec) for spec in (*c.evaluate.splits, c.evaluate.zero_shot) if spec}
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.asdict(c))
    distributed.check_same(
        {"config." + sharding.path_of(path).replace("/", "."): value for path, value in leaves}
        | {f"the fingerprint of {s.name}": s.fingerprint() for s in (source, *held_out.values())}
        | {"the version of jax": jax.__version__, "evaluation alone": evaluate_only}
    )
    _begin(c, workdir, tokenizer)

    abstract = states.abstract_parameters(c)
    sharding.warn_unsharded(abstract, mesh)
    parameters = states.parameter_count(abstract)
    evaluator = _Evaluator(c, workdir, mesh, source, held_out, tokenizer)
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    of_processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    _say(f"{parameters / 1e6:.1f}M parameters, {devices}{of_processes}, mesh {dict(mesh.shape)}")
    page = workdir / report.REPORT_FILE
    with checkpoint.Checkpoints(workdir) as found:
        at, reported = distributed.gather([found.latest(), page.exists()])[0]
    if at == c.steps and reported and not evaluate_only:
        _say(f"complete: {workdir} has been trained to step {at}; the report is {page}")
        return 0
    if at == c.steps or evaluate_only:
        if jax.process_count() > 1:  # JAX keeps the signal for a training that could save
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        results = evaluator.from_checkpoint()
    else:
        state = loop.train(c, workdir, mesh, source, tokenizer, evaluator, profile_steps)
        results = evaluator.results or evaluator.of(state)
    if distributed.is_first():
        seconds = time.monotonic() - started
        report.write(workdir, c, results, parameters=parameters, seconds=seconds, attribution=source.attribution)
        print(_summary(c, results.metrics))
        print(f"report: {page}")
    return 0


def _begin(c: config.Config, workdir: epath.Path, tokenizer: Tokenizer) -> None:
    """Makes the workdir, or sees that it is this run's: by the first process; then all see that it is one folder.

    Raises:
      ConfigError: it cannot be made, is another run's, or the processes do not share it.
    """
    problem = ""
    if distributed.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            checkpoint.keep_config(workdir, c)
            tokenizer.save(workdir / checkpoint.TOKENIZER_FILE)
        except OSError as error:
            problem = f"--workdir={workdir} cannot be made or written: {error}"
        except (ConfigError, checkpoint.CheckpointError) as error:
            problem = str(error)
    if problem := distributed.gather(problem)[0]:
        raise ConfigError(problem)
    path, deadline = workdir / checkpoint.CONFIG_FILE, time.monotonic() + 30
    # A network folder may show what another host has written some seconds later.
    while not (seen := path.exists() and path.read_text() == config.to_json(c)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if blind := [str(index) for index, sees in enumerate(distributed.gather(seen)) if not sees]:
        raise ConfigError(
            f"--workdir={workdir} is not one folder: what process 0 wrote into it is not seen by process "
            f"{', '.join(blind)}; checkpoints need a folder or bucket that all hosts share"
        )


class _Evaluator:
    """The evaluation that the loop calls; keeps what it found last, for the report."""

    def __init__(
        self,
        c: config.Config,
        workdir: epath.Path,
        mesh: Mesh,
        source: Mixture,
        held_out: dict[str, sources.Source],
        tokenizer: Tokenizer,
    ) -> None:
        self.results: suite.Results | None = None
        self._c, self._workdir, self._mesh = c, workdir, mesh
        self._source, self._held_out, self._tokenizer = source, held_out, tokenizer
        self._apply = Apply(c, mesh, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)

    def __call__(self, state: TrainState) -> dict[str, float]:
        return self.of(state).metrics

    def of(self, state: TrainState) -> suite.Results:
        """Evaluates the moving average of the parameters where there is one."""
        return self._run(state.params if state.ema is None else state.ema)

    def from_checkpoint(self) -> suite.Results:
        """Evaluates the newest checkpoint. Raises CheckpointError where there is none."""
        abstract = states.abstract_parameters(self._c)
        places = sharding.tree_shardings(abstract, abstract, self._mesh)
        abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places
        )
        with checkpoint.Checkpoints(self._workdir) as checkpoints:
            return self._run(checkpoints.restore_parameters(abstract)[0])

    def _run(self, params: states.Parameters) -> suite.Results:
        c, apply = self._c, self._apply

        def bind(function: Any, present: bool) -> Any:
            return (lambda *arrays: function(params, *arrays)) if present else None

        functions = suite.Functions(
            encode_image=bind(apply.encode_image, apply.has_contrastive),
            encode_text=bind(apply.encode_text, apply.has_contrastive),
            caption_loss=bind(apply.caption_loss, apply.has_captioning),
            generate=bind(apply.caption, apply.has_captioning),
        )

        place = sharding.batch_sharding(self._mesh)
        shards = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
        batch_size = -(-c.evaluate.batch_size // shards) * shards

        def batches(source: sources.Source) -> Any:
            loader = pipeline.eval_batches(
                source,
                self._tokenizer,
                c.data,
                image_size=c.model.image.size,
                length=c.model.text.length,
                batch_size=batch_size,
                rows=pipeline.process_rows(place, batch_size),
            )
            return pipeline.place(loader, place, batch_size, c.data.prefetch)

        self.results = suite.run(
            functions,
            self._held_out,
            self._tokenizer,
            c,
            batches,
            reference=self._source,
            reference_style=c.evaluate.reference_style,
            cache=self._workdir / "pixel_baseline.json",
            processes=suite.Processes(jax.process_index(), jax.process_count(), distributed.gather),
        )
        return self.results


def _say(text: object) -> None:
    """Prints, from the first process."""
    if distributed.is_first():
        print(text)


def _summary(c: config.Config, metrics: Mapping[str, float]) -> str:
    """What the last evaluation found, for the terminal."""
    lines = []
    for name in suite.split_names(c.evaluate.splits).values():
        for direction in ("image_to_text", "text_to_image"):
            for kind in ("", "pixel/", "chance/"):
                path = f"{name}/{kind}" + ("" if kind == "chance/" else f"{direction}/")
                if f"{path}r1" in metrics:
                    who = {"": "model", "pixel/": "nearest pixels", "chance/": "chance"}[kind]
                    recalls = "  ".join(f"R@{k} {metrics[f'{path}r{k}']:.4f}" for k in (1, 5, 10))
                    rank = f"median rank {metrics[f'{path}median_rank']:g}"
                    lines.append(f"{name:14} {direction:13} {who:14} {recalls}  {rank}")
        if f"{name}/caption_loss" in metrics:
            loss, perplexity = metrics[f"{name}/caption_loss"], metrics[f"{name}/perplexity"]
            lines.append(f"{name:14} captioning loss {loss:.3f}, perplexity {perplexity:.2f}")
    if "zero_shot/top1" in metrics:
        top1, top5, chance = (metrics[f"zero_shot/{key}"] for key in ("top1", "top5", "chance/top1"))
        lines.append(f"zero-shot      top-1 {top1:.4f}, top-5 {top5:.4f}, chance {chance:.4f}")
    return "\n".join(lines)


def _tokenizer(c: config.Config, source: sources.Source) -> Tokenizer:
    path = c.data.tokenizer or source.tokenizer_path
    if not path:
        raise ConfigError(
            f"config.data.tokenizer is empty and {c.data.train!r} brings none: set it to a SentencePiece model file"
        )
    return Tokenizer(path)


def _quiet() -> None:
    """The libraries' notes to themselves are not for the person at the terminal; their errors are."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= std_logging.ERROR or "coca_jax" in record.pathname
    )
