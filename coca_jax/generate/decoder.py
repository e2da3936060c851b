"""The model as decoding uses it: prompts in, then one token at a time, with an explicit cache.

Axes: b images, r captions per image, n = b r rows (an image's captions are consecutive), t token positions.
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
    """Decodes the prompt positions that all rows have in one pass, then one token per step.

    The first pass runs through the model's stacked layers; later steps use layers that are unstacked once. The
    decoder's parameters are in memory twice meanwhile, but are read only once per token.

    Attributes:
      length: Capacity of the cache in tokens.
    """

    def __init__(self, model: config.Model, params: Any, length: int):
        """Unstack the parameters of a model; call it outside the loop over tokens."""
        self.length = length
        self._stacked = model, params
        text, halves = model.text, dict(params["text_decoder"])
        for name, depth in (("unimodal", text.n_uni), ("multimodal", text.n_multi)):
            blocks = stacks.unstack(halves[name]["blocks"], depth)
            halves[name] = {"blocks": {str(layer): params for layer, params in enumerate(blocks)}}
        model = dataclasses.replace(model, text=dataclasses.replace(text, scan_unroll=0))
        self._unstacked = model, {**params, "text_decoder": halves}

    def start(
        self, prompt: Int[Array, "b p"], image_tokens: Float[Array, "b q d"], rows: int
    ) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after the prompt for `rows` captions per image, whose image keys and values are stored once."""
        model, params = self._stacked
        outputs: Any = CoCa(model).apply({"params": params}, prompt, image_tokens, self.length, method="prefill")
        logits, cache = outputs
        text = model.text
        cache = dataclasses.replace(
            cache,
            unimodal=stacks.unstack(cache.unimodal, text.n_uni),
            multimodal=stacks.unstack(cache.multimodal, text.n_multi),
        )
        return jnp.repeat(logits[:, -1], rows, axis=0), _map_own(cache, lambda x: jnp.repeat(x, rows, axis=0))

    def step(self, tokens: Int[Array, " n"], cache: DecoderCache) -> tuple[Float[Array, "n v"], DecoderCache]:
        """Logits after one more token per row."""
        model, params = self._unstacked
        outputs: Any = CoCa(model).apply({"params": params}, tokens[:, None], cache, method="decode_step")
        logits, cache = outputs
        return logits[:, 0], cache


def take(cache: DecoderCache, rows: Int[Array, " n"]) -> DecoderCache:
    """Select cache rows. The image part is kept, so a row must be replaced by one of the same image."""
    return _map_own(cache, lambda x: jnp.take(x, rows, axis=0))


def _map_own(cache: DecoderCache, change: Any) -> DecoderCache:
    def map_half(half: Any) -> Any:
        return tuple(dataclasses.replace(c, keys=change(c.keys), values=change(c.values)) for c in half)

    return dataclasses.replace(cache, unimodal=map_half(cache.unimodal), multimodal=map_half(cache.multimodal))


def buffer(prompt: Int[Array, "b p"], rows: int, length: int, pad_id: int) -> Int[Array, "n t"]:
    """The prompt repeated `rows` times, padded to the full length."""
    padded = jnp.pad(prompt, ((0, 0), (0, length - prompt.shape[1])), constant_values=pad_id)
    return jnp.repeat(padded, rows, axis=0)


def prompt_tokens_at(
    tokens: Int[Array, "n t"], lengths: Int[Array, " n"], at: Int[Array, ""]
) -> tuple[Array, Bool[Array, " n"]]:
    """Prompt tokens at a position, and which rows' prompts reach that far."""
    return jax.lax.dynamic_index_in_dim(tokens, at, 1, keepdims=False), at < lengths
