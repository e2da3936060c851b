"""The model's functions compiled over a mesh: arrays in, host arrays out, any number of rows.

Evaluation during training and a loaded checkpoint call the same ones. Axes: b rows, d the contrastive space, t tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from coca_jax import config, generate, losses
from coca_jax.data.images import normalize
from coca_jax.model.coca import CoCa
from coca_jax.sharding import batch_sharding, replicated

Parameters = Any


class Apply:
    """Functions of (params, arrays). Pictures are uint8 `[b, size, size, 3]`; they are normalised on the device.

    An array is either on the mesh already (of `pipeline.place`: each process has read its rows of it), or a host array,
    the same on every process. Every process gets all rows of the result.
    """

    def __init__(self, c: config.Config, mesh: Mesh, *, bos_id: int, eos_id: int) -> None:
        """
        Args:
          c: model, data.mean and data.std, and the loss weights, which tell which halves there are.
          mesh: of sharding.MESH_AXES.
          bos_id, eos_id: of the tokenizer, for captions.
        """
        self.mesh = mesh
        self.has_contrastive, self.has_captioning = c.loss.lambda_con > 0, c.loss.lambda_cap > 0
        self._shards = mesh.shape["replica"] * mesh.shape["fsdp"]
        model, pad = CoCa(c.model), c.model.text.pad_id

        def apply(params: Parameters, *args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, **kwargs)

        def pixels(images: jax.Array) -> jax.Array:
            return normalize(images, c.data.mean, c.data.std)

        def encode_image(params: Parameters, images: jax.Array) -> jax.Array:
            return apply(params, pixels(images), captioning=False, method="encode_image").image_features

        def encode_text(params: Parameters, tokens: jax.Array) -> jax.Array:
            return apply(params, tokens, method="encode_text").text_features

        def caption_loss(params: Parameters, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = apply(params, pixels(images), tokens, contrastive=False, method="forward").hidden
            labels, weights = losses.targets(tokens, pad)
            chunk = c.loss.caption_chunk
            nll = losses.token_losses(hidden, apply(params, method="head"), labels, chunk) * weights
            return nll.sum(axis=1), weights.sum(axis=1)

        def caption(params: Parameters, images: jax.Array) -> jax.Array:
            tokens = apply(params, pixels(images), contrastive=False, method="encode_image").image_tokens
            return generate.greedy(c.model, params, tokens, bos_id=bos_id, eos_id=eos_id)

        self.encode_image = self._compile(encode_image)
        self.encode_text = self._compile(encode_text)
        self.caption_loss = self._compile(caption_loss)
        self.caption = self._compile(caption)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, out_shardings=replicated(self.mesh))

        @functools.wraps(function)
        def call(params: Parameters, *arrays: np.ndarray | jax.Array) -> Any:
            rows = len(arrays[0])
            placed = (a if isinstance(a, jax.Array) else self._place(np.asarray(a)) for a in arrays)
            with jax.set_mesh(self.mesh):
                result = compiled(params, *placed)
            return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[:rows], result)

        return call

    def _place(self, x: np.ndarray) -> jax.Array:
        """A host array on the mesh, filled up with copies of its last row to a multiple of the shards."""
        short = -len(x) % self._shards
        x = np.concatenate([x, np.repeat(x[-1:], short, axis=0)]) if short else x
        return jax.make_array_from_callback(x.shape, batch_sharding(self.mesh), lambda index: x[index])
