"""What a run began with, kept in its workdir."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from absl import logging
from etils import epath

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.data import addresses, side_files
from coca_jax.data.mixture import read_spec
from coca_jax.distributed import gather, is_first
from coca_jax.train import optimizer
from coca_jax.train.checkpoint.folder import Folder, read_place
from coca_jax.train.checkpoint.paths import CONFIG_FILE, FOLDER, CheckpointError, absolute

# What may differ between the run that began in a workdir and the one that goes on: it changes how, not what.
_MAY_CHANGE = (
    "log_every",
    "mesh",
    "evaluate",
    "checkpoint",
    "guard",
    "data.accept_changes",
    "data.classes",  # and the tokenizer: by their content, see contents.py
    "data.max_bad",
    "data.prefetch",
    "data.threads",
    "data.tokenizer",
    "data.workers",
    "data.worker_timeout",
    "model.image.remat",
    "model.image.scan_unroll",
    "model.text.remat",
    "model.pooler.remat",
    "model.attention",
    "model.text.scan_unroll",
    "loss.caption_chunk",
    "loss.contrastive_tile",
)


# What may differ where the run is made longer, see `optimizer.hindrance`.
_LENGTH = ("steps", "optimizer.warmup")


def keep_config(workdir: epath.Path, c: config.Config) -> None:
    """Writes config.json into a new workdir; in a used one, what of it may change. To be called by one process.

    Raises as `check_config`.
    """
    path = workdir / CONFIG_FILE
    if side_files.is_there(path):
        check_config(workdir, c)
    side_files.write_text(path, config.to_json(c))


def check_config(workdir: epath.Path, c: config.Config) -> None:
    """Refuses a configuration that would be another run than the workdir's.

    A run may become longer where its steps so far would have been the same in the longer one.

    Raises:
      ConfigError: naming the first key that differs, both values and what to do.
      CheckpointError: see `read_config`.
    """
    path, before = workdir / CONFIG_FILE, read_config(workdir)
    for key, old, new in _differences(json.loads(config.to_json(before)), json.loads(config.to_json(c))):
        # Of a mixture the weights may change, see Schedule.changed.
        weights_alone = key == "data.train" and list(read_spec(old)) == list(read_spec(new))
        hindrance = optimizer.hindrance(before, c) if key in _LENGTH else "put it back"
        may_change = weights_alone or any(key == k or key.startswith(k + ".") for k in _MAY_CHANGE)
        if hindrance and not may_change:
            raise ConfigError(
                f"config.{key}={new!r}, but {path} was begun with {old!r}: {hindrance}, or start in another "
                f"--workdir, with its weights by --config.init.checkpoint={workdir}"
            )
        logging.info("config.%s was %r and is %r", key, old, new)


def read_config(workdir: epath.PathLike) -> config.Config:
    """The configuration of a workdir.

    Raises:
      CheckpointError: the folder is not a workdir, or its config.json is damaged or of another version.
    """
    path = addresses.path(workdir) / CONFIG_FILE
    try:
        values = side_files.read_json(path)
    except side_files.Unreadable as error:
        raise CheckpointError(f"{error}: restore it, or start in another --workdir") from error
    if values is None:
        raise CheckpointError(f"{workdir} is not a workdir: it has no {CONFIG_FILE}")
    try:
        return config.from_config_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path} is of another version, or was changed since: {error}") from error


def saved_place(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint was saved with beside its arrays, the same in all processes; empty where there is none.

    Args:
      workdir: of the run.
      step: None: the newest one that can be read.
    """
    place: dict[str, Any] = {}
    if is_first():
        folder = Folder(absolute(workdir) / FOLDER, None, "")
        with contextlib.suppress(OSError):  # restoring says it
            for one in reversed(folder.all()):
                with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
                    if step in (None, one) and (place := read_place(folder.path / str(one))):
                        break
    return dict(gather(place)[0])


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in b for d in _differences(a.get(key), b[key], f"{path}.{key}" if path else key)]
    return [] if a == b else [(path, a, b)]
