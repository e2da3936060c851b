"""open_clip's configuration of a CoCa to and from ours, and what weights alone tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax import config
from coca_jax.interop.open_clip.table import ALWAYS, check_expressible, differences, tensor_shapes
from coca_jax.interop.weights import ConversionError

SIGLIP_BIAS = -10.0  # where SigLIP's loss begins (Zhai et al. 2023, arXiv 2303.15343, section 3.2)

# What is read of open_clip's configuration, by section, with its defaults.
_READ: dict[str, dict[str, Any]] = {
    "": {"embed_dim": 0, "init_logit_scale": math.log(1 / 0.07), "init_logit_bias": None, "pad_id": 0},
    "vision_cfg": {
        **{"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0},
        **{"attn_pooler_queries": 256, "attn_pooler_heads": 8, "no_ln_pre": False},
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


_LARGE = 2**31  # no size is


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
        if not abs(top["init_logit_scale"]) <= 100:  # of the logarithm: its exponential is a number, and not 0
            reasons.append(f"init_logit_scale={top['init_logit_scale']}: must be between -100 and 100")
        if top["pad_id"] != text["pad_id"]:
            reasons.append(f"pad_id={top['pad_id']}: must be text_cfg.pad_id={text['pad_id']}")
    if reasons:
        raise ConversionError("this open_clip configuration cannot be converted:", reasons)
    bias = top["init_logit_bias"]
    ours: dict[str, Any] = {
        "embed_dim": top["embed_dim"],
        "temperature": math.exp(-top["init_logit_scale"]),
        # Here 0 is to have none.
        "logit_bias": 0.0 if bias is None else float(bias) or SIGLIP_BIAS,
        "dtype": "float32",
        "param_dtype": "float32",
        "image": {
            "size": vision["image_size"],
            "patch": vision["patch_size"],
            "width": vision["width"],
            "depth": vision["layers"],
            "heads": vision["width"] // vision["head_width"],
            "mlp_dim": int(vision["width"] * vision["mlp_ratio"]),
            "pre_norm": not vision["no_ln_pre"],
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
    for key, value in ALWAYS.items():
        *group, name = key.split(".")
        (ours[group[0]] if group else ours)[name] = value
    model = config.from_config_dict({"model": ours}).model
    check_expressible(model)
    layers = model.image.depth + model.text.n_uni + model.text.n_multi
    if tensors is not None and layers > len(tensors):  # said before they are listed: any number can be written
        raise ConversionError(f"the open_clip configuration has {layers} layers, and the file {len(tensors)} tensors")
    if tensors is not None and (reasons := differences(tensors, tensor_shapes(model))):
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
            if wrong := _wrong(key, value, default):
                reasons.append(f"{dot}{key}={value!r}: must be {wrong}")
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


def _wrong(key: str, value: Any, default: Any) -> str:
    """What a value must be, or nothing if it is."""
    if default is None:
        return "" if value is None or (type(value) in (int, float) and abs(value) < _LARGE) else "a number, or absent"
    if isinstance(default, bool):
        return "" if value is None or isinstance(value, bool) else "true or false"
    kinds, wanted = ((int, float), "number") if isinstance(default, float) else ((int,), "whole number")
    if key == "init_logit_scale":  # a logarithm, of either sign
        return "" if type(value) in kinds else f"a {wanted}"
    if type(value) in kinds and value < _LARGE and (value > 0 or (value == 0 and key == "pad_id")):
        return ""
    return f"a {wanted} {'from' if key == 'pad_id' else 'above'} 0"


def open_clip_config(model: config.Model) -> dict[str, Any]:
    """The `model_cfg` of an open_clip_config.json for a model of its architecture: `model_config` the other way.

    Raises:
      ConversionError: open_clip's CoCa cannot be this model; every reason is listed.
    """
    check_expressible(model)
    image, text = model.image, model.text
    ratio = image.mlp_dim / image.width
    if int(image.width * ratio) != image.mlp_dim:  # that is how it is read
        ratio = (image.mlp_dim + 0.5) / image.width
    decoder = {
        **{"context_length": text.length, "vocab_size": text.vocab_size},
        **{"width": text.width, "heads": text.heads},
    }
    values: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "init_logit_scale": -math.log(model.temperature),
        "pad_id": text.pad_id,
        "custom_text": True,
        "vision_cfg": {
            **{"image_size": image.size, "patch_size": image.patch, "width": image.width, "layers": image.depth},
            **{"head_width": image.width // image.heads, "mlp_ratio": ratio},
            **{"attentional_pool": True, "attn_pooler_queries": model.pooler.queries},
            **{"attn_pooler_heads": model.pooler.heads, "output_tokens": True},
        },
        "text_cfg": decoder | {"layers": text.n_uni, "pad_id": text.pad_id, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": decoder | {"layers": text.n_multi},
    }
    if not image.pre_norm:
        values["vision_cfg"]["no_ln_pre"] = True
    if model.logit_bias:
        values["init_logit_bias"] = model.logit_bias
    return values


def inferred_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The `model_cfg` that weights alone tell by their names and shapes.

    Shapes do not tell heads: they are taken to be as in every published model, 64 wide in both towers, and 8 of the
    pooler. What else shapes do not tell is open_clip's default: padding with 0.

    Raises:
      ConversionError: tensors that it is told by are missing, or those heads do not divide a width.
    """
    needed = (
        *("visual.conv1.weight", "visual.positional_embedding", "visual.attn_pool.query", "visual.proj"),
        *("text.token_embedding.weight", "text.positional_embedding", "text.text_projection"),
    )
    missing = [
        name for name, rank in zip(needed, (4, 2, 2, 2, 2, 2, 2), strict=True) if len(shapes.get(name, ())) != rank
    ]
    depths = [
        len({name.split(".")[prefix.count(".")] for name in shapes if name.startswith(prefix)})
        for prefix in ("visual.transformer.resblocks.", "text.transformer.resblocks.", "text_decoder.resblocks.")
    ]
    mlp = shapes.get("visual.transformer.resblocks.0.mlp.c_fc.weight", ())
    if missing or 0 in depths or len(mlp) != 2:
        raise ConversionError(
            "these are not the weights of open_clip's CoCa (an image encoder alone is a start for training: "
            "config.init.image_encoder); tensors of one that are missing or of another rank:",
            missing or ["visual.transformer.resblocks, text.transformer.resblocks or text_decoder.resblocks"],
        )
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = math.isqrt(max(0, shapes["visual.positional_embedding"][0] - 1))
    vocab_size, text_width = shapes["text.token_embedding.weight"]
    reasons = [
        f"{key}: {size} is not divisible by {number}"
        for key, size, number in (
            ("vision_cfg.head_width", width, 64),
            ("text_cfg.heads", text_width, 64),
            ("vision_cfg.attn_pooler_heads", text_width, 8),
        )
        if size % number
    ]
    if reasons:
        raise ConversionError(
            "the shapes do not tell how many heads there are, and the usual ones do not divide the widths: put the "
            "open_clip_config.json beside the weights, with",
            reasons,
        )
    text = {"context_length": shapes["text.positional_embedding"][0] - 1, "vocab_size": vocab_size}
    text |= {"width": text_width, "heads": text_width // 64}
    values: dict[str, Any] = {
        "embed_dim": shapes["visual.proj"][1],
        "vision_cfg": {
            **{"image_size": side * patch, "patch_size": patch, "width": width, "layers": depths[0], "head_width": 64},
            **{"mlp_ratio": mlp[0] / width, "attentional_pool": True, "output_tokens": True},
            **{"attn_pooler_queries": shapes["visual.attn_pool.query"][0], "attn_pooler_heads": 8},
            "no_ln_pre": "visual.ln_pre.weight" not in shapes,
        },
        "text_cfg": text | {"layers": depths[1], "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text | {"layers": depths[2]},
    }
    if "logit_bias" in shapes:
        values["init_logit_bias"] = SIGLIP_BIAS
    return values
