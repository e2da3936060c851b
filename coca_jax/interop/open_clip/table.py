"""open_clip's tensors and our parameters: one table of names and layouts, read both ways.

A gradient converts like the parameter that it belongs to.

Axes: d width, h heads, k head width, f MLP width, l layers, n image positions, t text positions, q queries,
v vocabulary, e the contrastive space, y x c rows, columns and channels of a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from coca_jax import config
from coca_jax.interop.weights import ConversionError, Parameters
from coca_jax.train import state

Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------------------
# The table

# Kinds of modules: tensor of open_clip's, parameters of ours, layout. A layout is written `ours->theirs`: theirs has
# the axes of ours in another order, those in parentheses as one. Where several of our parameters make one tensor of
# theirs, they lie one after the other along its first axis.
_NORM = (("weight", ("scale",), "d->d"), ("bias", ("bias",), "d->d"))
_MLP = (
    ("c_fc.weight", ("up/kernel",), "df->fd"),
    ("c_fc.bias", ("up/bias",), "f->f"),
    ("c_proj.weight", ("down/kernel",), "fd->df"),
    ("c_proj.bias", ("down/bias",), "d->d"),
)
_ATTENTION_REST = (
    ("in_proj_bias", ("query/bias", "key/bias", "value/bias"), "hk->(hk)"),
    ("out_proj.weight", ("out/kernel",), "hkd->d(hk)"),
    ("out_proj.bias", ("out/bias",), "d->d"),
)
_ATTENTION = (
    ("in_proj_weight", ("query/kernel", "key/kernel", "value/kernel"), "dhk->(hk)d"),
    *_ATTENTION_REST,
)
_SPLIT_ATTENTION = (
    ("q_proj_weight", ("query/kernel",), "dhk->(hk)d"),
    ("k_proj_weight", ("key/kernel",), "dhk->(hk)d"),
    ("v_proj_weight", ("value/kernel",), "dhk->(hk)d"),
    *_ATTENTION_REST,
)
_KINDS = {"norm": _NORM, "mlp": _MLP, "attention": _ATTENTION, "split_attention": _SPLIT_ATTENTION}

# A module or a tensor of open_clip's, ours, and its kind or its layout. `{i}` counts the layers, which we keep stacked.
_TABLE = (
    ("logit_scale", "logit_scale", "->"),
    ("logit_bias", "logit_bias", "->"),
    ("visual.conv1.weight", "image_encoder/patch_embedding/kernel", "yxcd->dcyx"),
    ("visual.class_embedding", "image_encoder/class_token", "d->d"),
    ("visual.positional_embedding", "image_encoder/position_embedding", "nd->nd"),
    ("visual.ln_pre", "image_encoder/pre_norm", "norm"),
    ("visual.transformer.resblocks.{i}.ln_1", "image_encoder/blocks/attention_norm", "norm"),
    ("visual.transformer.resblocks.{i}.attn", "image_encoder/blocks/attention", "attention"),
    ("visual.transformer.resblocks.{i}.ln_2", "image_encoder/blocks/mlp_norm", "norm"),
    ("visual.transformer.resblocks.{i}.mlp", "image_encoder/blocks/mlp", "mlp"),
    ("visual.attn_pool.query", "generative_pooler/query_tokens", "qd->qd"),
    ("visual.attn_pool.ln_q", "generative_pooler/query_norm", "norm"),
    ("visual.attn_pool.ln_k", "generative_pooler/token_norm", "norm"),
    ("visual.attn_pool.attn", "generative_pooler/attention", "pooler_attention"),
    ("visual.ln_post", "generative_pooler/out_norm", "norm"),
    ("visual.proj", "image_projection/kernel", "de->de"),
    ("text.token_embedding.weight", "text_decoder/token_embedding/embedding", "vd->vd"),
    ("text.cls_emb", "text_decoder/cls_embedding", "d->d"),
    ("text.positional_embedding", "text_decoder/position_embedding", "td->td"),
    ("text.transformer.resblocks.{i}.ln_1", "text_decoder/unimodal/blocks/attention_norm", "norm"),
    ("text.transformer.resblocks.{i}.attn", "text_decoder/unimodal/blocks/attention", "attention"),
    ("text.transformer.resblocks.{i}.ln_2", "text_decoder/unimodal/blocks/mlp_norm", "norm"),
    ("text.transformer.resblocks.{i}.mlp", "text_decoder/unimodal/blocks/mlp", "mlp"),
    ("text.ln_final", "text_decoder/cls_norm", "norm"),
    ("text.text_projection", "text_projection/kernel", "de->de"),
    ("text_decoder.resblocks.{i}.ln_1", "text_decoder/multimodal/blocks/attention_norm", "norm"),
    ("text_decoder.resblocks.{i}.attn", "text_decoder/multimodal/blocks/attention", "attention"),
    ("text_decoder.resblocks.{i}.ln_2", "text_decoder/multimodal/blocks/self_mlp_norm", "norm"),
    ("text_decoder.resblocks.{i}.mlp", "text_decoder/multimodal/blocks/self_mlp", "mlp"),
    ("text_decoder.cross_attn.{i}.ln_1", "text_decoder/multimodal/blocks/cross_norm", "norm"),
    ("text_decoder.cross_attn.{i}.ln_1_kv", "text_decoder/multimodal/blocks/cross_kv_norm", "norm"),
    ("text_decoder.cross_attn.{i}.attn", "text_decoder/multimodal/blocks/cross_attention", "attention"),
    ("text_decoder.cross_attn.{i}.ln_2", "text_decoder/multimodal/blocks/mlp_norm", "norm"),
    ("text_decoder.cross_attn.{i}.mlp", "text_decoder/multimodal/blocks/mlp", "mlp"),
    ("text_decoder.ln_final", "text_decoder/final_norm", "norm"),
    ("text_decoder.text_projection", "text_decoder/lm_head/kernel", "dv->dv"),
)

# What open_clip's CoCa always is, as keys of config.Model.
ALWAYS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "gelu": "exact",
    "image.position": "learned",
    "image.class_token": True,
    "image.patch_bias": False,
    "pooler.kind": "single",
    "text.position": "learned",
    "text.tie_embeddings": False,
    "text.cross_mlp": True,
    "text.cross_kv_norm": True,
    "text.cls_mask": "legacy",
}


@dataclasses.dataclass(frozen=True)
class _Rule:
    """One tensor of open_clip's, or one a layer, and the parameters that make it."""

    names: list[str]  # theirs: one, or one a layer
    paths: tuple[str, ...]  # ours
    layout: str
    shapes: list[Shape]  # of ours, without the layer axis
    stacked: bool  # ours have a layer axis in front


def _rules(model: config.Model, shapes: Mapping[str, Shape]) -> list[_Rule]:
    """The table for a model whose parameters have these shapes, by path."""
    # torch.nn.MultiheadAttention keeps query, key and value in one matrix exactly where they read the same width.
    fused = model.image.width == model.text.width
    kinds = {**_KINDS, "pooler_attention": _ATTENTION if fused else _SPLIT_ATTENTION}
    absent = {"pre_norm": model.image.pre_norm, "logit_bias": model.logit_bias}  # what a model may do without
    rules = []
    for their_module, our_module, kind in _TABLE:
        if not absent.get(our_module.split("/")[-1], True):
            continue
        for theirs, ours, layout in kinds.get(kind, (("", ("",), kind),)):
            name = f"{their_module}.{theirs}" if theirs else their_module
            paths = tuple(f"{our_module}/{path}" if path else our_module for path in ours)
            parts = [shapes[path] for path in paths]
            if stacked := "{i}" in name:
                names, parts = [name.format(i=i) for i in range(parts[0][0])], [part[1:] for part in parts]
            else:
                names = [name]
            rules.append(_Rule(names, paths, layout, parts, stacked))
    return rules


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def tensor_shapes(model: config.Model) -> dict[str, Shape]:
    """Names and shapes of open_clip's state_dict for a model, without allocating anything.

    Raises:
      ConversionError: open_clip's CoCa cannot be this model; every reason is listed.
    """
    return _tensor_shapes(_rules(model, _shapes(model)))


def import_parameters(tensors: Mapping[str, np.ndarray], model: config.Model) -> Parameters:
    """open_clip's tensors as our parameters; each is used, and each parameter is filled.

    Args:
      tensors: by the names of open_clip's state_dict; float32, or float16 or bfloat16, whose values float32 holds.
      model: as from `model_config`.

    Returns:
      A nested dict of new float32 arrays: `CoCa(model).apply({"params": params}, ...)` takes it.

    Raises:
      ConversionError: tensors that are unknown, missing, misshapen or of another dtype, all of them; or open_clip's
        CoCa cannot be this model.
    """
    rules = _rules(model, _shapes(model))
    _check("open_clip's tensors do not fit the model", tensors, _tensor_shapes(rules))
    flat = {}
    for rule in rules:
        layers = [_to_ours(rule.layout, np.asarray(tensors[name]), rule.shapes) for name in rule.names]
        for path, *parts in zip(rule.paths, *layers, strict=True):
            # np.array, not ascontiguousarray, which gives a scalar an axis.
            flat[path] = np.array(np.stack(parts) if rule.stacked else parts[0], np.float32, order="C")
    return traverse_util.unflatten_dict(flat, sep="/")


def export_parameters(params: Mapping[str, Any], model: config.Model) -> dict[str, np.ndarray]:
    """Our parameters as open_clip's state_dict: the inverse of `import_parameters`, bit for bit in float32.

    Args:
      params: nested dict of numpy or JAX arrays; float32, or float16 or bfloat16, whose values float32 holds.
      model: that they belong to.

    Returns:
      New float32 arrays in C order by open_clip's names, for `safetensors.numpy.save_file`.

    Raises:
      ConversionError: open_clip's CoCa cannot be this model, with every reason; or parameters are unknown, missing,
        misshapen or of another dtype, all of them.
    """
    shapes = _shapes(model)
    flat = check_parameters(params, model)
    tensors = {}
    for rule in _rules(model, shapes):
        parts = [np.asarray(flat[path]) for path in rule.paths]
        layers = zip(*parts, strict=True) if rule.stacked else [parts]
        for name, layer in zip(rule.names, layers, strict=True):
            tensors[name] = np.array(_to_theirs(rule.layout, layer), np.float32, order="C")
    return tensors


def check_parameters(params: Mapping[str, Any], model: config.Model) -> dict[str, Any]:
    """The parameters by path. Raises ConversionError, with all that is wrong, where they are not those of the model."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    _check("the parameters do not fit the model", flat, _our_shapes(model))
    return flat


def _shapes(model: config.Model) -> Mapping[str, Shape]:
    """Our parameters' shapes by path, of a model of open_clip's architecture."""
    check_expressible(model)
    return _our_shapes(model)


@functools.lru_cache(maxsize=8)  # it traces the model
def _our_shapes(model: config.Model) -> Mapping[str, Shape]:
    abstract = state.abstract_parameters(config.Config(model=model))
    return {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}


def _tensor_shapes(rules: Sequence[_Rule]) -> dict[str, Shape]:
    return {name: _their_shape(rule.layout, rule.shapes) for rule in rules for name in rule.names}


def _check(summary: str, arrays: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raises ConversionError, with everything that is wrong, unless the arrays are exactly those of `shapes`."""
    reasons = differences({name: np.shape(x) for name, x in arrays.items()}, shapes)
    for name in sorted(set(arrays) & set(shapes)):
        dtype = np.dtype(arrays[name].dtype)
        if not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4)):
            reasons.append(f"dtype: {name} is {dtype}: convert it to float32")
    if reasons:
        raise ConversionError(f"{summary}, in {len(reasons)} places:", reasons)


def differences(given: Mapping[str, Sequence[int]], wanted: Mapping[str, Shape]) -> list[str]:
    return [
        *(f"unknown: {name} {tuple(given[name])}" for name in sorted(set(given) - set(wanted))),
        *(f"missing: {name} {wanted[name]}" for name in sorted(set(wanted) - set(given))),
        *(
            f"misshapen: {name} {tuple(given[name])}, wanted {wanted[name]}"
            for name in sorted(set(given) & set(wanted))
            if tuple(given[name]) != wanted[name]
        ),
    ]


def check_expressible(model: config.Model) -> None:
    """Raises ConversionError, with every reason, if open_clip's CoCa cannot be this model."""
    text = model.text
    reasons = []
    for key, wanted in ALWAYS.items():
        if (value := config.get(config.Config(model=model), f"model.{key}")) != wanted:
            reasons.append(f"config.model.{key}={value!r}: open_clip has {wanted!r}")
    if text.width != model.embed_dim:
        reasons.append(f"config.model.text.width={text.width}: open_clip has that of embed_dim={model.embed_dim}")
    if text.mlp_dim != 4 * text.width:
        reasons.append(f"config.model.text.mlp_dim={text.mlp_dim}: open_clip's decoder has 4 * width={4 * text.width}")
    if text.n_multi < 1:
        reasons.append(f"config.model.text.n_multi={text.n_multi}: open_clip has a decoder of 1 layer or more")
    if reasons:
        raise ConversionError("open_clip's CoCa cannot be this model:", reasons)
    config.check_model(model)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def _axes(layout: str) -> tuple[str, list[str]]:
    """`dhk->(hk)d` is `dhk` and `[hk, d]`."""
    ours, theirs = layout.split("->")
    return ours, [merged or single for merged, single in re.findall(r"\((\w+)\)|(\w)", theirs)]


def _their_shape(layout: str, shapes: Sequence[Shape]) -> Shape:
    ours, theirs = _axes(layout)
    sizes = [dict(zip(ours, shape, strict=True)) for shape in shapes]
    parts = [tuple(math.prod(size[axis] for axis in axes) for axes in theirs) for size in sizes]
    return parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])


def _to_theirs(layout: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    ours, theirs = _axes(layout)
    order = [ours.index(axis) for axis in "".join(theirs)]
    moved = [part.transpose(order).reshape(_their_shape(layout, [part.shape])) for part in parts]
    return moved[0] if len(moved) == 1 else np.concatenate(moved)


def _to_ours(layout: str, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    ours, theirs = _axes(layout)
    order = "".join(theirs)
    back = [order.index(axis) for axis in ours]
    pieces = [tensor]
    if len(shapes) > 1:
        pieces = np.split(tensor, np.cumsum([_their_shape(layout, [shape])[0] for shape in shapes])[:-1])
    sizes = [dict(zip(ours, shape, strict=True)) for shape in shapes]
    return [
        piece.reshape([size[axis] for axis in order]).transpose(back) for piece, size in zip(pieces, sizes, strict=True)
    ]
