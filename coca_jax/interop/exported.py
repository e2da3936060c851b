"""A directory that holds a whole model and needs no framework to be read: JSON, safetensors and the tokenizer's file.

    coca_jax.json        what the model is, what it wants of pictures, which files belong to it
    model.safetensors    parameters by path, e.g. `image_encoder/blocks/attention/query/kernel`
    tokenizer.model      the vocabulary (or tokenizer.json, or bpe_simple_vocab_16e6.txt.gz)

docs/checkpoints.md describes the format. A directory of an earlier version keeps loading.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from coca_jax import config
from coca_jax.data import addresses
from coca_jax.data.images import Preprocessor
from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import folders
from coca_jax.interop.matching import HOW
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.train import state

FORMAT = "coca_jax"
VERSION = 1
CONFIG_FILE = "coca_jax.json"
WEIGHTS_FILE = "model.safetensors"

# Keys that came later: since which version they are written, and what a file without them means.
_SINCE: dict[str, tuple[int, Any]] = {}


def write(weights: Weights, folder: epath.PathLike, *, overwrite: bool = False) -> None:
    """Writes the directory. It appears whole or not at all.

    Args:
      weights: of any source. Arrays keep their dtypes.
      folder: local, or a bucket's.
      overwrite: whether a directory that is there may be replaced.

    Raises:
      ConversionError: there is something, it cannot be written, or the parameters are not the configuration's.
    """
    weights.only_coca("an exported directory")
    c = weights.config
    flat = traverse_util.flatten_dict(weights.params, sep="/")
    check_parameters("the parameters do not fit the configuration", flat, c)
    preprocessing = Preprocessor.from_config(c.model.image.size, c.data).to_json()
    with folders.new_folder(folder, overwrite=overwrite) as new:
        folders.write_tensors(new / WEIGHTS_FILE, flat, {"format": FORMAT, "format_version": str(VERSION)})
        tokenizer = None
        if weights.tokenizer is not None:
            name = weights.tokenizer.file_name
            weights.tokenizer.save(new / name)
            tokenizer = {"file": name, "sha256": folders.sha256(new / name)} | {
                key: getattr(weights.tokenizer, key) for key in ("vocab_size", "pad_id", "bos_id", "eos_id")
            }
        values = {
            "format": FORMAT,
            "format_version": VERSION,
            "step": weights.step,
            "model": _nested({key: config.get(c, f"model.{key}") for key in _written_keys()}),
            "loss": {key: getattr(c.loss, key) for key in ("lambda_con", "lambda_cap", "contrastive")},
            "preprocessing": preprocessing,
            "tokenizer": tokenizer,
            "weights": {
                "file": WEIGHTS_FILE,
                "sha256": folders.sha256(new / WEIGHTS_FILE),
                "parameters": sum(int(np.size(leaf)) for leaf in flat.values()),
            },
        }
        folders.write_json(new / CONFIG_FILE, values)


def is_exported(folder: epath.PathLike) -> bool:
    return (addresses.path(folder) / CONFIG_FILE).is_file()


def lacks_tokenizer(folder: epath.PathLike) -> bool:
    """Whether it was written without one, of weights that had none."""
    return folders.read_json(addresses.path(folder) / CONFIG_FILE).get("tokenizer", "") is None


def read(folder: epath.PathLike, *, tokenizer: epath.PathLike = "") -> Weights:
    """Reads the directory, of this or an earlier version; every file is checked against its sum.

    Args:
      folder: as `write` wrote it.
      tokenizer: file of the vocabulary where `lacks_tokenizer`; empty or `none`: go without.

    Raises:
      ConversionError: it is of a later version, damaged, or its parts do not fit together; every reason is listed.
    """
    folder = addresses.path(folder)
    path = folder / CONFIG_FILE
    values = folders.read_json(path)
    version = values.get("format_version")
    if values.get("format") != FORMAT or not isinstance(version, int) or version < 1:
        raise ConversionError(f"{path}: format {values.get('format')!r}, version {version!r}, is not {FORMAT}'s")
    if version > VERSION:
        raise ConversionError(f"{path} is of version {version}, and this coca_jax reads up to {VERSION}: update it")
    try:
        c = _config(path, values, version)
        found = _tokenizer(folder, values["tokenizer"], c, tokenizer)
        flat = _tensors(folder, values["weights"], c)
        step = int(values["step"])
    except ConversionError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConversionError(f"{path} lacks a part or has another in its place: {error}") from error
    return Weights(c, traverse_util.unflatten_dict(flat, sep="/"), found, step)


def _written_keys() -> list[str]:
    keys = traverse_util.flatten_dict(dataclasses.asdict(config.Model()), sep=".")
    return [
        key for key in keys if key not in HOW and not key.startswith(("head.", "bridge."))
    ]  # a reader is free in HOW


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = traverse_util.unflatten_dict(flat, sep=".")
    return nested


def _config(path: epath.Path, values: dict[str, Any], version: int) -> config.Config:
    if not isinstance(values["model"], dict):
        raise TypeError("model is no group of keys")
    given = traverse_util.flatten_dict(values["model"], sep=".")
    given |= {key: older for key, (since, older) in _SINCE.items() if version < since}
    known = _written_keys()
    reasons = [f"unknown: model.{key}={given[key]!r}" for key in given if key not in known]
    reasons += [f"missing: model.{key}" for key in known if key not in given]
    if reasons:
        raise ConversionError(f"{path} does not describe a model of version {version}:", reasons)
    preprocessor = Preprocessor.from_json(values["preprocessing"])
    data = {key: getattr(preprocessor, key) for key in ("mean", "std", "background", "interpolation")}
    try:
        c = config.from_config_dict(
            {"model": _nested(given), "loss": values["loss"], "data": data | {"eval_crop": preprocessor.crop}}
        )
        config.check(c)
    except config.ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error
    if preprocessor.size != c.model.image.size:
        raise ConversionError(
            f"{path}: preprocessing.size={preprocessor.size} is not model.image.size={c.model.image.size}"
        )
    return c


def _tokenizer(
    folder: epath.Path, described: dict[str, Any] | None, c: config.Config, given: epath.PathLike
) -> Tokenizer | None:
    if described is None and os.fspath(given) in ("", "none"):
        return None
    file = addresses.path(given) if described is None else _verified(folder, described)
    try:
        tokenizer = Tokenizer(file)
        tokenizer.check(c.model.text)
    except (DataError, config.ConfigError) as error:
        whose = f"tokenizer={os.fspath(given)}" if described is None else "its tokenizer"
        raise ConversionError(f"{folder}: {whose} cannot be used: {error}") from error
    if described is None:
        return tokenizer
    wrong = {key: described[key] for key in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    if differences := [f"{k}={getattr(tokenizer, k)}, not {v}" for k, v in wrong.items() if getattr(tokenizer, k) != v]:
        raise ConversionError(f"{file} is not the tokenizer of {CONFIG_FILE}:", differences)
    return tokenizer


def _tensors(folder: epath.Path, described: dict[str, Any], c: config.Config) -> dict[str, np.ndarray]:
    file = _verified(folder, described)
    flat = folders.read_tensors(file)
    check_parameters(f"{file} does not fit {CONFIG_FILE}", flat, c)
    return flat


def _verified(folder: epath.Path, described: dict[str, Any]) -> epath.Path:
    """The described file; its name stays in the folder, its content is the one that was written."""
    name = str(described["file"])
    file = folder / name
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConversionError(f"{folder / CONFIG_FILE} names a file {name!r} that is not beside it")
    if not file.is_file():
        raise ConversionError(f"{file} is missing: copy it there again, with the other files of the directory")
    if (found := folders.sha256(file)) != described["sha256"]:
        raise ConversionError(
            f"{file} has the SHA-256 {found}, and {CONFIG_FILE} says {described['sha256']}: it was cut off, damaged or "
            "replaced; copy the directory again"
        )
    return file


def check_parameters(summary: str, flat: dict[str, Any], c: config.Config) -> None:
    """Raises ConversionError, with every difference, where the parameters are not those of the configuration."""
    abstract = state.abstract_parameters(c)
    wanted = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    given = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
    reasons = [f"unknown: {path} {given[path]}" for path in sorted(set(given) - set(wanted))]
    reasons += [f"missing: {path} {wanted[path]}" for path in sorted(set(wanted) - set(given))]
    reasons += [
        f"misshapen: {path} {given[path]}, wanted {wanted[path]}"
        for path in sorted(set(given) & set(wanted))
        if given[path] != wanted[path]
    ]
    reasons += [
        f"dtype: {path} is {flat[path].dtype}, wanted float32 or bfloat16"
        for path in sorted(set(given) & set(wanted))
        if flat[path].dtype not in (jnp.float32, jnp.bfloat16)
    ]
    if reasons:
        raise ConversionError(f"{summary}, in {len(reasons)} places:", reasons)
