"""Small models and batches for tests: every part is there, nothing takes long."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from coca_jax import config
from coca_jax.model.coca import CoCa

IMAGE = config.ImageEncoder(size=16, patch=4, width=16, depth=2, heads=2, mlp_dim=32)
TEXT = config.TextDecoder(vocab_size=40, length=9, width=16, heads=2, mlp_dim=32, n_uni=2, n_multi=2)
MODEL = config.Model(embed_dim=8, image=IMAGE, pooler=config.Pooler(queries=4, heads=2), text=TEXT, dtype="float32")
CONFIG = config.Config(
    seed=1,
    steps=20,
    batch_size=8,
    model=MODEL,
    loss=config.Loss(caption_chunk=4),
    optimizer=config.Optimizer(name="adamw", peak_lr=1e-2, warmup=0.1),
)


def replace(tree: Any, **changes: Any) -> Any:
    """A configuration with other values: `replace(MODEL, text__n_multi=0)`; `__` goes one level down."""
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        tree = dataclasses.replace(tree, **{head: replace(getattr(tree, head), **{rest: value}) if rest else value})
    return tree


def images(model: config.Model, batch: int, seed: int = 0) -> np.ndarray:
    """Normalised images `[b, size, size, 3]`."""
    size = model.image.size
    return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def tokens(model: config.Model, lengths: list[int], seed: int = 0) -> np.ndarray:
    """Ids `[b, t]` with that many real tokens in each row, the rest padding."""
    text = model.text
    ids = np.random.default_rng(seed).integers(3, text.vocab_size, (len(lengths), text.length))
    real = np.arange(text.length)[None, :] < np.array(lengths)[:, None]
    return np.where(real, ids, text.pad_id).astype(np.int32)


def batch(model: config.Model, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """A training batch: uint8 pictures, ids with padding as skewed as `lengths`."""
    size = model.image.size
    pixels = np.random.default_rng(seed).integers(0, 256, (len(lengths), size, size, 3), np.uint8)
    return {"images": pixels, "tokens": tokens(model, lengths, seed)}


def parameters(model: config.Model, seed: int = 0) -> Any:
    """Random parameters; biases and norms too, so that a missing one shows."""
    shapes = jax.eval_shape(
        lambda: CoCa(model).init(jax.random.key(0), images(model, 1), tokens(model, [model.text.length]))
    )["params"]
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(shapes)
    scale = 0.2
    drawn = [np.asarray(rng.normal(size=leaf.shape) * scale, np.float32) for leaf in leaves]
    params = jax.tree.unflatten(tree, drawn)
    params["logit_scale"] = np.float32(np.log(10.0))
    return params
