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
from coca_jax.model import stacks
from coca_jax.model.coca import CoCa
from coca_jax.model.text_decoder import DecoderCache


class Decoder:
    """Starts with the part of the prompt that every row has, then goes on by one token.

    The start is made of the model's stacked layers, all that comes after of layers that are held `apart`: the decoder's
    parameters lie in memory twice meanwhile, and are read once for each token.

    Attributes:
      length: positions of the cache.
    """

    def __init__(self, model: config.Model, params: Any, length: int):
        """Of a model's configuration and parameters; to be made outside the loop over tokens."""
        self.length = length
        self._stacked = model, params
        text, halves = model.text, dict(params["text_decoder"])
        for name, depth in (("unimodal", text.n_uni), ("multimodal", text.n_multi)):
            blocks = stacks.apart(halves[name]["blocks"], depth)
            halves[name] = {"blocks": {str(layer): params for layer, params in enumerate(blocks)}}
        model = dataclasses.replace(model, text=dataclasses.replace(text, scan_unroll=0))
        self._apart = model, {**params, "text_decoder": halves}

    def start(
        self, prompt: Int[Array, "b p"], image_tokens: Float[Array, "b q d"], rows: int
    ) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after the prompt for `rows` captions of each picture, whose image keys and values are held once."""
        model, params = self._stacked
        made: Any = CoCa(model).apply({"params": params}, prompt, image_tokens, self.length, method="prefill")
        logits, cache = made
        text = model.text
        cache = dataclasses.replace(
            cache,
            unimodal=stacks.apart(cache.unimodal, text.n_uni),
            multimodal=stacks.apart(cache.multimodal, text.n_multi),
        )
        return jnp.repeat(logits[:, -1], rows, axis=0), _own(cache, lambda x: jnp.repeat(x, rows, axis=0))

    def step(self, tokens: Int[Array, " n"], cache: DecoderCache) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after one more token of each row."""
        model, params = self._apart
        made: Any = CoCa(model).apply({"params": params}, tokens[:, None], cache, method="decode_step")
        logits, cache = made
        return logits[:, 0], cache


def take(cache: DecoderCache, rows: Int[Array, " n"]) -> DecoderCache:
    """The cache of other rows; those of the image stay, so a row must come from the same picture."""
    return _own(cache, lambda x: jnp.take(x, rows, axis=0))


def _own(cache: DecoderCache, change: Any) -> DecoderCache:
    def of(half: Any) -> Any:
        return tuple(dataclasses.replace(c, keys=change(c.keys), values=change(c.values)) for c in half)

    return dataclasses.replace(cache, unimodal=of(cache.unimodal), multimodal=of(cache.multimodal))


def buffer(prompt: Int[Array, "b p"], rows: int, length: int, pad_id: int) -> Int[Array, "n t"]:
    """The prompt `rows` times, padded to the whole length."""
    padded = jnp.pad(prompt, ((0, 0), (0, length - prompt.shape[1])), constant_values=pad_id)
    return jnp.repeat(padded, rows, axis=0)


def given(tokens: Int[Array, "n t"], lengths: Int[Array, " n"], at: Int[Array, ""]) -> tuple[Array, Bool[Array, " n"]]:
    """The prompt's token at a position, and in which rows the prompt reaches so far."""
    return jax.lax.dynamic_index_in_dim(tokens, at, 1, keepdims=False), at < lengths
