"""What a directory for open_clip holds beside, so that what was exported comes back to the last bit.

open_clip_config.json gets a section `coca_jax` with our configuration, and `coca_jax_replaced.safetensors` holds the
parameters that were rewritten. Both are of use only as long as the weights are those that were written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax import traverse_util

from coca_jax import config
from coca_jax.data.images import Preprocessor
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported, folders
from coca_jax.interop.weights import ConversionError, Parameters, Weights

SECTION = "coca_jax"
VERSION = 1
REPLACED_FILE = "coca_jax_replaced.safetensors"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def section(
    folder: pathlib.Path, weights: Weights, rewritten: Parameters, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The section for open_clip_config.json; writes the file of what was rewritten where there is any.

    Args:
      folder: that is being written.
      weights: as they are here.
      rewritten: the parameters that `tensors` are read as.
      tensors: open_clip's.

    Raises:
      ConversionError: a parameter is neither float32 nor bfloat16.
    """
    c = weights.config
    ours = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(weights.params, sep="/").items()}
    if wrong := [f"{path} is {x.dtype}" for path, x in ours.items() if x.dtype not in _DTYPES.values()]:
        raise ConversionError("parameters must be float32 or bfloat16:", wrong)
    theirs = traverse_util.flatten_dict(rewritten, sep="/")
    replaced = {path: x for path, x in ours.items() if path not in theirs or not _same(x, theirs[path])}
    if replaced:
        folders.write_tensors(folder / REPLACED_FILE, replaced, {"format": SECTION, "format_version": str(VERSION)})
    return {
        "format_version": VERSION,
        "step": weights.step,
        "model": dataclasses.asdict(c.model),
        "loss": {key: getattr(c.loss, key) for key in ("lambda_con", "lambda_cap", "contrastive")},
        "preprocessing": Preprocessor.from_config(c.model.image.size, c.data).to_json(),
        # Of what was not rewritten: what it was before it was widened.
        "bfloat16": [path for path, x in ours.items() if x.dtype.name == "bfloat16" and path not in replaced],
        "dropped": sorted(set(theirs) - set(ours)),
        "replaced": folders.sha256(folder / REPLACED_FILE) if replaced else None,
        "tensors": digest(tensors),
    }


def restore(
    folder: epath.Path, described: Mapping[str, Any], tensors: Mapping[str, np.ndarray], weights: Weights
) -> Weights:
    """What was exported; the given weights, of open_clip's architecture, where the tensors have changed since."""
    where = folder / "open_clip_config.json"
    if not isinstance(described, Mapping) or described.get("format_version") != VERSION:
        raise ConversionError(
            f"{where}: its section {SECTION} is not of version {VERSION}: remove it, or update coca_jax"
        )
    if described.get("tensors") != digest(tensors):
        logging.info("%s: the weights are not those that were exported: they are imported as open_clip's model", folder)
        return weights
    flat = traverse_util.flatten_dict(weights.params, sep="/")
    try:
        for path in described["dropped"]:
            flat.pop(path, None)
        for path in described["bfloat16"]:
            flat[path] = flat[path].astype(ml_dtypes.bfloat16)
        if (wanted := described["replaced"]) is not None:
            file = folder / REPLACED_FILE
            if not file.is_file() or folders.sha256(file) != wanted:
                raise ConversionError(
                    f"{file} is missing or damaged, which holds what was rewritten for open_clip: copy it there again, "
                    f"or remove the section {SECTION} of {where} to import the model as open_clip's"
                )
            flat |= folders.read_tensors(file)
        preprocessor = Preprocessor.from_json(described["preprocessing"])
        colors = {key: getattr(preprocessor, key) for key in ("mean", "std", "background", "interpolation")}
        data = colors | {"eval_crop": preprocessor.crop}
        c = config.from_config_dict({"model": described["model"], "loss": described["loss"], "data": data})
        config.check(c)
        step = int(described["step"])
        exported.check_parameters(f"{where}: its section {SECTION} does not fit the weights", flat, c)
    except ConversionError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConversionError(f"{where}: its section {SECTION} lacks a part, or has another there: {error}") from error
    return Weights(c, traverse_util.unflatten_dict(flat, sep="/"), None, step)


def tokenizer(folder: epath.Path, described: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that was exported, from its own file."""
    name = described["tokenizer"]
    if name is None:
        return None
    if name == "clip":
        return Tokenizer.clip()
    file = folder / str(name)
    if "/" in str(name) or "\\" in str(name) or not file.is_file():
        raise ConversionError(f"{file} is missing, the tokenizer that was exported: copy it there again")
    found = Tokenizer(file)
    if hashlib.sha256(found.to_bytes()).hexdigest() != described.get("tokenizer_sha256"):
        raise ConversionError(f"{file} is not the tokenizer that was exported: copy it there again, or pass tokenizer=")
    return found


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and values, whatever the order and the file they are in."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        x = np.asarray(tensors[name])
        total.update(f"{name} {x.shape} {x.dtype.name}\n".encode())
        total.update(np.ascontiguousarray(x).data if x.ndim else x.tobytes())
    return total.hexdigest()


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether the widened array gives the same bits again."""
    return ours.shape == theirs.shape and np.asarray(theirs).astype(ours.dtype).tobytes() == ours.tobytes()
