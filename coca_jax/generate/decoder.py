"""The model as decoding sees it: prompts in, one token at a time out, the cache carried.

Axes: b pictures, r captions of each, n = b r rows (a picture's captions follow one another), t token positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax import config
from coca_jax.model.coca import CoCa
from coca_jax.model.layers import Cache
from coca_jax.model.text_decoder import DecoderCache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Starts with the part of the prompt that every row has, then goes on by one token.

    Attributes:
      model: configuration.
      params: of the model.
      length: positions of the cache.
    """

    model: config.Model
    params: Any
    length: int

    def start(
        self, prompt: Int[Array, "b p"], image_tokens: Float[Array, "b q d"], rows: int
    ) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after the prompt for `rows` captions of each picture, whose image keys and values are held once."""
        variables = {"params": self.params}
        made: Any = CoCa(self.model).apply(variables, prompt, image_tokens, self.length, method="prefill")
        logits, cache = made
        return jnp.repeat(logits[:, -1], rows, axis=0), repeat(cache, rows)

    def step(self, tokens: Int[Array, " n"], cache: DecoderCache) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after one more token of each row."""
        variables = {"params": self.params}
        made: Any = CoCa(self.model).apply(variables, tokens[:, None], cache, method="decode_step")
        logits, cache = made
        return logits[:, 0], cache


def repeat(cache: DecoderCache, rows: int) -> DecoderCache:
    """A cache with each row's keys and values `rows` times; those of the image stay as they are."""
    return _own(cache, lambda x: jnp.repeat(x, rows, axis=1))


def take(cache: DecoderCache, rows: Int[Array, " n"]) -> DecoderCache:
    """The cache of other rows; those of the image stay, so a row must come from the same picture."""
    return _own(cache, lambda x: jnp.take(x, rows, axis=1))


def _own(cache: DecoderCache, change: Any) -> DecoderCache:
    def of(half: Cache | None) -> Cache | None:
        if half is None:
            return None
        return dataclasses.replace(half, keys=change(half.keys), values=change(half.values))

    unimodal = of(cache.unimodal)
    assert unimodal is not None
    return dataclasses.replace(cache, unimodal=unimodal, multimodal=of(cache.multimodal))


def buffer(prompt: Int[Array, "b p"], rows: int, length: int, pad_id: int) -> Int[Array, "n t"]:
    """The prompt `rows` times, padded to the whole length."""
    padded = jnp.pad(prompt, ((0, 0), (0, length - prompt.shape[1])), constant_values=pad_id)
    return jnp.repeat(padded, rows, axis=0)


def given(tokens: Int[Array, "n t"], lengths: Int[Array, " n"], at: Int[Array, ""]) -> tuple[Array, Bool[Array, " n"]]:
    """The prompt's token at a position, and in which rows the prompt reaches so far."""
    return jax.lax.dynamic_index_in_dim(tokens, at, 1, keepdims=False), at < lengths
