"""A whole run, as `main` starts it: check, train or resume, evaluate, report."""

from __future__ import annotations

import logging as std_logging
import os
import time
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
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import report, suite
from coca_jax.train import checkpoint, loop
from coca_jax.train import state as states
from coca_jax.train.state import TrainState

EXIT_STOPPED = 143  # 128 + SIGTERM: saved, and can go on


def run(values: Mapping[str, Any], workdir: str, *, evaluate_only: bool = False) -> int | str:
    """Trains (or only evaluates) and writes the report.

    Args:
      values: the configuration, a ConfigDict.
      workdir: folder or bucket.
      evaluate_only: evaluate the newest checkpoint instead of training.

    Returns:
      What to exit with: 0, EXIT_STOPPED, or one line that says what is wrong.
    """
    started = time.monotonic()
    _quiet()
    try:
        c = config.from_config_dict(values)
        config.check(c)
        distributed.initialize()
        _compilation_cache()
        config.check(c, jax.device_count())
        return _run(c, epath.Path(os.path.expanduser(workdir)), evaluate_only, started)
    except (ConfigError, DataError, checkpoint.CheckpointError, loop.NotFinite) as error:
        return f"error: {error}"
    except loop.Stopped as stopped:
        print(stopped)
        return EXIT_STOPPED


def _run(c: config.Config, workdir: epath.Path, evaluate_only: bool, started: float) -> int | str:
    mesh = sharding.make_mesh(config.mesh_shape(c.mesh, jax.device_count()))
    if not c.data.train:
        raise ConfigError(
            "config.data.train is empty: set it to a source, e.g. --config.data.train=emoji:train (built in, prepared "
            "by `python -m coca_jax.data.prepare emoji`) or --config.data.train=array_record:/data/train-*.array_record"
        )
    source = sources.open_source(c.data.train)
    tokenizer = _tokenizer(c, source)
    loop.check_tokenizer(c, tokenizer)
    held_out = {spec: sources.open_source(spec) for spec in (*c.evaluate.splits, c.evaluate.zero_shot) if spec}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"error: --workdir={workdir} cannot be made: {error}"
    checkpoint.keep_config(workdir, c)
    if jax.process_index() == 0:
        tokenizer.save(workdir / checkpoint.TOKENIZER_FILE)

    parameters = states.parameter_count(states.abstract_parameters(c))
    evaluator = _Evaluator(c, workdir, mesh, source, held_out, tokenizer)
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices"
    print(f"{parameters / 1e6:.1f}M parameters, {devices}, mesh {dict(mesh.shape)}")
    with checkpoint.Checkpoints(workdir) as found:
        at = found.latest()
    page = workdir / report.REPORT_FILE
    if at == c.steps and page.exists() and not evaluate_only:
        print(f"complete: {workdir} has been trained to step {at}; the report is {page}")
        return 0
    if at == c.steps or evaluate_only:
        results = evaluator.from_checkpoint()
    else:
        state = loop.train(c, workdir, mesh, source, tokenizer, evaluator)
        results = evaluator.results or evaluator.of(state)
    if jax.process_index() == 0:
        seconds = time.monotonic() - started
        report.write(workdir, c, results, parameters=parameters, seconds=seconds, attribution=source.attribution)
        print(_summary(c, results.metrics))
        print(f"report: {page}")
    return 0


class _Evaluator:
    """The evaluation that the loop calls; keeps what it found last, for the report."""

    def __init__(
        self,
        c: config.Config,
        workdir: epath.Path,
        mesh: Mesh,
        source: sources.Source,
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

        def batches(source: sources.Source) -> Any:
            return pipeline.eval_batches(
                source,
                self._tokenizer,
                c.data,
                image_size=c.model.image.size,
                length=c.model.text.length,
                batch_size=c.evaluate.batch_size,
            )

        self.results = suite.run(
            functions,
            self._held_out,
            self._tokenizer,
            c,
            batches,
            reference=self._source,
            reference_style=c.evaluate.reference_style,
            cache=self._workdir / "pixel_baseline.json",
            progress=jax.process_index() == 0,
        )
        return self.results


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


def _compilation_cache() -> None:
    """Compiled programs are kept between runs: a resumed run starts at once. JAX_COMPILATION_CACHE_DIR moves them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ.get("COCA_JAX_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "coca_jax"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
