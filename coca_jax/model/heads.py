"""Classifiers on what the model computes already: pooled image tokens, or the multimodal half's last text token.

CoCa paper, section 3.3: image and video classification by an attentional pooler of the task's own over the tokens of
all frames; VQA and entailment by the multimodal decoder. Axes: b batch, n image tokens, d width, c classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model.poolers import Pooler
from coca_jax.model.text_decoder import last_place
from coca_jax.sharding import shard


class Classifier(nn.Module):
    """Logits of classes; with head.reads=pooler also the pooler that reads the image tokens for them."""

    model: config.Model

    def setup(self) -> None:
        c = self.model.head
        if c.reads == "pooler":
            self.pooler = Pooler(self.model, 1, self.model.image.width)
            if c.frames > 1:
                # The pooler is blind to order; beginning at zero, the frames' places begin as the paper has it.
                shape = (c.frames, self.model.image.width)
                self.frame_embedding = self.param(
                    "frame_embedding", nn.initializers.zeros, shape, jnp.dtype(self.model.param_dtype)
                )
        self.linear = Linear(self.model, c.classes)

    def pool(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """What the pooler reads of the tokens of a picture, or of all frames of a clip, one frame after another."""
        frames = self.model.head.frames
        if frames > 1:
            places = jnp.repeat(self.frame_embedding.astype(tokens.dtype), tokens.shape[1] // frames, axis=0)
            tokens = tokens + places[None]
        pooled: Array = self.pooler(tokens)[:, 0]
        return pooled

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        """float32 logits."""
        logits: Array = self.linear(x)
        return logits


class Linear(nn.Module):
    """`x @ kernel + bias` in float32, both zero at first: every class begins as likely."""

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
    """The hidden state at the last token that is not padding, which has seen the whole text and the image."""
    return jnp.take_along_axis(hidden, last_place(tokens, pad_id)[:, None, None], axis=1)[:, 0]
