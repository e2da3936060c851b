"""The decoupled text decoder (CoCa paper, section 3.2).

The unimodal half has only causal self-attention; a learned [CLS] token is appended, whose output is the text embedding.
The multimodal half reads the unimodal tokens and cross-attends to the image. Axes: b batch, t text tokens, d width, v
vocabulary, q image tokens.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model import layers
from coca_jax.model.attention import Mask
from coca_jax.model.products import dot
from coca_jax.sharding import shard


@flax.struct.dataclass
class DecoderCache:
    """Decoding state: the caches of both halves and the next position.

    Attributes:
      unimodal, multimodal: Stacked caches, or a tuple with one cache per layer.
      index: Position of the next token.
    """

    unimodal: layers.Cache | tuple[layers.Cache, ...]
    multimodal: layers.Cache | tuple[layers.Cache, ...] | None
    index: Int[Array, ""]

    @property
    def length(self) -> int:
        """Capacity in tokens."""
        first = self.unimodal[0] if isinstance(self.unimodal, tuple) else self.unimodal
        return first.keys.shape[-2]


class TextDecoder(nn.Module):
    """Both halves, with token embedding and output head."""

    model: config.Model

    def setup(self) -> None:
        c, param_dtype = self.model.text, jnp.dtype(self.model.param_dtype)
        self.token_embedding = nn.Embed(
            c.vocab_size,
            c.width,
            dtype=jnp.dtype(self.model.dtype),
            param_dtype=param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        small = nn.initializers.normal(0.02)
        self.cls_embedding = self.param("cls_embedding", small, (c.width,), param_dtype)
        if c.position == "learned":
            self.position_embedding = self.param("position_embedding", small, (c.length + 1, c.width), param_dtype)
        else:
            self.position_embedding = layers.sincos(jnp.arange(c.length + 1, dtype=jnp.float32), c.width)
        self.unimodal = Half(self.model, depth=c.n_uni, cross=False)
        self.cls_norm = layers.layer_norm(self.model)
        if c.n_multi:
            self.multimodal = Half(self.model, depth=c.n_multi, cross=True)
            self.final_norm = layers.layer_norm(self.model)
            if not c.tie_embeddings:
                self.lm_head = LanguageModelHead(self.model)

    def embed(self, tokens: Int[Array, "b t"], index: Int[Array, ""] | int = 0) -> Float[Array, "b t d"]:
        x = embed_tokens(self.token_embedding, tokens)
        position = jax.lax.dynamic_slice_in_dim(self.position_embedding, index, tokens.shape[1])
        return shard(x + position.astype(x.dtype)[None], "batch", None, "width")

    def encode(
        self, tokens: Int[Array, "b t"], *, cls: bool = True
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"] | None]:
        """Run the unimodal half.

        Args:
          tokens: Token ids, padded at the end with `pad_id`. t may be any length up to the configured one; additional
            padding does not change the result.
          cls: Append [CLS]; without it the half processes one token less.

        Returns:
          Hidden states of the tokens before any final norm, for the multimodal half, and the normalized output of
          [CLS].

        Raises:
          ValueError: The text is longer than the model's positions.
        """
        c, dtype = self.model.text, jnp.dtype(self.model.dtype)
        t = tokens.shape[1]
        if t > c.length:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than the {c.length} positions of the model")
        x = self.embed(tokens)
        mask = None
        if cls:
            # [CLS] always has the last position, so that the amount of padding does not change its embedding.
            last = self.cls_embedding + self.position_embedding[c.length]
            x = jnp.concatenate([x, jnp.broadcast_to(last.astype(dtype), (x.shape[0], 1, c.width))], axis=1)
            mask = cls_mask(tokens, c.pad_id, c.cls_mask)
        x = self.unimodal(x, mask=mask)
        return (x[:, :t], self.cls_norm(x[:, t])) if cls else (x, None)

    def decode(self, text_hidden: Float[Array, "b t d"], image_tokens: Float[Array, "b q d"]) -> Float[Array, "b t d"]:
        """Run the multimodal half; the product of its hidden states with the output head is the logits."""
        return self.final_norm(self.multimodal(text_hidden, image_tokens=image_tokens))

    def head(self) -> Float[Array, "d v"]:
        """Kernel of the output head, for losses that do not materialize all logits."""
        return self.token_embedding.embedding.T if self.model.text.tie_embeddings else self.lm_head()

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """float32 logits over the vocabulary; position i predicts token i + 1."""
        return output_logits(hidden, self.head())

    def empty_cache(self, batch: int, length: int) -> DecoderCache:
        """A cache for `length` tokens of `batch` captions."""
        c = self.model.text

        def zeros(depth: int) -> Array:
            return jnp.zeros((depth, batch, c.heads, length, c.width // c.heads), jnp.dtype(self.model.dtype))

        return DecoderCache(
            layers.Cache(zeros(c.n_uni), zeros(c.n_uni)),
            layers.Cache(zeros(c.n_multi), zeros(c.n_multi)) if c.n_multi else None,
            jnp.zeros((), jnp.int32),
        )

    def step(
        self,
        tokens: Int[Array, "b s"],
        cache: DecoderCache,
        image_tokens: Float[Array, "b q d"] | None = None,
    ) -> tuple[Float[Array, "b s v"], DecoderCache]:
        """Logits for the s tokens that follow the cached ones, and the cache extended by them.

        Pass the image tokens with the first step only; their keys and values stay in the cache.
        """
        assert cache.multimodal is not None  # n_multi=0 has no decoder
        s, m = tokens.shape[1], cache.length
        position = cache.index + jnp.arange(s)
        mask = (jnp.arange(m)[None, :] <= position[:, None])[None, None]
        x = self.embed(tokens, cache.index)
        x, unimodal = self.unimodal.step(x, cache.unimodal, None, mask, cache.index)
        x, multimodal = self.multimodal.step(x, cache.multimodal, image_tokens, mask, cache.index)
        cache = DecoderCache(unimodal, multimodal, cache.index + s)
        return self.logits(self.final_norm(x)), cache


class Half(nn.Module):
    """A stack of causal layers; with `cross`, each layer also attends to the image tokens."""

    model: config.Model
    depth: int
    cross: bool

    def setup(self) -> None:
        c = self.model.text
        self.blocks = layers.stack(
            self.model,
            depth=self.depth,
            remat=c.remat,
            scan_unroll=c.scan_unroll,
            width=c.width,
            heads=c.heads,
            mlp_dim=c.mlp_dim,
            causal=True,
            cross=self.cross,
        )

    def __call__(
        self,
        x: Float[Array, "b s d"],
        image_tokens: Float[Array, "b q d"] | None = None,
        mask: Mask | None = None,
    ) -> Float[Array, "b s d"]:
        return self.blocks(x, None, image_tokens, mask, None)[0]

    def step(
        self,
        x: Float[Array, "b s d"],
        cache: layers.Cache | tuple[layers.Cache, ...],
        image_tokens: Float[Array, "b q d"] | None,
        mask: Mask,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "b s d"], layers.Cache | tuple[layers.Cache, ...]]:
        x, new = self.blocks(x, cache, image_tokens, mask, index)
        if isinstance(cache, tuple):
            return x, tuple(layers.write(old, part, index) for old, part in zip(cache, new, strict=True))
        return x, layers.write(cache, new, index)


class LanguageModelHead(nn.Module):
    """Kernel `[d, v]` of the output softmax, without bias."""

    model: config.Model

    @nn.compact
    def __call__(self) -> Float[Array, "d v"]:
        c = self.model.text
        init = nn.initializers.normal(c.width**-0.5)
        return self.param("kernel", init, (c.width, c.vocab_size), jnp.dtype(self.model.param_dtype))


def embed_tokens(table: nn.Embed, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Token embeddings, arranged so that the table is never gathered.

    Each device holds some columns of the table, which is larger than its texts, so moving ids and rows is cheaper. A
    device looks up its columns for all texts of its replica; then columns are exchanged for texts.
    """
    return shard(table(shard(tokens, "replicas", None)), "replicas", None, "embed")


def output_logits(hidden: Float[Array, "b t d"], head: Float[Array, "d v"]) -> Float[Array, "b t v"]:
    """`hidden @ head` in the hidden states' dtype, accumulated and returned in float32."""
    logits = dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return shard(logits, "batch", None, "vocab")


def cls_mask(tokens: Int[Array, "b t"], pad_id: int, kind: str) -> Mask:
    """Attention mask with [CLS] last, s = t + 1: text is causal, [CLS] attends to real tokens.

    Args:
      tokens: Token ids.
      pad_id: Id of the padding token.
      kind: `full`: [CLS] attends to itself and to all tokens except padding. `legacy`: as in open_clip, whose key mask
        is shifted by one (`[True, tokens != pad]`), so that [CLS] attends to one padding position and, if there is
        padding, not to itself.
    """
    real = tokens != pad_id
    always = jnp.ones_like(real[:, :1])
    seen = jnp.concatenate([always, real] if kind == "legacy" else [real, always], axis=1)
    s = seen.shape[1]
    causal = jnp.tril(jnp.ones((s, s), bool))[None]
    is_cls = (jnp.arange(s) == s - 1)[None, :, None]
    return jnp.where(is_cls, seen[:, None, :], causal)[:, None]


def last_token_position(tokens: Any, pad_id: int) -> Any:
    """Position of each text's last token before padding, int32 `[b]`; 0 for a text of padding alone.

    Not a count, because CLIP's vocabulary pads with an id that also occurs within texts, the "!" of "!(".

    Args:
      tokens: int32 `[b, t]`, a NumPy or a JAX array; the result is of the same kind.
      pad_id: Id of the padding token.
    """
    return ((tokens != pad_id) * np.arange(tokens.shape[1], dtype=np.int32)[None]).max(axis=1)
