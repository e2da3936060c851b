"""What of a model is exported to other programs: plain functions of (parameters, arrays), and what describes them.

    encode_image  images uint8 [b, size, size, 3] -> image_features [b, e], image_tokens [b, q, d]
    encode_text   tokens int32 [b, t] -> text_features [b, e]
    prefill       tokens int32 [b, s], image_tokens -> logits [b, s, v], the cache
    decode_step   tokens int32 [b, 1], the cache, index int32 -> logits [b, 1, v], the cache's parts that grew

A caption is bos through `prefill`, then the likeliest token through `decode_step` with index 1, 2, ... until eos.
Pictures are uint8, 0..255, and are normalised inside: nobody else needs mean and deviation, and nothing can be
normalised twice. A half that the model does not have is left out.

Axes: b batch, e the contrastive space, q image tokens, d width, t = text.length, s tokens of a prompt, v vocabulary,
l layers, h heads, k head width.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from coca_jax import config
from coca_jax.data import addresses
from coca_jax.data.images import Preprocessor, normalize
from coca_jax.interop import folders
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model import layers
from coca_jax.model.coca import CoCa
from coca_jax.model.text_decoder import DecoderCache
from coca_jax.train import state

FlatParameters = dict[str, Any]

MANIFEST_FILE = "manifest.json"
VERSION = 1  # of the manifest

# What decode_step reads and writes again, and what it only reads.
GROWING = ("unimodal_keys", "unimodal_values", "multimodal_keys", "multimodal_values")
FIXED = ("cross_keys", "cross_values")
NEW = "new_"  # in front of the names of what decode_step gives back


@dataclasses.dataclass(frozen=True)
class Array:
    """An input or output.

    Attributes:
      name: unique within its function.
      shape: numbers, and letters for sizes that are free.
      dtype: numpy's name.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Function:
    """An exported function: `call(parameters by path, *inputs)` gives a tuple of the outputs."""

    name: str
    call: Callable[..., tuple[jax.Array, ...]]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


def portable(model: config.Model, dtype: str = "", scan: bool = True) -> config.Model:
    """The same function of the same parameters for any machine: XLA's attention, nothing computed twice.

    Args:
      model: configuration.
      dtype: of the computation, if another.
      scan: whether layers may be a scan; else they are written out one after the other.
    """
    unroll: dict[str, Any] = {} if scan else {"scan_unroll": 0}
    return dataclasses.replace(
        model,
        attention="xla",
        dtype=dtype or model.dtype,
        image=dataclasses.replace(model.image, remat="none", **unroll),
        pooler=dataclasses.replace(model.pooler, remat="none"),
        text=dataclasses.replace(model.text, remat="none", **unroll),
    )


def functions(weights: Weights, *, dtype: str = "", scan: bool = True) -> list[Function]:
    """The functions of what halves there are.

    Args:
      weights: the configuration counts; no parameter is read.
      dtype: of the computation and the cache; empty for model.dtype. All other outputs are float32 in any case.
      scan: as for `portable`.
    """
    c = weights.config
    model = portable(c.model, dtype, scan)
    coca, text = CoCa(model), model.text
    size, t = model.image.size, text.length

    def apply(params: FlatParameters, *arrays: Any, **options: Any) -> Any:
        return coca.apply({"params": traverse_util.unflatten_dict(params, sep="/")}, *arrays, **options)

    def encode_image(params: FlatParameters, images: jax.Array) -> tuple[jax.Array, ...]:
        output = apply(
            params,
            normalize(images, c.data.mean, c.data.std),
            contrastive=weights.has_contrastive,
            captioning=weights.has_captioning,
            method="encode_image",
        )
        # With kind=cascade and single there are tokens even where no caption needs them.
        tokens = output.image_tokens if weights.has_captioning else None
        return tuple(x.astype(jnp.float32) for x in (output.image_features, tokens) if x is not None)

    def encode_text(params: FlatParameters, tokens: jax.Array) -> tuple[jax.Array, ...]:
        return (apply(params, tokens, method="encode_text").text_features,)

    def prefill(params: FlatParameters, tokens: jax.Array, image_tokens: jax.Array) -> tuple[jax.Array, ...]:
        image_tokens = image_tokens.astype(jnp.dtype(model.dtype))
        logits, cache = apply(params, tokens, image_tokens, t, method="prefill")
        return (logits, *_growing(cache), cache.multimodal.cross_keys, cache.multimodal.cross_values)

    def decode_step(params: FlatParameters, tokens: jax.Array, *cache_and_index: jax.Array) -> tuple[jax.Array, ...]:
        *arrays, index = cache_and_index
        cache = DecoderCache(layers.Cache(*arrays[:2]), layers.Cache(*arrays[2:]), index)
        logits, cache = apply(params, tokens, cache, method="decode_step")
        return (logits, *_growing(cache))

    ids = Array("tokens", ("b", t), "int32")
    pixels = Array("images", ("b", size, size, 3), "uint8")
    names = ["image_features"] * weights.has_contrastive + ["image_tokens"] * weights.has_captioning
    found = [_described("encode_image", encode_image, weights, (pixels,), names)]
    if weights.has_contrastive:
        found.append(_described("encode_text", encode_text, weights, (ids,), ["text_features"]))
    if weights.has_captioning:
        prompt = dataclasses.replace(ids, shape=("b", "s"))
        image_tokens = next(x for x in found[0].outputs if x.name == "image_tokens")
        cache_names = [*GROWING, *FIXED]
        found.append(_described("prefill", prefill, weights, (prompt, image_tokens), ["logits", *cache_names]))
        one, cache = dataclasses.replace(ids, shape=("b", 1)), found[-1].outputs[1:]
        inputs = (one, *cache, Array("index", (), "int32"))
        names = ["logits", *(NEW + name for name in GROWING)]
        found.append(_described("decode_step", decode_step, weights, inputs, names))
    return found


def _growing(cache: DecoderCache) -> tuple[jax.Array, ...]:
    unimodal, multimodal = cache.unimodal, cache.multimodal
    assert isinstance(unimodal, layers.Cache) and isinstance(multimodal, layers.Cache)  # stacked, as they came in
    return unimodal.keys, unimodal.values, multimodal.keys, multimodal.values


def _described(
    name: str, call: Callable[..., tuple[jax.Array, ...]], weights: Weights, inputs: tuple[Array, ...], names: list[str]
) -> Function:
    """The function with the shapes of its outputs, found by tracing it."""
    shapes = jax.eval_shape(call, shapes_of_parameters(weights), *abstract(inputs, weights))
    outputs = tuple(
        Array(output, tuple(n if isinstance(n, int) else str(n) for n in x.shape), x.dtype.name)
        for output, x in zip(names, shapes, strict=True)
    )
    return Function(name, call, inputs, outputs)


def abstract(inputs: Iterable[Array], weights: Weights) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes as JAX takes them: a letter is any size; s, at most text.length."""
    inputs = list(inputs)
    letters = sorted({n for array in inputs for n in array.shape if isinstance(n, str)})
    constraints = [f"s <= {weights.config.model.text.length}"] if "s" in letters else []
    sizes = dict(zip(letters, jax.export.symbolic_shape(",".join(letters), constraints=constraints), strict=True))
    return [
        jax.ShapeDtypeStruct([sizes[n] if isinstance(n, str) else n for n in array.shape], jnp.dtype(array.dtype))
        for array in inputs
    ]


def shapes_of_parameters(weights: Weights, dtype: str = "") -> FlatParameters:
    """Shapes and dtypes by path. With a dtype, all are of it."""
    flat = traverse_util.flatten_dict(weights.params, sep="/")
    return {path: jax.ShapeDtypeStruct(np.shape(x), dtype or x.dtype) for path, x in flat.items()}


def flat_parameters(weights: Weights) -> dict[str, np.ndarray]:
    """The parameters by path, on the host.

    Raises:
      ConversionError: they are not the configuration's; every difference is listed.
    """
    flat = traverse_util.flatten_dict(weights.params, sep="/")
    abstract = traverse_util.flatten_dict(state.abstract_parameters(weights.config), sep="/")
    given, wanted = ({path: np.shape(x) for path, x in tree.items()} for tree in (flat, abstract))
    reasons = [
        f"{path}: {given.get(path, 'missing')}, wanted {wanted.get(path, 'none')}"
        for path in sorted(set(given) | set(wanted))
        if given.get(path) != wanted.get(path)
    ]
    if reasons:
        raise ConversionError("the parameters do not fit the configuration:", reasons)
    return {path: np.asarray(x) for path, x in flat.items()}


def write_manifest(
    folder: pathlib.Path,
    weights: Weights,
    kind: str,
    files: Iterable[tuple[Function, list[pathlib.Path]]],
    more: dict[str, Any],
) -> None:
    """Writes the tokenizer's file and the manifest, which names every file and says all that a user must know.

    Args:
      folder: with the functions' files in it.
      weights: that were exported.
      kind: of export, e.g. `stablehlo`.
      files: each function with its file, and one more of its constants if there is one.
      more: groups that only this kind of export has.
    """
    c, tokenizer = weights.config, weights.tokenizer
    preprocessing = Preprocessor.from_config(c.model.image.size, c.data).to_json()
    values: dict[str, Any] = {
        "format": f"coca_jax/{kind}",
        "format_version": VERSION,
        "step": weights.step,
        "functions": {
            function.name: file(paths[0])
            | {"data": [file(path) for path in paths[1:]]}
            | {key: [dataclasses.asdict(x) for x in getattr(function, key)] for key in ("inputs", "outputs")}
            for function, paths in files
        },
        "preprocessing": preprocessing | {"normalized_inside": True},
        "tokenizer": None,
        "similarity": None,
        "decoding": None,
    }
    ids: dict[str, int | None] = {"pad_id": c.model.text.pad_id, "bos_id": None, "eos_id": None}
    if tokenizer is not None:
        tokenizer.save(folder / tokenizer.file_name)
        ids |= {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        values["tokenizer"] = file(folder / tokenizer.file_name) | {"vocab_size": tokenizer.vocab_size} | ids
    if weights.has_contrastive:
        bias = weights.params.get("logit_bias")
        values["similarity"] = {
            "scale": float(np.exp(np.float32(weights.params["logit_scale"]))),
            "bias": 0.0 if bias is None else float(bias),
        }
    if weights.has_captioning:
        # What generate.greedy never chooses.
        never = None if tokenizer is None else sorted({tokenizer.pad_id, tokenizer.bos_id} - {tokenizer.eos_id})
        values["decoding"] = {"length": c.model.text.length, **ids, "never": never}
        values["decoding"]["carried"] = {NEW + name: name for name in GROWING}
    folders.write_json(folder / MANIFEST_FILE, values | more)


def kind_of(folder: epath.PathLike) -> str:
    """`stablehlo` or `onnx` of a folder that holds such functions; else nothing."""
    path = addresses.path(folder) / MANIFEST_FILE
    kind = str(folders.read_json(path).get("format")) if path.is_file() else ""
    return kind.removeprefix("coca_jax/") if kind.startswith("coca_jax/") else ""


def file(path: pathlib.Path) -> dict[str, Any]:
    """Name and sum of a file, for the manifest."""
    return {"file": path.name, "sha256": folders.sha256(path)}
