"""Writes a directory that open_clip opens by itself, as `local-dir:DIR`."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
from typing import Any

from etils import epath

from coca_jax import config
from coca_jax.data import addresses
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.data.vocabulary import ClipMerges
from coca_jax.interop import folders, tokenizer_json
from coca_jax.interop.open_clip import extras, reading
from coca_jax.interop.open_clip.configuration import open_clip_config
from coca_jax.interop.open_clip.rewriting import refused, rewrite
from coca_jax.interop.open_clip.table import check_parameters, export_parameters, import_parameters
from coca_jax.interop.weights import ConversionError, Weights

_INTERPOLATIONS = {"bicubic": "bicubic", "pillow-bicubic": "bicubic", "pillow-bilinear": "bilinear"}


def write(weights: Weights, folder: epath.PathLike, *, overwrite: bool = False) -> None:
    """Writes `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer's files.

        model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
        tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")

    have the same features and logits, ids and pixels. A model that is not of open_clip's architecture is rewritten as
    one that is (see `explain`), and `read` gives it back as it was.

    Args:
      weights: of any source.
      folder: local, or a bucket's. It appears whole or not at all.
      overwrite: whether a folder that is there may be replaced.

    Raises:
      ConversionError: open_clip cannot have this model, its preprocessing or its tokenizer, with every reason; the
        parameters do not fit the configuration; there is something at folder, or it cannot be written.
    """
    weights.only_coca("open_clip's CoCa")
    c = weights.config
    reasons = [
        f"config.loss.{key}=0.0: the model has no {half} half, and open_clip's CoCa has both"
        for key, half, there in (
            ("lambda_con", "contrastive", weights.has_contrastive),
            ("lambda_cap", "captioning", weights.has_captioning),
        )
        if not there
    ]
    if c.data.eval_crop != 1:
        reasons.append(f"config.data.eval_crop={c.data.eval_crop}: open_clip's preprocessing keeps the whole square")
    if reasons:
        raise ConversionError("open_clip cannot have this model:", reasons + refused(c.model))
    check_parameters(weights.params, c.model)
    model, params = rewrite(c.model, weights.params)
    tensors = export_parameters(params, model)
    values: dict[str, Any] = {"model_cfg": open_clip_config(model), "preprocess_cfg": _preprocessing(c)}
    with folders.new_folder(folder, overwrite=overwrite) as new:
        described = _write_tokenizer(weights.tokenizer, new)
        if "tokenizer.json" in {file.name for file in new.iterdir()}:
            # Any name makes open_clip open the directory's own.
            values["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = addresses.path(folder).name or "tokenizer"
        folders.write_tensors(new / reading.WEIGHTS_FILE, tensors, {"format": "pt"})
        section = extras.section(new, weights, import_parameters(tensors, model), tensors)
        folders.write_json(new / reading.CONFIG_FILE, values | {extras.SECTION: section | described})


def _preprocessing(c: config.Config) -> dict[str, Any]:
    return {
        "size": c.model.image.size,
        "mode": "RGB",
        "mean": list(c.data.mean),
        "std": list(c.data.std),
        "interpolation": _INTERPOLATIONS[c.data.interpolation],
        "resize_mode": "shortest",
        "fill_color": 0,
    }


def _write_tokenizer(tokenizer: Tokenizer | None, folder: pathlib.Path) -> dict[str, Any]:
    """The tokenizer's files, and what the section says of them."""
    if tokenizer is None:
        return {"tokenizer": None}
    if tokenizer.file_name == ClipMerges.file_name:
        if gzip.decompress(tokenizer.to_bytes()) != gzip.decompress(Tokenizer.clip().to_bytes()):
            raise ConversionError("these merges are not those that open_clip has, and it reads no others")
        return {"tokenizer": "clip"}
    for name, content in tokenizer_json.convert(tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    name = tokenizer.file_name
    if name == "tokenizer.json":  # as it came, with its own frame
        if tokenizer.to_bytes() != (folder / name).read_bytes():
            name = "coca_jax_tokenizer.json"
            tokenizer.save(folder / name)
    else:
        tokenizer.save(folder / name)
    return {"tokenizer": name, "tokenizer_sha256": hashlib.sha256(tokenizer.to_bytes()).hexdigest()}
