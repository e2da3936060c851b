"""A whole checkpoint's parameters for a model that is almost its own: another resolution, other halves, a new head."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from coca_jax import config
from coca_jax.interop.vision.report import INITIALISED, LOADED, RESIZED, SKIPPED, Line, Report
from coca_jax.interop.weights import ConversionError, Parameters, Weights
from coca_jax.model.image_encoder import resize_positions

# Keys of config.Model that change how it is computed and not what: of a recipe, whatever it begins from.
HOW = (*("attention", "image.remat", "image.scan_unroll", "pooler.remat", "text.remat", "text.scan_unroll"),)
PICTURES = ("mean", "std", "background", "eval_crop", "interpolation")  # keys of config.Data that a model expects
_NEAR = 1e-3  # of mean and std, of values in 0..1: a quarter of one of the 255 levels of a picture
# Other sizes than these can be fitted, and the precision and what training begins with may be another.
_FREE = (*HOW, "bridge.stage", *("dtype", "param_dtype", "temperature", "logit_bias", "image.size", "text.length"))
# Keys -> the parameters of which they are: where all of those are drawn from the seed, they may be anything.
_OWNERS = {
    "image.": "image_encoder/",
    "pooler.": r"\w+_pooler/",
    "text.": "text_decoder/",
    "embed_dim": r"\w+_projection/",
    "head.": "classifier/",
    "bridge.": "bridge/",
}


def adopt(c: config.Config, model: config.Model, data: config.Data) -> config.Config:
    """The configuration with a checkpoint's model and pictures: `init.model=checkpoint`.

    Head and bridge stay the configuration's, and whether there is a logit bias, which goes with its loss.

    Raises:
      ConfigError: init.image_size is no multiple of the patch.
    """
    for key in (*HOW, "head", "bridge", "logit_bias"):
        model = _with(model, key, config.get(c, f"model.{key}"))
    if c.init.image_size:
        model = _with(model, "image.size", c.init.image_size)
    config.check_model(model)
    pictures = {key: getattr(data, key) for key in PICTURES}
    return dataclasses.replace(c, model=model, data=dataclasses.replace(c.data, **pictures))


def match(
    weights: Weights, c: config.Config, wanted: Parameters, labels: tuple[str, ...] = (), *, file: str
) -> tuple[Parameters, Report]:
    """Those of a checkpoint's parameters that a model can begin with.

    Args:
      weights: the checkpoint.
      c: of the model: `model`, `data`, and `init.skip`, whose parameters are left out.
      wanted: the model's parameters or their shapes, a nested dict.
      labels: the classes of the model's head, by number.
      file: what the report calls the checkpoint.

    Returns:
      A nested dict with some of the wanted paths, arrays as the checkpoint has them; and what came of every parameter
      of either.

    Raises:
      ConversionError: it is another function than the model, its pictures had another mean or std, or a parameter has
        another shape. Every reason is listed, with what to set.
    """
    ours = traverse_util.flatten_dict(wanted, sep="/")
    theirs = traverse_util.flatten_dict(weights.params, sep="/")
    passed = [re.compile(pattern) for pattern in c.init.skip]
    asked = [path for path in ours if any(p.fullmatch(path) for p in passed)]
    reasons = [
        f"config.init.skip: {p.pattern!r} matches no parameter" for p in passed if not any(map(p.fullmatch, ours))
    ]
    taken = [path for path in ours if path in theirs and path not in asked]
    if not taken:
        reasons.append("no parameter of it is taken: config.init.skip leaves nothing to begin with")
    if "classifier/linear/kernel" in taken and labels != weights.labels:
        reasons.append(
            f"its classifier tells {len(weights.labels)} other classes apart: train a new one, with "
            "config.init.skip=('classifier/.*',)"
        )
    reasons += _other_model(weights.config.model, c.model, taken)
    notes: list[str] = []
    if any(path.startswith("image_encoder/") for path in taken):
        more, notes = _other_pictures(weights.config.data, c.data)
        reasons += more
    lines: list[Line] = []
    found: dict[str, Any] = {}
    for path in taken:
        there, here = tuple(np.shape(theirs[path])), tuple(ours[path].shape)
        if there == here:
            found[path], status, detail = theirs[path], LOADED, ""
        elif resize := _resizer(path, there, here, c.model):
            found[path], status = resize[0](_host(theirs[path])), RESIZED
            detail = resize[1]
        else:
            reasons.append(
                f"misshapen: {path} is {there} there and {here} here: make them equal, or leave it out with "
                f"config.init.skip=('{path}',)"
            )
            continue
        lines.append(Line(status, path, here, (path,), path, detail))
    if reasons:
        raise ConversionError("does not fit this configuration:", reasons)
    for path in ours:
        if path not in found:
            why = "config.init.skip" if path in asked else "the checkpoint has none"
            lines.append(Line(INITIALISED, path, tuple(ours[path].shape), detail=f"{why}: drawn from the seed"))
    for path, leaf in theirs.items():
        if path not in found:
            why = "config.init.skip" if path in asked else "this model has none"
            lines.append(Line(SKIPPED, path, tuple(np.shape(leaf)), detail=why))
    nested: Parameters = traverse_util.unflatten_dict(found, sep="/")
    return nested, Report(file, "coca_jax", tuple(lines), tuple(notes), of_what="parameters")


def _other_model(there: config.Model, here: config.Model, taken: list[str]) -> list[str]:
    """The keys of the models that make them other functions of the parameters taken."""
    reasons = []
    for key, value in _keys(there).items():
        owner = next((paths for start, paths in _OWNERS.items() if key.startswith(start)), "")
        if key in _FREE or not any(re.match(owner, path) for path in taken):
            continue
        if (mine := _keys(here)[key]) != value:
            reasons.append(
                f"config.model.{key}={mine!r} and the checkpoint has {value!r}: config.model.{key}={value!r}, or "
                "config.init.model='checkpoint' for all of them"
            )
    return reasons


def _other_pictures(there: config.Data, here: config.Data) -> tuple[list[str], list[str]]:
    """Reasons to refuse, and notes."""
    reasons, notes = [], []
    for key in PICTURES:
        mine, value = getattr(here, key), getattr(there, key)
        if key in ("mean", "std"):
            if max(abs(a - b) for a, b in zip(mine, value, strict=True)) > _NEAR:
                reasons.append(f"config.data.{key}={mine} and the checkpoint wants {value}: config.data.{key}={value}")
        elif mine != value:
            notes.append(f"config.data.{key}={mine!r} and the checkpoint was trained with {value!r}")
    return reasons, notes


def _resizer(
    path: str, there: tuple[int, ...], here: tuple[int, ...], model: config.Model
) -> tuple[Callable[[np.ndarray], np.ndarray], str] | None:
    """What makes a table of positions fit, and what it does in words; None for other parameters."""
    if not path.endswith("position_embedding") or there[1:] != here[1:]:
        return None
    if path.startswith("image_encoder/"):
        side, token = model.image.size // model.image.patch, model.image.class_token
        old = round((there[0] - token) ** 0.5)
        return lambda table: np.asarray(
            resize_positions(jnp.asarray(table), side, class_token=token)
        ), f"from a grid of {old}x{old} to {side}x{side}"
    if path.startswith("text_decoder/"):
        kept, new = min(there[0], here[0]) - 1, max(here[0] - there[0], 0)

        def cut(table: np.ndarray) -> np.ndarray:
            # The last row is [CLS]'s. Positions beyond the checkpoint's begin as its last one.
            return np.concatenate([table[:kept], np.repeat(table[-2:-1], new, axis=0), table[-1:]])

        return cut, f"from {there[0] - 1} to {here[0] - 1} tokens and [CLS]" + (
            f": {new} begin as the last" if new else ""
        )
    return None


def _host(leaf: Any) -> np.ndarray:
    """A table of positions on the host, wherever its shards lie; called by all processes alike."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore[attr-defined]
        leaf = jax.jit(lambda x: x, out_shardings=everywhere)(leaf).addressable_data(0)
    return np.asarray(leaf)


def _keys(model: config.Model) -> dict[str, Any]:
    flat: dict[str, Any] = traverse_util.flatten_dict(dataclasses.asdict(model), sep=".")
    return flat


def _with(tree: Any, path: str, value: Any) -> Any:
    head, _, rest = path.partition(".")
    return dataclasses.replace(tree, **{head: _with(getattr(tree, head), rest, value) if rest else value})
