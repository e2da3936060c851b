"""The paper's two poolers as open_clip's one, for a text decoder that is made twice as wide.

open_clip has one attention over the image, whose query 0 gives the contrastive feature and whose others the tokens that
the decoder reads. Two attentions of d numbers are one of 2 d, with the heads of both; its queries read with their own
heads, and what the other heads add is made to count for nothing:

    pooler's result   [s (z_g + m), sqrt(2) z_c - s m]        z_g, z_c: the two results without their means
    its LayerNorm     of the contrastive query, z_c alone counts (s = 2^-14), as it had its LayerNorm to itself;
                      of the others, z_g is taken up again and z_c made small, all by one factor that depends on z_c
    ln_1_kv           of the decoder, z_g alone counts and the factor falls out: what is left is z_g's own LayerNorm

m = sqrt(2 eps) puts into the last variance the eps that the factor takes out of it. A LayerNorm of [x, x] is that of x,
twice, and so the decoder computes in both halves of its width what it did.

It needs the decoder's own norm to be free (text.cross_kv_norm=False), as in the paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from coca_jax import config

Flat = dict[str, np.ndarray]

_OURS, _THEIRS = "generative_pooler", "contrastive_pooler"
_CROSS = "text_decoder/multimodal/blocks/cross_attention"
_SMALL, _LARGE = 2.0**-14, 2.0**14  # powers of two: what goes in and out again is the same to the last bit

# Text parameters by the end of their path: the axis of the stream that they read, and that they write, from the back.
_READS = {
    **{f"{part}/kernel": -3 for part in ("query", "key", "value")},
    **{"up/kernel": -2, "lm_head/kernel": -2, "text_projection/kernel": -2},
}
_WRITES = {
    **{f"{part}/{leaf}": -1 for part in ("out", "down") for leaf in ("kernel", "bias")},
    **dict.fromkeys(("norm/scale", "norm/bias", "embedding"), -1),
}
# Of attention: the axis of heads, from the back.
_HEADS = {
    **{f"{part}/{leaf}": -2 for part in ("query", "key", "value") for leaf in ("kernel", "bias")},
    "out/kernel": -3,
}


def merge(model: config.Model, flat: Mapping[str, np.ndarray]) -> tuple[config.Model, Flat]:
    """The same function with pooler.kind=single, text.cross_kv_norm=True and a text decoder twice as wide.

    Args:
      model: pooler.kind=parallel, text.cross_kv_norm=False, learned text positions, untied output head.
      flat: its parameters by path.
    """
    d, eps = model.text.width, model.norm_eps
    values = {path: x.astype(np.float64) for path, x in flat.items()}
    new = {path: x for path, x in values.items() if not path.startswith((_OURS, _THEIRS))}
    for path in [path for path in new if path.startswith(("text_decoder/", "text_projection/"))]:
        new[path] = _twice_as_wide(path, new[path])
    new |= _pooler(values, d, eps) | _between(values, model)
    model = dataclasses.replace(
        model,
        pooler=dataclasses.replace(
            model.pooler, kind="single", queries=model.pooler.queries + 1, heads=2 * model.pooler.heads
        ),
        text=dataclasses.replace(model.text, width=2 * d, heads=2 * model.text.heads, cross_kv_norm=True),
    )
    return model, {path: x.astype(np.float32) for path, x in new.items()}


def _twice_as_wide(path: str, x: np.ndarray) -> np.ndarray:
    """A text parameter for a stream of [x, x]: the first half is read, both are written, the new heads do nothing."""
    for ends, zeros in ((_HEADS, True), (_READS, True), (_WRITES, False)):
        for end, axis in ends.items():
            if path.endswith(end):
                x = np.concatenate([x, np.zeros_like(x) if zeros else x], axis=axis)
                break
    return x


def _pooler(values: Flat, d: int, eps: float) -> Flat:
    """One pooler with the heads of both. The norms' factors go into what reads them."""
    query, token, out = (f"{_OURS}/{norm}_norm" for norm in ("query", "token", "out"))
    queries = np.concatenate([values[f"{pooler}/query_tokens"] for pooler in (_THEIRS, _OURS)])
    new: Flat = {f"{_OURS}/query_tokens": np.concatenate([queries, queries], axis=-1)}  # the first is contrastive
    context = values[f"{token}/scale"].size
    for norm, size in ((query, 2 * d), (token, context)):
        new |= {f"{norm}/scale": np.ones(size), f"{norm}/bias": np.zeros(size)}
    for part, norm in (("query", "query_norm"), ("key", "token_norm"), ("value", "token_norm")):
        kernels, biases = [], []
        for pooler in (_OURS, _THEIRS):
            kernel = values[f"{pooler}/attention/{part}/kernel"]  # [d, h, k]
            scale, bias = (values[f"{pooler}/{norm}/{leaf}"] for leaf in ("scale", "bias"))
            kernels.append(kernel * scale[:, None, None])
            biases.append(values[f"{pooler}/attention/{part}/bias"] + np.einsum("d,dhk->hk", bias, kernel))
            if part == "query":
                kernels[-1] = np.concatenate([kernels[-1], np.zeros_like(kernel)])  # the first half is read
        new[f"{_OURS}/attention/{part}/kernel"] = np.concatenate(kernels, axis=1)
        new[f"{_OURS}/attention/{part}/bias"] = np.concatenate(biases)
    kernels, biases = [], []
    m = math.sqrt(2 * eps) * _SMALL
    for pooler, factor, shift in ((_OURS, _SMALL, m), (_THEIRS, math.sqrt(2), -m)):
        kernel, bias = (values[f"{pooler}/attention/out/{leaf}"] for leaf in ("kernel", "bias"))
        kernel = factor * (kernel - kernel.mean(axis=-1, keepdims=True))  # the norm takes the mean away
        zeros = np.zeros_like(kernel)
        kernels.append(np.concatenate([kernel, zeros] if pooler == _OURS else [zeros, kernel], axis=-1))
        biases.append(factor * (bias - bias.mean()) + shift)
    new[f"{_OURS}/attention/out/kernel"] = np.concatenate(kernels)
    new[f"{_OURS}/attention/out/bias"] = np.concatenate(biases)
    scale, bias = (values[f"{_THEIRS}/out_norm/{leaf}"] for leaf in ("scale", "bias"))
    large = np.full(d, _LARGE / _SMALL)
    new[f"{out}/scale"] = np.concatenate([large, scale / (math.sqrt(2) * _LARGE)])
    new[f"{out}/bias"] = np.concatenate([np.zeros(d), bias / _LARGE])
    return new


def _between(values: Flat, model: config.Model) -> Flat:
    """What reads the pooler: the projection of its first row, and the decoder's norm, keys and values of the others."""
    d, depth = model.text.width, model.text.n_multi
    projection = values["image_projection/kernel"]
    half = np.concatenate([np.full(d, math.sqrt(0.5)), np.zeros(d)])
    new: Flat = {
        "image_projection/kernel": np.concatenate([np.zeros_like(projection), projection * _LARGE]),
        "text_decoder/multimodal/blocks/cross_kv_norm/scale": np.tile(half, (depth, 1)),
        "text_decoder/multimodal/blocks/cross_kv_norm/bias": np.zeros((depth, 2 * d)),
    }
    scale, bias = (values[f"{_OURS}/out_norm/{leaf}"] for leaf in ("scale", "bias"))
    for part in ("key", "value"):
        kernel = values[f"{_CROSS}/{part}/kernel"]  # [l, d, h, k]
        whole = kernel * scale[:, None, None]
        whole = whole - whole.mean(axis=1, keepdims=True)  # m moves all of z_g alike
        shift = values[f"{_CROSS}/{part}/bias"] + np.einsum("d,ldhk->lhk", bias, kernel)
        new[f"{_CROSS}/{part}/kernel"] = _twice_as_wide(f"{part}/kernel", whole)
        new[f"{_CROSS}/{part}/bias"] = _twice_as_wide(f"{part}/bias", shift)
    return new
