"""Classifiers on the model's outputs: pooled image tokens, or the last text token of the multimodal decoder.

CoCa paper, section 3.3: image and video classification with a task-specific attentional pooler over the tokens of all
frames; VQA and entailment with the multimodal decoder. Axes: b batch, n image tokens, d width, c classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model.poolers import Pooler
from coca_jax.model.text_decoder import last_token_position
from coca_jax.sharding import shard


class Classifier(nn.Module):
    """Class logits; with head.reads=pooler also the pooler that reads the image tokens."""

    model: config.Model

    def setup(self) -> None:
        c = self.model.head
        if c.reads == "pooler":
            self.pooler = Pooler(self.model, 1, self.model.image.width)
            if c.frames > 1:
                # The pooler ignores token order. Zero-initialized frame embeddings start as the paper's pooler.
                shape = (c.frames, self.model.image.width)
                self.frame_embedding = self.param(
                    "frame_embedding", nn.initializers.zeros, shape, jnp.dtype(self.model.param_dtype)
                )
        self.linear = Linear(self.model, c.classes)

    def pool(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pooled tokens of an image, or of all frames of a clip in order."""
        frames = self.model.head.frames
        if frames > 1:
            embedding = jnp.repeat(self.frame_embedding.astype(tokens.dtype), tokens.shape[1] // frames, axis=0)
            tokens = tokens + embedding[None]
        pooled: Array = self.pooler(tokens)[:, 0]
        return pooled

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        """Class logits in float32."""
        logits: Array = self.linear(x)
        return logits


class Linear(nn.Module):
    """`x @ kernel + bias` in float32; both start at zero, so that all classes are equally likely."""

    model: config.Model
    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        dtype = jnp.dtype(self.model.param_dtype)
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.classes), dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), dtype)
        logits = jnp.einsum("bd,dc->bc", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return shard(logits + bias.astype(jnp.float32)[None], "batch", None)


def last_text_token(hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"], pad_id: int) -> Float[Array, "b d"]:
    """Hidden state of the last token before padding, which has attended to the whole text and the image."""
    return jnp.take_along_axis(hidden, last_token_position(tokens, pad_id)[:, None, None], axis=1)[:, 0]
