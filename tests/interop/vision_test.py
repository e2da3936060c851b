"""Vision transformers from elsewhere as the image encoder: the same numbers, from names as they are in the wild.

`timm_vit.safetensors` is a small VisionTransformer of timm 1.0.31 with layer scale, its input and its tokens before the
final norm (tests/peers/timm_test.py says how it was made). big_vision's layout is held against a forward pass in NumPy
that is written here from its names, open_clip's against the importer of whole models.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import traverse_util

from coca_jax import config
from coca_jax.interop import exported, open_clip
from coca_jax.interop.weights import ConversionError, Weights
from tests import tiny
from tests.interop.vits import (
    HERE,
    MODEL,
    TOLERANCE,
    Arrays,
    as_saved_by_google_research,
    big_vision_tensors,
    difference,
    load,
    save,
    tokens,
)


def test_timms_tokens() -> None:
    with safetensors.safe_open(HERE / "timm_vit.safetensors", "numpy") as file:
        images, wanted = file.get_tensor("in.images"), file.get_tensor("out.tokens")
        sizes = json.loads(file.metadata()["config"])
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118  (not a mapping)
    image = config.ImageEncoder(
        size=sizes["img_size"],
        patch=sizes["patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_dim=4 * sizes["embed_dim"],
        class_token=True,
    )
    model = tiny.replace(MODEL, image=image)
    params, report = load(HERE / "timm_vit.safetensors", model)
    assert difference(tokens(params, model, images.transpose(0, 2, 3, 1)), wanted) < TOLERANCE
    assert not report.of("initialised") and {line.name for line in report.of("skipped")} == {
        *("in.images", "out.tokens"),
        *(f"model.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")),
    }
    assert len({name for line in report.of("loaded") for name in line.tensors}) == len(names) - 4


def reference(tensors: Arrays, images: np.ndarray, *, heads: int = 2, depth: int = 2) -> np.ndarray:
    """big_vision's ViT in NumPy, float64, from its parameters by their names."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}/scale"] + t[f"{name}/bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    b, p = len(images), t["embedding/kernel"].shape[0]
    rows = []
    for row, column in itertools.product(range(images.shape[1] // p), range(images.shape[2] // p)):
        patch = images[:, row * p : (row + 1) * p, column * p : (column + 1) * p].reshape(b, -1)
        rows.append(patch @ t["embedding/kernel"].reshape(p * p * 3, -1) + t["embedding/bias"])
    s: np.ndarray = np.stack(rows, axis=1) + t["pos_embedding"]
    s = np.concatenate([np.broadcast_to(t["cls"], (b, 1, s.shape[-1])), s], axis=1)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention, y = f"{block}/MultiHeadDotProductAttention_0", norm(s, f"{block}/LayerNorm_0")
        mixed = np.zeros_like(s)
        for h in range(heads):
            q, k, v = (
                y @ t[f"{attention}/{part}/kernel"][:, h] + t[f"{attention}/{part}/bias"][h]
                for part in ("query", "key", "value")
            )
            weights = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
            mixed = mixed + (weights / weights.sum(-1, keepdims=True)) @ v @ t[f"{attention}/out/kernel"][h]
        s = s + mixed + t[f"{attention}/out/bias"]
        mlp, y = f"{block}/MlpBlock_0", norm(s, f"{block}/LayerNorm_1")
        y = gelu(y @ t[f"{mlp}/Dense_0/kernel"] + t[f"{mlp}/Dense_0/bias"])
        s = s + y @ t[f"{mlp}/Dense_1/kernel"] + t[f"{mlp}/Dense_1/bias"]
    return s


def as_scanned(tensors: Arrays) -> Arrays:
    """The blocks as one scanned module: a leading axis of layers."""
    block = "Transformer/encoderblock"
    stacked = {
        name.replace(f"{block}_0", block): np.stack([tensor, tensors[name.replace(f"{block}_0", f"{block}_1")]])
        for name, tensor in tensors.items()
        if name.startswith(f"{block}_0/")
    }
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{block}_")} | stacked


def as_a_training_state(tensors: Arrays) -> Arrays:
    """With the optimiser's moments beside it."""
    moments = {f"opt/0/mu/{name}": np.ones_like(tensor) for name, tensor in tensors.items()}
    return moments | {f"params/{name}": tensor for name, tensor in tensors.items()}


def as_one_of_two_towers(tensors: Arrays) -> Arrays:
    text = {"params/txt/Embed_0/embedding": np.ones((9, 16), np.float32), "params/t": np.ones(1, np.float32)}
    return text | {f"params/img/{name}": tensor for name, tensor in tensors.items()}


def with_two_digits(tensors: Arrays) -> Arrays:
    return {name.replace("encoderblock_", "encoderblock_0"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "saved",
    [
        dict,
        as_saved_by_google_research,
        as_scanned,
        as_a_training_state,
        as_one_of_two_towers,
        with_two_digits,
        lambda tensors: as_a_training_state(as_scanned(tensors)),
    ],
    ids=["big_vision", "google_research", "scanned", "training state", "two towers", "two digits", "scanned state"],
)
def test_big_visions_tokens(tmp_path: pathlib.Path, saved: Callable[[Arrays], Arrays]) -> None:
    tensors, model = big_vision_tensors(), tiny.replace(MODEL, gelu="tanh")
    params, report = load(save(tmp_path / "vit.npz", saved(tensors)), model)
    images = tiny.images(model, 2)
    assert difference(tokens(params, model, images), reference(tensors, images)) < TOLERANCE
    # Nothing differs but what no file of this kind says.
    assert report.layout == "big_vision" and report.notes == () and not report.of("initialised")


@pytest.mark.parametrize("name", ["a", "b"])
def test_open_clips_tower_is_that_of_the_whole_model(tmp_path: pathlib.Path, name: str) -> None:
    with safetensors.safe_open(HERE / f"open_clip_coca_{name}.safetensors", "numpy") as file:
        values = json.loads(file.metadata()["config"])
        whole = {
            key.removeprefix("param."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118  (not a mapping)
            if key.startswith("param.")
        }
    model = open_clip.model_config(values)
    wanted = traverse_util.flatten_dict(open_clip.import_parameters(whole, model)["image_encoder"], sep="/")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    described = {"model_cfg": values, "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    save(tmp_path / "open_clip_model.safetensors", whole)
    params, report = load(tmp_path, model, config.Data(mean=mean, std=std))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert flat.keys() == wanted.keys() and all(np.array_equal(flat[path], wanted[path]) for path in wanted)
    assert report.layout == "open_clip" and report.notes == ()
    skipped = {line.name: line.detail for line in report.of("skipped")}
    assert skipped["text.token_embedding.weight"] == "not of the image encoder"
    assert "final norm" in skipped["visual.ln_post.weight"] and "pooling" in skipped["visual.attn_pool.query"]


def test_our_own_directory_gives_back_the_encoder(tmp_path: pathlib.Path) -> None:
    params = tiny.parameters(MODEL)
    weights = Weights(tiny.replace(tiny.CONFIG, model=MODEL, data__mean=(0.1, 0.2, 0.3)), params, None)
    exported.write(weights, tmp_path / "ours")
    loaded, report = load(tmp_path / "ours", MODEL, weights.config.data)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params["image_encoder"]))
    assert report.layout == "coca_jax" and report.notes == ()
    other = tiny.replace(MODEL, norm_eps=1e-5)
    with pytest.raises(ConversionError, match=r"config\.data\.mean=\(0\.5, 0\.5, 0\.5\): coca_jax\.json says"):
        load(tmp_path / "ours", other, config.Data())
    assert [note for note in load(tmp_path / "ours", other)[1].notes if "config.model.norm_eps=1e-05" in note]
