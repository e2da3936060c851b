"""Weights from where they are stored: a run's workdir, an export, or open_clip's files."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from coca_jax import config
from coca_jax.data import classes
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported, functions, open_clip
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model import lora
from coca_jax.train import checkpoint, contents
from coca_jax.train import state as states


def read_weights(
    path: epath.PathLike,
    *,
    step: int | None = None,
    tokenizer: epath.PathLike = "",
    name: str = "",
    mesh: Mesh | None = None,
) -> Weights:
    """What `coca_jax.load` opens, as it was written.

    Args:
      path: a workdir (config.json, tokenizer.model, checkpoints/), a directory of `coca_jax.convert` (coca_jax.json,
        model.safetensors), or open_clip's: a directory in the Hugging Face layout or a file of weights alone.
      step: of a workdir, which checkpoint; None for the newest.
      tokenizer: file of the vocabulary of weights that come without (open_clip's, or a directory that was written of
        such), or `none`.
      name: open_clip's of the model where weights alone do not tell, e.g. coca_ViT-L-14.
      mesh: on which the parameters of a workdir are put as a training would; None: all on one device. Of other
        directories they come as host arrays.

    Raises:
      CheckpointError: a workdir holds no such step, or does not fit its own configuration; or the path is an address
        that is not read here; or the step is no number of one.
      ConversionError: the path holds no model, a part is missing or damaged, or the parts do not fit together.
    """
    if step is not None and not isinstance(step, int | np.integer):  # digits in text would be looked for in vain
        raise checkpoint.CheckpointError(f"step={step!r} must be a whole number (None: the newest)")
    path = checkpoint.reachable(path)
    is_ours = exported.is_exported(path)
    if is_ours or (path / "checkpoints").is_dir():
        lacks = is_ours and exported.lacks_tokenizer(path)
        given = {"name": name} | ({"step": step} if is_ours else {}) | ({} if lacks else {"tokenizer": tokenizer})
        for argument, value in given.items():
            if value not in ("", None):
                raise ConversionError(f"{argument}={value!r} says nothing of {path}, which holds its own: leave it out")
        return exported.read(path, tokenizer=tokenizer) if is_ours else _read_workdir(path, step, mesh)
    if step is not None:
        raise ConversionError(f"step={step} is of workdirs, and {path} is none: leave it out")
    if not path.exists():
        raise ConversionError(f"{path}: no such file or directory")
    begun = all((path / name).exists() for name in (checkpoint.CONFIG_FILE, checkpoint.TOKENIZER_FILE))
    if begun and not (path / "open_clip_config.json").exists():
        raise checkpoint.CheckpointError(f"{path} is a workdir without a checkpoint yet: train it first")
    if kind := functions.kind_of(path):
        raise ConversionError(
            f"{path} holds compiled functions ({kind}), which docs/{kind}_coca.py runs: load what they are of"
        )
    return open_clip.read(path, tokenizer=tokenizer, name=name)


def read_config(path: epath.PathLike) -> config.Config:
    """The configuration of what `read_weights` opens; a workdir's without its weights, which may be many.

    Raises:
      CheckpointError, ConversionError: as `read_weights`.
    """
    path = checkpoint.absolute(path)
    if not exported.is_exported(path) and (path / "checkpoints").is_dir():
        return checkpoint.read_config(path)
    return read_weights(path).config


def _read_workdir(workdir: epath.Path, step: int | None, mesh: Mesh | None) -> Weights:
    c = checkpoint.read_config(workdir)
    if not (workdir / checkpoint.TOKENIZER_FILE).exists():
        raise checkpoint.CheckpointError(f"{workdir} has no {checkpoint.TOKENIZER_FILE}: copy it there from the run")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        abstract = states.abstract_parameters(c) if mesh is None else states.placed_parameters(c, mesh)
        params, step = checkpoints.restore_parameters(abstract, step)
    labels: tuple[str, ...] = ()
    if c.loss.lambda_cls:
        try:
            labels = classes.read(workdir / classes.FILE)
        except DataError as error:
            raise checkpoint.CheckpointError(f"{error}; copy {classes.FILE} there from the run") from error
    if c.lora.rank:  # what is loaded is a model like any other
        plain = dataclasses.replace(c, lora=config.Lora())
        places = mesh and jax.tree.map(lambda leaf: leaf.sharding, states.placed_parameters(plain, mesh))
        params, c = jax.jit(functools.partial(lora.merged, c.lora), out_shardings=places)(params), plain
    tokenizer = Tokenizer(workdir / checkpoint.TOKENIZER_FILE)
    contents.check_own(checkpoint.saved_place(workdir, step), tokenizer, labels, workdir)
    tokenizer.check(c.model.text)
    return Weights(c, params, tokenizer, step, labels)
