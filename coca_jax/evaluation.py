"""The evaluation of a checkpoint by itself: each source after the other, kept as soon as it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from coca_jax import commandline, config, distributed, evaluator, sharding, stored
from coca_jax.config import ConfigError, printing
from coca_jax.data import side_files
from coca_jax.data.images import Preprocessor
from coca_jax.data.readers import ReaderLost
from coca_jax.data.sources import Source, content
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.evaluate import asked, notes, pieces, report, suite, tables
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.train import state as states
from coca_jax.train.checkpoint import CheckpointError, digest, reachable

RESULTS_FILE = "results.json"
TABLE_FILE = "results.txt"
_VERSION = 2  # of the figures: results of another one are computed again
_PIECES = "pieces"  # folder of what a source has so far


def run(
    values: Mapping[str, Any] | None,
    checkpoint: str,
    output: str,
    *,
    step: int | None = None,
    processes: Mapping[str, str] | None = None,
    timeout: float = distributed.TIMEOUT,
) -> int | str:
    """Evaluates what `coca_jax.load` opens, and prints a table. Each process of a job calls it with the same arguments.

    For each source a folder `OUTPUT/NAME` gets `results.json` and `report.html`, with pictures; `OUTPUT/results.json`
    and `OUTPUT/results.txt`, the table, are of all of them. Started again, sources that are done are not computed
    again, and one that was begun goes on where it was.

    Args:
      values: a configuration, of which `evaluate` says what is done, `mesh` where, and `data` how the pictures are read
        (what the model wants of them it knows itself); None: the checkpoint's own.
      checkpoint: a workdir, an exported directory, open_clip's files.
      output: folder or bucket.
      step: of a workdir; None: the newest.
      processes, timeout: as for a training.

    Returns:
      What to exit with: 0, or a text that says what is wrong.
    """
    commandline.quiet()
    try:
        given = None if values is None else config.from_config_dict(values)
        distributed.initialize(processes, timeout)
        return _run(given, checkpoint, reachable(output), step)
    except ReaderLost as error:
        print(distributed.leave(f"error: {error}", distributed.EXIT_LOST), file=sys.stderr)
        return distributed.EXIT_LOST
    # ValueError: what cannot be measured, such as a source without labels.
    except (ConfigError, CheckpointError, ConversionError, distributed.DistributedError, ValueError, OSError) as error:
        return distributed.leave(f"error: {printing.one_line(error)}")
    except Exception as error:
        if distributed.lost(error):
            distributed.wait_for_verdict(error, distributed.HEARTBEAT)
        raise
    except KeyboardInterrupt:
        return commandline.stopped(distributed.leave("stopped: the same command goes on from here"))


def _run(given: config.Config | None, checkpoint: str, output: epath.Path, step: int | None) -> int:
    slices = sharding.slice_count()
    mesh_keys = config.Mesh() if given is None else given.mesh
    shape = config.mesh_shape(mesh_keys, jax.device_count(), slice_count=slices)
    mesh = sharding.make_mesh(shape, dcn=config.dcn_shape(mesh_keys, slices))
    weights = stored.read_weights(checkpoint, step=step, mesh=mesh)
    c = dataclasses.replace(_merged(weights, given), mesh=mesh_keys)
    # How the steps of a training were cut up is of its devices: evaluate.batch_size fits any.
    fitting = dataclasses.replace(c, batch_size=shape[0] * shape[1], microbatches=1)
    config.check(fitting, jax.device_count(), slice_count=slices, platform=jax.default_backend())
    if weights.tokenizer is None:
        raise ConfigError(
            f"--checkpoint={checkpoint} came without its tokenizer: convert it with --tokenizer=PATH first"
        )
    opened = asked.open_sources(c.evaluate)
    if not opened:
        raise ConfigError(
            "config.evaluate.splits and config.evaluate.zero_shot are empty: name what to evaluate on in --config, "
            "e.g. --config.evaluate.splits=\"('folder:/data/coco/val2014',)\""
        )
    asked.check(c, opened, None)
    params = _place(weights, c, mesh)
    values = digest.of_whole(digest.combined(distributed.gather(digest.of_process(params))))
    model = {"checkpoint": checkpoint, "step": weights.step, "weights": values}
    names = suite.split_names(list(opened))
    everything: dict[str, float] = {}
    for spec, name in names.items():
        one = dataclasses.replace(
            c.evaluate,
            splits=(spec,) if spec in c.evaluate.splits else (),
            zero_shot=spec if spec == c.evaluate.zero_shot else "",
        )
        metrics = _evaluate(
            dataclasses.replace(c, evaluate=one),
            opened[spec],
            output / name,
            mesh,
            params,
            weights,
            model,
        )
        everything |= {_renamed(key, spec, name): value for key, value in metrics.items()}
    if distributed.is_first():
        said = {"notes": found} if (found := notes.of_metrics(everything)) else {}
        side_files.write_text(output / RESULTS_FILE, json.dumps(everything | said, indent=1) + "\n")
        table = "\n".join(tables.summary(c, everything))
        side_files.write_text(output / TABLE_FILE, table + "\n")
        print(table)
        print(f"results: {output / RESULTS_FILE}, {output / TABLE_FILE}")
        for name in names.values():
            print(f"page:    {output / name / report.REPORT_FILE}")
    return 0


def _merged(weights: Weights, given: config.Config | None) -> config.Config:
    """The checkpoint's configuration with the given `evaluate`, and how data are read."""
    c = weights.config
    # The kernels belong to the machine that it was trained on.
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, attention="xla"))
    if given is None:
        return c
    wants = {key: getattr(c.data, key) for key in ("mean", "std", "background", "eval_crop", "interpolation")}
    return dataclasses.replace(
        c,
        evaluate=given.evaluate,
        data=dataclasses.replace(given.data, **wants),
    )


def _place(weights: Weights, c: config.Config, mesh: jax.sharding.Mesh) -> states.Parameters:
    def put(leaf: Any, like: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == like.sharding:
            return leaf
        host = np.asarray(leaf, like.dtype)
        return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])

    return jax.tree.map(put, weights.params, states.placed_parameters(c, mesh))


def _evaluate(
    c: config.Config,
    source: Source,
    folder: epath.Path,
    mesh: jax.sharding.Mesh,
    params: states.Parameters,
    weights: Weights,
    model: Mapping[str, Any],
) -> dict[str, float]:
    """The measures on one source, from the folder where they are there already."""
    assert weights.tokenizer is not None
    identity = {
        "version": _VERSION,
        **model,
        "source": source.fingerprint(),
        "contents": content.of_source(source),
        "evaluate": dataclasses.asdict(c.evaluate),
        **_reading(c, weights.tokenizer, weights.labels),
    }
    path = folder / RESULTS_FILE
    if known := distributed.gather(_known(path, json.loads(json.dumps(identity))))[0]:
        return dict(known)
    started = time.monotonic()
    spec = next(iter((*c.evaluate.splits, c.evaluate.zero_shot)))
    # Batches are as large as the devices want them.
    begun = pieces.Pieces(folder / _PIECES, identity | {"devices": mesh.devices.size}, evaluator.processes())
    bound = evaluator.Evaluator(c, folder, mesh, None, {spec: source}, weights.tokenizer, begun, weights.labels)
    results = bound.of_parameters(params)
    if begun.kept and distributed.is_first():
        print(f"{folder.name}: went on from {begun.kept} pieces that were kept")
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        report.write(
            folder,
            c,
            results,
            parameters=states.parameter_count(params),
            seconds=time.monotonic() - started,
            attribution=source.attribution,
        )
        found: dict[str, Any] = {"identity": identity, "metrics": results.metrics}
        if said := notes.of_metrics(results.metrics):
            found["notes"] = said
        if results.classes:
            found["classes"] = {one.label: dataclasses.asdict(one) for one in results.classes}
        side_files.write_text(path, json.dumps(found, indent=1) + "\n")
    begun.remove()
    return results.metrics


def _reading(c: config.Config, tokenizer: Tokenizer, labels: Sequence[str]) -> dict[str, Any]:
    """What figures depend on beside weights and data: files beside the weights say it, and people edit them."""
    return {
        "model": dataclasses.asdict(c.model),
        "loss": dataclasses.asdict(c.loss),
        "preprocessing": Preprocessor.from_config(c.model.image.size, c.data).to_json(),
        "tokenizer": hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16],
        "labels": list(labels),
    }


def _known(path: epath.Path, identity: dict[str, Any]) -> dict[str, float] | None:
    saved: Any = side_files.take_json(path) if distributed.is_first() else None
    try:
        if saved["identity"] != identity:
            return None
        return {str(name): float(value) for name, value in saved["metrics"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # none, or damaged: what it held is computed again


def _renamed(key: str, spec: str, name: str) -> str:
    """A metric's name with the source's name among all, which another of the same name may have changed."""
    alone = suite.split_names([spec])[spec]
    return name + key.removeprefix(alone) if key.startswith(alone + "/") else key
