"""Reads what open_clip keeps a CoCa in: a directory in the Hugging Face layout, or a file of weights alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from coca_jax import config
from coca_jax.data import addresses
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import folders, tokenizer_json, torch_files
from coca_jax.interop.open_clip import extras
from coca_jax.interop.open_clip.configuration import CONFIGS, inferred_config, model_config
from coca_jax.interop.open_clip.table import import_parameters
from coca_jax.interop.weights import ConversionError, Weights

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# As open_clip prefers them (factory.py, _find_checkpoint_in_dir).
_WEIGHTS = (
    *(WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "bpe_simple_vocab_16e6.txt.gz")
_PADDED_TO = 1024  # embeddings may have more rows than there are pieces, up to a multiple of this at most
_CLIP_SIZE = 49408  # of the vocabulary that open_clip takes where no other is named

# open_clip/constants.py and transform.py: what it takes where preprocess_cfg says nothing.
_PREPROCESS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mode": "RGB",
    "fill_color": 0,
}


def read(path: epath.PathLike, *, tokenizer: epath.PathLike | None = None, name: str = "") -> Weights:
    """A CoCa of open_clip's, with its preprocessing and tokenizer.

    Args:
      path: a directory with weights and, mostly, open_clip_config.json; or a file of weights: `.safetensors`, or `.pt`,
        `.pth`, `.bin` where PyTorch is installed. A configuration beside the file is its own.
      tokenizer: file of the vocabulary, where it is not beside the weights and is not CLIP's; `none`: go without.
      name: of open_clip's model, e.g. coca_ViT-L-14, where there is no configuration. Without it, it is inferred from
        the shapes, which tell all but the heads; a warning says so where they are those of no published model.

    Returns:
      float32 parameters of open_clip's architecture; or, of a directory that `write` made and nobody trained on, what
      was written, to the last bit.

    Raises:
      ConversionError: the path holds no such model, a part is missing or damaged, asks for what is not here, or does
        not fit the others; every reason is listed.
      DataError: the tokenizer cannot be read.
    """
    path = addresses.path(path)
    file = _weights_file(path) if path.is_dir() else path
    folder: epath.Path | None = path if path.is_dir() else path.parent
    described: dict[str, Any] = {}
    if folder is not None and (folder / CONFIG_FILE).is_file():
        if name:
            raise ConversionError(f"name={name!r}: {folder / CONFIG_FILE} says what the model is: leave it out")
        described = folders.read_json(folder / CONFIG_FILE)
        if not isinstance(described.get("model_cfg"), dict):
            raise ConversionError(f"{folder / CONFIG_FILE} has no model_cfg")
    elif not path.is_dir():
        folder = None
    tensors = _tensors(file)
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    try:
        open_clips = described.get("model_cfg") or name or inferred_config(shapes)
        model = model_config(open_clips, shapes)
        params = import_parameters(tensors, model)
    except (ConversionError, config.ConfigError) as error:
        raise ConversionError(f"{file}: {error}") from error
    if not described and not name:
        _tell_inferred(file, model)
    data = _preprocessing(described.get("preprocess_cfg"), model.image.size, f"{folder}/{CONFIG_FILE}")
    loss = config.Loss(lambda_con=1.0, lambda_cap=2.0, contrastive="sigmoid" if model.logit_bias else "softmax")
    weights = Weights(config.Config(model=model, data=data, loss=loss), params, None)
    if folder is not None and (section := described.get(extras.SECTION)) is not None:
        weights = extras.restore(folder, section, tensors, weights)
    found = _tokenizer(folder, open_clips, tokenizer, weights.config.model, described.get(extras.SECTION))
    if found is not None:
        try:
            found.check(weights.config.model.text)
        except config.ConfigError as error:
            raise ConversionError(f"{path}: its tokenizer does not fit the model: {error}") from error
        pieces, rows = found.vocab_size, weights.config.model.text.vocab_size
        own = described.get(extras.SECTION) is not None and not tokenizer  # that it was exported with, whatever it is
        if not own and rows > -(-pieces // _PADDED_TO) * _PADDED_TO:
            raise ConversionError(f"{path}: the model has {rows} pieces, the tokenizer {pieces}: it is another model's")
    return Weights(weights.config, weights.params, found, weights.step)


def _tell_inferred(file: epath.Path, model: config.Model) -> None:
    """Says what the model was taken for; warns where that was not known from the shapes alone."""
    for name in CONFIGS:
        if model_config(name) == model:
            logging.info("%s: no %s beside it; its shapes are those of %s", file, CONFIG_FILE, name)
            return
    logging.warning(
        "%s: no %s beside it, and shapes do not tell heads: config.model.image.heads=%d, pooler.heads=%d and "
        "text.heads=%d are taken, 64 wide in the towers as everywhere in open_clip; others would be another function",
        *(file, CONFIG_FILE, model.image.heads, model.pooler.heads, model.text.heads),
    )


def _weights_file(folder: epath.Path) -> epath.Path:
    there = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if there:
        return there[0]
    names = sorted(file.name for file in folder.iterdir())
    if parts := [name for name in names if name.endswith(".index.json")]:
        raise ConversionError(
            f"{folder} holds weights in several files ({parts[0]}), which open_clip does not read either: save them as "
            f"one {WEIGHTS_FILE}"
        )
    others = [name for name in names if name.endswith((".safetensors", *torch_files.SUFFIXES))]
    others = [name for name in others if name != extras.REPLACED_FILE]
    if len(others) != 1:
        there = others or names
        seen = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
        raise ConversionError(
            f"{folder} holds no weights that are known (there are: {seen or 'no files'}): it is "
            "neither a workdir (config.json, checkpoints/), nor of coca_jax.convert (coca_jax.json), nor open_clip's "
            f"(open_clip_config.json, {WEIGHTS_FILE}); name the file of the weights itself if it is another"
        )
    return folder / others[0]


def _tensors(file: epath.Path) -> dict[str, np.ndarray]:
    folders.check_file(file)
    if file.suffix == ".safetensors":
        tensors = folders.read_tensors(file)
    elif file.suffix in torch_files.SUFFIXES:
        tensors = torch_files.read(file)
    else:
        raise ConversionError(f"{file}: weights are read from .safetensors, {', '.join(torch_files.SUFFIXES)}")
    prefix = "module."  # of training on several GPUs
    if tensors and all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): x for key, x in tensors.items()}
    return tensors


def _preprocessing(given: Any, size: int, where: str) -> config.Data:
    """What the model wants of pictures, as config.Data. Raises ConversionError for what is not here."""
    if not isinstance(given or {}, Mapping):
        raise ConversionError(f"{where}: preprocess_cfg={given!r} is no group of keys")
    values = _PREPROCESS | {"size": size} | {k: v for k, v in (given or {}).items() if v is not None}
    reasons = []
    wanted = values["size"] if isinstance(values["size"], list) else [values["size"]] * 2
    if wanted not in ([size, size], [3, size, size]):
        reasons.append(f"size={values['size']!r}: the model is for {size}")
    colors: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = values[key] if isinstance(values[key], list | tuple) else [values[key]] * 3
        if len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            reasons.append(f"{key}={values[key]!r}: must be three numbers")
        else:
            colors[key] = tuple(map(float, value))
    for key, choices in (
        ("interpolation", ("bicubic", "bilinear")),
        ("resize_mode", ("shortest",)),
        ("mode", ("RGB",)),
    ):
        if values[key] not in choices:
            reasons.append(f"{key}={values[key]!r}: there is {' and '.join(choices)} here")
    reasons += [f"{key}={values[key]!r}: is not known" for key in values if key not in (*_PREPROCESS, "size")]
    if reasons:
        raise ConversionError(f"{where}: preprocess_cfg asks for what is not here:", reasons)
    return config.Data(**colors, interpolation=f"pillow-{values['interpolation']}", eval_crop=1.0)


def _tokenizer(
    folder: epath.Path | None,
    open_clips: Mapping[str, Any] | str,
    given: epath.PathLike | None,
    model: config.Model,
    section: Mapping[str, Any] | None,
) -> Tokenizer | None:
    if given:
        return None if str(given) == "none" else Tokenizer(given)
    if section is not None and folder is not None and "tokenizer" in section:
        return extras.tokenizer(folder, section)
    text = {} if isinstance(open_clips, str) else open_clips.get("text_cfg", {})
    if asked := {key: text[key] for key in ("tokenizer_mode", "tokenizer_kwargs") if text.get(key)}:
        raise ConversionError(
            f"{folder}: text_cfg asks for texts to be treated in a way that is not here, {asked}: pass tokenizer=PATH, "
            "or tokenizer=none, where that does not matter"
        )
    hugging_face = text.get("hf_tokenizer_name")
    # Where no other is named, open_clip takes CLIP's, whatever lies beside the weights.
    if not hugging_face and model.text.vocab_size == _CLIP_SIZE:
        return Tokenizer.clip()
    there = [folder / name for name in _TOKENIZERS if (folder / name).is_file()] if folder is not None else []
    if hugging_face and (not there or there[0].name != _TOKENIZERS[0]):
        raise ConversionError(
            f"{folder}: the tokenizer is {hugging_face!r} of Hugging Face, and there is no {_TOKENIZERS[0]}: copy that "
            "repository's there, or pass tokenizer=PATH, or tokenizer=none"
        )
    if not there:
        raise ConversionError(
            f"the model has {model.text.vocab_size} pieces, which is not CLIP's vocabulary, and no tokenizer came with "
            f"it: put a {' or '.join(_TOKENIZERS)} beside the weights, or pass tokenizer=PATH, or tokenizer=none"
        )
    found = Tokenizer(there[0])
    if there[0].name == _TOKENIZERS[0]:
        tokenizer_json.framed(found.to_bytes(), found, str(there[0]))
    return found
