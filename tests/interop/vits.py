"""Small vision transformers by the names of timm and big_vision, and the way into our encoder."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from coca_jax import config
from coca_jax.interop import vision
from coca_jax.model.image_encoder import ImageEncoder
from tests import tiny

HERE = pathlib.Path(__file__).parent
Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

# Float32 sums in another order, over some dozen numbers at a time; the two packages' gelus differ by 1e-7.
TOLERANCE = 1e-5

MODEL = tiny.replace(tiny.MODEL, gelu="exact", image__class_token=True)  # 16 pixels, patches of 4, width 16, depth 2


@functools.cache
def encoder_shapes(model: config.Model) -> Any:
    return jax.eval_shape(ImageEncoder(model).init, jax.random.key(0), tiny.images(model, 1))["params"]


def load(path: Any, model: config.Model, data: config.Data | None = None) -> tuple[Any, vision.Report]:
    return vision.load_encoder(path, model, encoder_shapes(model), data)


def tokens(params: Any, model: config.Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEncoder(model).apply({"params": params}, images))


def difference(x: np.ndarray, reference: np.ndarray) -> float:
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def draw(shapes: Shapes, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}


def timm_tensors(
    width: int = 16, depth: int = 2, mlp: int = 32, patch: int = 4, rows: int = 17, class_token: bool = True
) -> Arrays:
    """The state_dict of timm's VisionTransformer, of which its patch embedding and its blocks are never without."""
    d = width
    shapes: Shapes = {"cls_token": (1, 1, d)} if class_token else {}
    shapes |= {
        "pos_embed": (1, rows, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
    }
    for i in range(depth):
        block: Shapes = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
        }
        block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
        block |= {"mlp.fc1.weight": (mlp, d), "mlp.fc1.bias": (mlp,), "mlp.fc2.weight": (d, mlp), "mlp.fc2.bias": (d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return draw(shapes | {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (10, d), "head.bias": (10,)})


def big_vision_tensors(width: int = 16, depth: int = 2, mlp: int = 32, patch: int = 4, rows: int = 16) -> Arrays:
    """The parameters of big_vision's vit.py, pooled by its first token: the class token has no position."""
    d, h, k = width, 2, width // 2
    shapes: Shapes = {"embedding/kernel": (patch, patch, 3, d), "embedding/bias": (d,)}
    shapes |= {"pos_embedding": (1, rows, d), "cls": (1, 1, d)}
    for i in range(depth):
        attention: Shapes = {"out/kernel": (h, k, d), "out/bias": (d,)}
        for part in ("query", "key", "value"):
            attention |= {f"{part}/kernel": (d, h, k), f"{part}/bias": (h, k)}
        block: Shapes = {f"MultiHeadDotProductAttention_0/{name}": shape for name, shape in attention.items()}
        block |= {f"LayerNorm_{n}/{name}": (d,) for n in (0, 1) for name in ("scale", "bias")}
        block |= {"MlpBlock_0/Dense_0/kernel": (d, mlp), "MlpBlock_0/Dense_0/bias": (mlp,)}
        block |= {"MlpBlock_0/Dense_1/kernel": (mlp, d), "MlpBlock_0/Dense_1/bias": (d,)}
        shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    shapes |= {"Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}
    return draw(shapes | {"head/kernel": (d, 10), "head/bias": (10,)})


def save(path: pathlib.Path, tensors: Arrays) -> pathlib.Path:
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        safetensors.numpy.save_file(tensors, path)
    return path


def as_saved_by_google_research(tensors: Arrays) -> Arrays:
    """The names of vision_transformer's and the earliest big_vision's files; the class token has a position."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        renamed[name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")] = tensor
    position = renamed.pop("pos_embedding")
    with_class = np.concatenate([np.zeros((1, 1, 16), np.float32), position], axis=1)
    return renamed | {"Transformer/posembed_input/pos_embedding": with_class}
