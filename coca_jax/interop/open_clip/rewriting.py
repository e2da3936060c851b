"""Models that open_clip's CoCa is not, as weights of one that it is.

Each rewriting takes one difference away and leaves what the model computes as it is: exactly, but for the rounding of
float32 where that is said. What no weights can make up for is refused. Reasons name open_clip_torch 3.3.0's source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from coca_jax import config
from coca_jax.interop.open_clip import two_poolers
from coca_jax.interop.weights import ConversionError, Parameters
from coca_jax.model import layers
from coca_jax.model.image_encoder import sincos_grid

Flat = dict[str, np.ndarray]
Rewrite = Callable[[config.Model, Flat], tuple[config.Model, Flat]]

_MULTI = "text_decoder/multimodal/blocks"


@dataclasses.dataclass(frozen=True)
class _Difference:
    """A value that open_clip's CoCa does not have.

    Attributes:
      key: of config.Model.
      applies: whether the model has it.
      reason: how it is made up for, or why it cannot be.
      rewrite: None: it is refused.
    """

    key: str
    applies: Callable[[config.Model], bool]
    reason: str
    rewrite: Rewrite | None = None


def explain(model: config.Model) -> list[tuple[str, str, str]]:
    """What in a model is not as in open_clip's published ones: (key and value, what becomes of it, why).

    What becomes of it is `expressible` (a key of open_clip's configuration says it), `rewritten` or `refused`.
    """
    image, text = model.image, model.text
    by_key = (
        ("image.pre_norm", not image.pre_norm, "vision_cfg.no_ln_pre"),
        ("image.heads", image.width // image.heads != 64, "vision_cfg.head_width"),
        ("image.mlp_dim", image.mlp_dim != 4 * image.width, "vision_cfg.mlp_ratio"),
        ("pooler.heads", model.pooler.heads != 8, "vision_cfg.attn_pooler_heads"),
        ("pooler.queries", model.pooler.queries != 256, "vision_cfg.attn_pooler_queries"),
        ("text.pad_id", text.pad_id != 0, "pad_id and text_cfg.pad_id"),
        ("logit_bias", model.logit_bias != 0, "init_logit_bias"),
    )
    lines = [(_named(model, key), "expressible", f"{theirs} says it") for key, applies, theirs in by_key if applies]
    for d in _DIFFERENCES:
        if d.applies(model):
            lines.append((_named(model, d.key), "rewritten" if d.rewrite else "refused", d.reason))
    return lines


def refused(model: config.Model) -> list[str]:
    """Why open_clip's CoCa cannot be this model: every reason, none where it can."""
    return [f"{what}: {why}" for what, status, why in explain(model) if status == "refused"]


def rewrite(model: config.Model, params: Mapping[str, Any]) -> tuple[config.Model, Parameters]:
    """The same function as one of open_clip's architecture, with float32 parameters.

    Args:
      model: any.
      params: its parameters, nested.

    Returns:
      A model and parameters that `export_parameters` takes; those given where nothing has to be rewritten.

    Raises:
      ConversionError: it cannot be; every reason is listed.
    """
    if reasons := refused(model):
        raise ConversionError("open_clip's CoCa cannot be this model:", reasons)
    flat = {path: np.asarray(x).astype(np.float32) for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    for d in _DIFFERENCES:
        if d.applies(model):
            assert d.rewrite is not None
            model, flat = d.rewrite(model, flat)
    return model, traverse_util.unflatten_dict(flat, sep="/")


def _named(model: config.Model, key: str) -> str:
    return f"config.model.{key}={config.get(config.Config(model=model), f'model.{key}')!r}"


def _changed(model: config.Model, group: str = "", **values: Any) -> config.Model:
    if group:
        return dataclasses.replace(model, **{group: dataclasses.replace(getattr(model, group), **values)})
    return dataclasses.replace(model, **values)


# ---------------------------------------------------------------------------------------------------------------------
# Rewritings, in the order in which they are done


def _merge_poolers(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """Queries of one attention do not see each other: two poolers with the same weights are one with both's queries."""
    ours, theirs = "generative_pooler/", "contrastive_pooler/"
    other = {path.removeprefix(theirs): x for path, x in flat.items() if path.startswith(theirs)}
    unlike = [rest for rest, x in other.items() if rest != "query_tokens" and not np.array_equal(x, flat[ours + rest])]
    if unlike and model.text.cross_kv_norm:
        raise ConversionError(
            "open_clip's CoCa cannot be this model:",
            [
                f"{_named(model, 'pooler.kind')}: open_clip has one pooler, these two differ in more than their "
                f"queries ({len(unlike)} of {len(other)} arrays, {theirs}{unlike[0]} for one), and with "
                "config.model.text.cross_kv_norm=True the decoder's norm is not free to tell their results apart"
            ],
        )
    if unlike:
        return two_poolers.merge(model, flat)
    flat = {path: x for path, x in flat.items() if not path.startswith(theirs)}
    queries = np.concatenate([other["query_tokens"], flat[ours + "query_tokens"]])
    model = _changed(model, "pooler", kind="single", queries=model.pooler.queries + 1)
    return model, flat | {ours + "query_tokens": queries}


def _image_positions(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    grid = sincos_grid(model.image.size // model.image.patch, model.image.width, model.image.class_token)
    return _changed(model, "image", position="learned"), flat | {"image_encoder/position_embedding": np.asarray(grid)}


def _text_positions(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    table = layers.sincos(jax.numpy.arange(model.text.length + 1, dtype=np.float32), model.text.width)
    return _changed(model, "text", position="learned"), flat | {"text_decoder/position_embedding": np.asarray(table)}


def _patch_bias(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    flat = dict(flat)
    bias = flat.pop("image_encoder/patch_embedding/bias")
    position = flat["image_encoder/position_embedding"].copy()
    position[1:] += bias[None]  # the first is the class token's
    return _changed(model, "image", patch_bias=False), flat | {"image_encoder/position_embedding": position}


def _untie(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    head = flat["text_decoder/token_embedding/embedding"].T
    return _changed(model, "text", tie_embeddings=False), flat | {"text_decoder/lm_head/kernel": head}


def _second_mlp(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """A first MLP that adds nothing. It begins as the second, so that it can learn if it is trained on."""
    new = {}
    for part in ("mlp", "mlp_norm"):
        for path in [path for path in flat if path.startswith(f"{_MULTI}/{part}/")]:
            x = flat[path]
            new[path.replace(f"/{part}/", f"/self_{part}/")] = np.zeros_like(x) if "/down/" in path else x
    return _changed(model, "text", cross_mlp=True), flat | new


def _wider_mlp(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """Units that are gelu(0) = 0 and that nothing reads."""
    flat, wide = dict(flat), 4 * model.text.width
    for path, x in flat.items():
        if path.startswith("text_decoder/") and "mlp/" in path and not path.endswith("down/bias"):
            axis = x.ndim - 2 if path.endswith("down/kernel") else x.ndim - 1
            widths = [(0, wide - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
            flat[path] = np.pad(x, widths)
    return _changed(model, "text", mlp_dim=wide), flat


def _wider_space(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """Features with zeros behind: the same lengths and products."""
    flat, wide = dict(flat), model.text.width
    for path in ("image_projection/kernel", "text_projection/kernel"):
        flat[path] = np.pad(flat[path], [(0, 0), (0, wide - model.embed_dim)])
    return _changed(model, embed_dim=wide), flat


# What writes into a tower's residual stream, or into what the pooler's norms and the decoder's read.
_WRITERS = (
    *("image_encoder/blocks/attention/out", "image_encoder/blocks/mlp/down"),
    *("generative_pooler/query_tokens", "generative_pooler/attention/out"),
    *("text_decoder/token_embedding", "text_decoder/cls_embedding", "text_decoder/position_embedding"),
    *("text_decoder/unimodal/blocks/attention/out", "text_decoder/unimodal/blocks/mlp/down"),
    *(f"{_MULTI}/{part}" for part in ("attention/out", "self_mlp/down", "cross_attention/out", "mlp/down")),
)


def _epsilon(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """LN(x; eps) = LN(s x; s^2 eps): every stream is s times as large, and each LayerNorm's result is what it was."""
    scale = np.float32(math.sqrt(1e-5 / model.norm_eps))
    writers = list(_WRITERS)
    embeddings = ["image_encoder/patch_embedding", "image_encoder/class_token", "image_encoder/position_embedding"]
    if model.image.pre_norm:
        writers.append("image_encoder/pre_norm")  # whose result is the stream
    if model.text.cross_kv_norm:
        writers.append("generative_pooler/out_norm")  # read by a norm, and by a projection to unit length
    writers += embeddings
    new = {path: x * scale for path, x in flat.items() if path.startswith(tuple(writers))}
    return _changed(model, norm_eps=1e-5), flat | new


def _kv_norm(model: config.Model, flat: Flat) -> tuple[config.Model, Flat]:
    """Undoes the LayerNorm that open_clip has before keys and values: near zero, it is linear but for the mean.

    What it reads, y = g n + b with normalised n, is made so small, times delta, that its variance is nothing beside
    eps: LN(delta y) = (delta / sqrt(eps)) (y - mean(y)), and its own scale takes the factor back. The mean is known by
    the rest, for n sums to nothing: with z = y - mean(y) and u = (1 / g) / sum(1 / g), mean(y) = u.b - u.z. So
    y = z + u.b - u.z, which is a matrix and a vector in front of keys and values.
    """
    g, b = (flat[f"generative_pooler/out_norm/{part}"].astype(np.float64) for part in ("scale", "bias"))
    with np.errstate(divide="ignore", invalid="ignore"):
        u = (1 / g) / np.sum(1 / g)
    if not np.abs(u).sum() < _LARGEST_CORRECTION:
        raise ConversionError(
            "open_clip's CoCa cannot be this model:",
            [
                f"{_named(model, 'text.cross_kv_norm')}: open_clip has a LayerNorm before the decoder's keys and "
                "values, and the mean that it takes cannot be told from the rest: generative_pooler/out_norm/scale has "
                "values near 0, or of both signs"
            ],
        )
    delta = 2.0**-20
    scale = np.full(g.shape, math.sqrt(model.norm_eps) / delta)
    depth = model.text.n_multi
    new = {
        # Powers of two: what goes in and out again is the same to the last bit.
        "generative_pooler/out_norm/scale": g * delta,
        "generative_pooler/out_norm/bias": b * delta,
        "image_projection/kernel": flat["image_projection/kernel"] / delta,
        f"{_MULTI}/cross_kv_norm/scale": np.tile(scale, (depth, 1)),
        f"{_MULTI}/cross_kv_norm/bias": np.zeros((depth, g.size)),
    }
    for part in ("key", "value"):
        path = f"{_MULTI}/cross_attention/{part}"
        kernel = flat[f"{path}/kernel"].astype(np.float64)  # [l, d, h, k]
        column = kernel.sum(axis=1)
        new[f"{path}/kernel"] = kernel - u[None, :, None, None] * column[:, None]
        new[f"{path}/bias"] = flat[f"{path}/bias"] + (u @ b) * column
    model = _changed(model, "text", cross_kv_norm=True)
    return model, flat | {path: x.astype(np.float32) for path, x in new.items()}


_LARGEST_CORRECTION = 30.0  # sum of |u|, 1 at best: by so much at most rounding grows

_DIFFERENCES = (
    _Difference(
        "pooler.kind",
        lambda m: m.pooler.kind == "cascade",
        "its one pooler reads the image; its own 'cascade' normalises before the poolers and returns [b, 1, d] "
        "(VisionTransformer._pool, 'untested')",
    ),
    _Difference(
        "image.class_token", lambda m: not m.image.class_token, "its class token takes part in every attention"
    ),
    _Difference(
        "gelu",
        lambda m: m.gelu != "exact",
        "its decoder's activation cannot be chosen (_build_text_decoder_tower reads no act_kwargs)",
    ),
    _Difference(
        "text.cls_mask",
        lambda m: m.text.cls_mask != "legacy",
        "no key of its configuration reaches TextTransformer's correct_cls_mask",
    ),
    _Difference("text.n_multi", lambda m: m.text.n_multi < 1, "it has a decoder of one layer or more"),
    _Difference(
        "text.mlp_dim",
        lambda m: m.text.mlp_dim > 4 * m.text.width,
        "its decoder's MLP is 4 * width (_build_text_decoder_tower does not read multimodal_cfg.mlp_ratio)",
    ),
    _Difference(
        "embed_dim",
        lambda m: m.embed_dim > m.text.width,
        "its pooler and projection are as wide as embed_dim, and so must the decoder that reads them be",
    ),
    _Difference(
        "image.position", lambda m: m.image.position == "sincos", "the table as learned positions", _image_positions
    ),
    _Difference(
        "text.position", lambda m: m.text.position == "sincos", "the table as learned positions", _text_positions
    ),
    _Difference(
        "image.patch_bias", lambda m: m.image.patch_bias, "added to the patches' positions, rounded once", _patch_bias
    ),
    _Difference("text.tie_embeddings", lambda m: m.text.tie_embeddings, "a transposed copy as output head", _untie),
    _Difference("text.cross_mlp", lambda m: not m.text.cross_mlp, "a first MLP that adds nothing", _second_mlp),
    _Difference(
        "pooler.kind",
        lambda m: m.pooler.kind == "parallel",
        "one pooler with the queries of both; where they differ in more, with the heads of both, to the rounding of "
        "float32, and a text decoder twice as wide",
        _merge_poolers,
    ),
    _Difference("text.mlp_dim", lambda m: m.text.mlp_dim < 4 * m.text.width, "MLP units that are zero", _wider_mlp),
    _Difference("embed_dim", lambda m: m.embed_dim < m.text.width, "features with zeros behind", _wider_space),
    _Difference(
        "norm_eps", lambda m: m.norm_eps != 1e-5, "every residual stream scaled, to the rounding of float32", _epsilon
    ),
    _Difference(
        "text.cross_kv_norm",
        lambda m: not m.text.cross_kv_norm,
        "its LayerNorm is undone by weights, to the rounding of float32",
        _kv_norm,
    ),
)
