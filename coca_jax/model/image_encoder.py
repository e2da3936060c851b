"""The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): image -> patch tokens.

Axes: b batch, n image tokens, d width. There is no final norm, because the pooler normalizes its input.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coca_jax import config
from coca_jax.model import layers
from coca_jax.sharding import shard


class ImageEncoder(nn.Module):
    """Encodes normalized images `[b, size, size, 3]` as tokens `[b, n, width]`, with the class token, if any, first."""

    model: config.Model

    @nn.compact
    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b n d"]:
        """Encode images. Raises ValueError if they do not have the configured size."""
        c, dtype = self.model.image, jnp.dtype(self.model.dtype)
        if images.ndim != 4 or images.shape[1:] != (c.size, c.size, 3):
            raise ValueError(
                f"images of shape {images.shape} given to an encoder for [b, {c.size}, {c.size}, 3]: resize them, or "
                "load the model with that image_size"
            )
        side, p = c.size // c.patch, c.patch
        param_dtype = jnp.dtype(self.model.param_dtype)
        # A convolution with stride = kernel is one matrix product over flattened patches, which compiles better.
        patches = images.astype(dtype).reshape(images.shape[0], side, p, side, p, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape[0], side * side, p, p, 3)
        embedding = layers.dense(self.model, (c.width,), inputs=3, use_bias=c.patch_bias, name="patch_embedding")
        x = embedding(patches)  # bnyxc,yxcd->bnd
        if c.class_token:
            token = self.param("class_token", nn.initializers.normal(c.width**-0.5), (c.width,), param_dtype)
            token = jnp.broadcast_to(token.astype(dtype), (x.shape[0], 1, c.width))
            x = jnp.concatenate([token, x], axis=1)
        n = side * side + c.class_token
        if c.position == "learned":
            position = self.param("position_embedding", nn.initializers.normal(0.02), (n, c.width), param_dtype)
        else:
            position = sincos_grid(side, c.width, c.class_token)
        x = shard(x + position.astype(dtype)[None], "batch", None, "width")
        if c.pre_norm:
            x = layers.layer_norm(self.model, "pre_norm")(x)
        blocks = layers.stack(
            self.model,
            depth=c.depth,
            remat=c.remat,
            scan_unroll=c.scan_unroll,
            width=c.width,
            heads=c.heads,
            mlp_dim=c.mlp_dim,
            name="blocks",
        )
        return blocks(x, None, None, None, None)[0]


def sincos_grid(side: int, width: int, class_token: bool) -> Float[Array, "n d"]:
    """Fixed 2D sine-cosine position embedding (Chen et al. 2021, arXiv 2104.02057).

    Half of the width encodes the row, half the column; a class token gets zeros.
    """
    axis = layers.sincos(jnp.arange(side, dtype=jnp.float32), width // 2)
    rows = jnp.repeat(axis, side, axis=0)
    columns = jnp.tile(axis, (side, 1))
    grid = jnp.concatenate([rows, columns], axis=1)
    return jnp.concatenate([jnp.zeros((1, width)), grid]) if class_token else grid


def resize_positions(embedding: Float[Array, "n d"], side: int, *, class_token: bool) -> Float[Array, "n2 d"]:
    """Interpolate learned positions to another grid: bicubic, class token unchanged (arXiv 2010.11929, section 3.2).

    Args:
      embedding: `[old_side^2 (+1), d]`.
      side: Patches along one side of the new grid.
      class_token: Whether the first row belongs to a class token.

    Returns:
      `[side^2 (+1), d]` of the same dtype; the same array object if the grid does not change.

    Raises:
      ValueError: The old embedding is not a square grid.
    """
    extra, grid = embedding[: int(class_token)], embedding[int(class_token) :]
    old = math.isqrt(grid.shape[0])
    if old * old != grid.shape[0]:
        raise ValueError(
            f"position_embedding of shape {tuple(embedding.shape)} is not a square grid"
            f"{' and a class token' if class_token else ''}"
        )
    if old == side:
        return embedding
    plane = jnp.asarray(grid, jnp.float32).reshape(old, old, -1)
    plane = jax.image.resize(plane, (side, side, plane.shape[-1]), "bicubic", antialias=True)
    return jnp.concatenate([extra, plane.reshape(side * side, -1).astype(embedding.dtype)])


def resize_parameters(params: dict[str, Any], model: config.Model) -> dict[str, Any]:
    """Parameters of a model trained at another resolution, resized for `model.image.size` and `model.image.patch`."""
    encoder = params.get("image_encoder", {})
    if "position_embedding" not in encoder:
        return params
    side = model.image.size // model.image.patch
    resized = resize_positions(encoder["position_embedding"], side, class_token=model.image.class_token)
    return {**params, "image_encoder": {**encoder, "position_embedding": resized}}
