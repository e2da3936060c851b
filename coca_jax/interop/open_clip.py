"""open_clip's CoCa to and from ours: one table of names and layouts, read both ways.

    model = open_clip.model_config("coca_ViT-B-32")
    params = open_clip.import_parameters(safetensors.numpy.load_file(file), model)

Facts about open_clip are those of open_clip_torch 3.3.0 (coca_model.py, model.py, transformer.py). A gradient converts
like the parameter that it belongs to.

Axes: d width, h heads, k head width, f MLP width, l layers, n image positions, t text positions, q queries,
v vocabulary, e the contrastive space, y x c rows, columns and channels of a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from coca_jax import config
from coca_jax.train import state

Shape = tuple[int, ...]
Parameters = dict[str, Any]


class ConversionError(ValueError):
    """What cannot be converted. The message lists every reason, one a line."""

    def __init__(self, summary: str, reasons: Iterable[str]) -> None:
        super().__init__("\n  ".join([summary, *reasons]))


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
_ALWAYS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "gelu": "exact",
    "image.position": "learned",
    "image.class_token": True,
    "image.patch_bias": False,
    "image.pre_norm": True,
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
    rules = []
    for their_module, our_module, kind in _TABLE:
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
    flat = traverse_util.flatten_dict(params, sep="/")
    _check("the parameters do not fit the model", flat, shapes)
    tensors = {}
    for rule in _rules(model, shapes):
        parts = [np.asarray(flat[path]) for path in rule.paths]
        layers = zip(*parts, strict=True) if rule.stacked else [parts]
        for name, layer in zip(rule.names, layers, strict=True):
            tensors[name] = np.array(_to_theirs(rule.layout, layer), np.float32, order="C")
    return tensors


@functools.lru_cache(maxsize=8)  # it traces the model
def _shapes(model: config.Model) -> Mapping[str, Shape]:
    """Our parameters' shapes by path."""
    _check_expressible(model)
    abstract = state.abstract_parameters(config.Config(model=model))
    return {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}


def _tensor_shapes(rules: Sequence[_Rule]) -> dict[str, Shape]:
    return {name: _their_shape(rule.layout, rule.shapes) for rule in rules for name in rule.names}


def _check(summary: str, arrays: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raises ConversionError, with everything that is wrong, unless the arrays are exactly those of `shapes`."""
    reasons = _differences({name: np.shape(x) for name, x in arrays.items()}, shapes)
    for name in sorted(set(arrays) & set(shapes)):
        dtype = np.dtype(arrays[name].dtype)
        if not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4)):
            reasons.append(f"dtype: {name} is {dtype}: convert it to float32")
    if reasons:
        raise ConversionError(f"{summary}, in {len(reasons)} places:", reasons)


def _differences(given: Mapping[str, Sequence[int]], wanted: Mapping[str, Shape]) -> list[str]:
    return [
        *(f"unknown: {name} {tuple(given[name])}" for name in sorted(set(given) - set(wanted))),
        *(f"missing: {name} {wanted[name]}" for name in sorted(set(wanted) - set(given))),
        *(
            f"misshapen: {name} {tuple(given[name])}, wanted {wanted[name]}"
            for name in sorted(set(given) & set(wanted))
            if tuple(given[name]) != wanted[name]
        ),
    ]


def _check_expressible(model: config.Model) -> None:
    """Raises ConversionError, with every reason, if open_clip's CoCa cannot be this model."""
    text = model.text
    reasons = []
    for key, wanted in _ALWAYS.items():
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


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

# What is read of open_clip's configuration, by section, with its defaults.
_READ: dict[str, dict[str, Any]] = {
    "": {"embed_dim": 0, "init_logit_scale": math.log(1 / 0.07), "pad_id": 0},
    "vision_cfg": {
        **{"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0},
        **{"attn_pooler_queries": 256, "attn_pooler_heads": 8},
    },
    "text_cfg": {
        **{"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0},
        **{"pad_id": 0},
    },
    "multimodal_cfg": {"context_length": 77, "width": 512, "heads": 8, "layers": 12},
}
# What must be true there; open_clip's default is False.
_MUST_BE_TRUE = {"vision_cfg": ("attentional_pool", "output_tokens"), "text_cfg": ("embed_cls", "output_tokens")}
# What may be written there though it is not read: it says what is the case anyway, or changes nothing that is computed.
# Every other key must be off (None, False, 0): it asks for something that our model does not have.
_HARMLESS = {
    "": {"custom_text", "cast_dtype", *_READ},
    "vision_cfg": {"pool_type=tok", "pos_embed_type=learnable", "patch_dropout", "final_ln_after_pool"},
    "text_cfg": {"proj_type=linear", "pool_type", "eos_id", "final_ln_after_pool"}
    | {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"},
    "multimodal_cfg": {"vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads"}
    | {"embed_cls", "output_tokens"},
}


def _published(embed_dim: int, heads: int, **vision: int) -> dict[str, Any]:
    text = {"context_length": 76, "vocab_size": 49408, "width": embed_dim, "heads": heads, "layers": 12}
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 224, **vision, "attentional_pool": True, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "coca_ViT-B-32": _published(512, 8, patch_size=32, width=768, layers=12),
    "coca_ViT-L-14": _published(768, 12, patch_size=14, width=1024, layers=24),
}


def model_config(
    open_clip_config: Mapping[str, Any] | str, tensors: Mapping[str, Sequence[int]] | None = None
) -> config.Model:
    """Our configuration of an open_clip CoCa, computing in float32.

    Args:
      open_clip_config: the `model_cfg` of an open_clip_config.json, with open_clip's defaults for what it leaves out;
        or a name of CONFIGS.
      tensors: names and shapes of a checkpoint, which are then compared with the configuration's.

    Raises:
      ConversionError: the configuration asks for what our model does not have, or the tensors do not fit it; every
        reason is listed.
      ConfigError: open_clip's sizes do not fit together, e.g. heads that do not divide a width.
    """
    if isinstance(open_clip_config, str):
        if open_clip_config not in CONFIGS:
            raise ConversionError(f"open_clip configuration {open_clip_config!r} is not built in; there are:", CONFIGS)
        open_clip_config = CONFIGS[open_clip_config]
    values, reasons = _read(open_clip_config)
    if not reasons:
        top, vision, text, decoder = (values[section] for section in _READ)
        if vision["width"] % vision["head_width"]:
            reasons.append(f"vision_cfg.head_width={vision['head_width']} does not divide width={vision['width']}")
        for key in ("width", "heads"):
            if decoder[key] != text[key]:
                reasons.append(f"multimodal_cfg.{key}={decoder[key]}: must be text_cfg.{key}={text[key]}")
        if decoder["context_length"] < text["context_length"]:
            reasons.append(f"multimodal_cfg.context_length={decoder['context_length']}: is less than text_cfg's")
        if top["pad_id"] != text["pad_id"]:
            reasons.append(f"pad_id={top['pad_id']}: must be text_cfg.pad_id={text['pad_id']}")
    if reasons:
        raise ConversionError("this open_clip configuration cannot be converted:", reasons)
    ours: dict[str, Any] = {
        "embed_dim": top["embed_dim"],
        "temperature": math.exp(-top["init_logit_scale"]),
        "dtype": "float32",
        "param_dtype": "float32",
        "image": {
            "size": vision["image_size"],
            "patch": vision["patch_size"],
            "width": vision["width"],
            "depth": vision["layers"],
            "heads": vision["width"] // vision["head_width"],
            "mlp_dim": int(vision["width"] * vision["mlp_ratio"]),
        },
        "pooler": {"queries": vision["attn_pooler_queries"], "heads": vision["attn_pooler_heads"]},
        "text": {
            "vocab_size": text["vocab_size"],
            "length": text["context_length"],  # [CLS] comes on top, there as here
            "width": text["width"],
            "heads": text["heads"],
            "mlp_dim": int(text["width"] * text["mlp_ratio"]),
            "n_uni": text["layers"],
            "n_multi": decoder["layers"],
            "pad_id": text["pad_id"],
        },
    }
    for key, value in _ALWAYS.items():
        *group, name = key.split(".")
        (ours[group[0]] if group else ours)[name] = value
    model = config.from_config_dict({"model": ours}).model
    _check_expressible(model)
    if tensors is not None and (reasons := _differences(tensors, tensor_shapes(model))):
        raise ConversionError(f"the tensors do not fit the open_clip configuration, in {len(reasons)} places:", reasons)
    return model


def _read(given: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The values that are read, by section, and what is wrong."""
    values: dict[str, dict[str, Any]] = {}
    reasons = []
    for section, defaults in _READ.items():
        keys = given.get(section) if section else given
        if not isinstance(keys, Mapping):
            reasons.append(f"{section}={keys!r}: must be a group of keys")
            continue
        dot = section and f"{section}."
        values[section] = {}
        for key, default in defaults.items():
            value = keys.get(key, default)
            if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
                value = value[0]  # image_size=[224, 224]
            kinds, wanted = ((int, float), "number") if isinstance(default, float) else ((int,), "whole number")
            if type(value) not in kinds or value < 0 or (value == 0 and key != "pad_id"):
                reasons.append(f"{dot}{key}={value!r}: must be a {wanted} {'from' if key == 'pad_id' else 'above'} 0")
            values[section][key] = value
        required = _MUST_BE_TRUE.get(section, ())
        for key in required:
            if keys.get(key) is not True:
                reasons.append(f"{dot}{key}={keys.get(key)!r}: must be True")
        for key, value in keys.items():
            known = key in defaults or key in required or not {key, f"{key}={value}"}.isdisjoint(_HARMLESS[section])
            if value and not known:
                reasons.append(f"{dot}{key}={value!r}: our model has no such thing, or open_clip does not")
    return values, reasons
