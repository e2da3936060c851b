"""Captions from images: cached decoding in one compiled loop.

Axes: b batch, t text tokens, q image tokens, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model.coca import CoCa


def greedy(
    model: config.Model,
    params: Any,
    image_tokens: Float[Array, "b q d"],
    *,
    bos_id: int,
    eos_id: int,
    length: int | None = None,
) -> Int[Array, "b t"]:
    """The likeliest next token, again and again, until every caption has ended or is full.

    The image's keys and values are computed once, each token's once: a step costs one token through the decoder. Pure:
    jit it with `model`, the ids and `length` fixed.

    Args:
      model: configuration.
      params: of the model.
      image_tokens: from `encode_image`.
      bos_id, eos_id: of the tokenizer; padding is `model.text.pad_id`.
      length: tokens of a caption, bos and eos included; None for `model.text.length`.

    Returns:
      int32 ids: bos, the caption, eos, padding. A caption that was cut at `length` has no eos.
    """
    length = length or model.text.length
    pad = model.text.pad_id
    coca, batch = CoCa(model), image_tokens.shape[0]

    def likeliest(logits: Float[Array, "b 1 v"], done: Array) -> Array:
        # Padding and bos are never part of a caption, whatever the logits say.
        logits = logits[:, -1].at[:, jnp.array([pad, bos_id])].set(-jnp.inf)
        return jnp.where(done, pad, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    tokens = jnp.full((batch, length), pad, jnp.int32).at[:, 0].set(bos_id)
    logits, cache = coca.apply({"params": params}, tokens[:, :1], image_tokens, length, method="prefill")
    done = jnp.zeros((batch,), bool)

    def unfinished(carry: Any) -> Array:
        at, _, _, _, done = carry
        return (at < length) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        at, tokens, logits, cache, done = carry
        new = likeliest(logits, done)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], at, axis=1)
        done = done | (new == eos_id)
        logits, cache = coca.apply({"params": params}, new[:, None], cache, method="decode_step")
        return at + 1, tokens, logits, cache, done

    carry = (jnp.ones((), jnp.int32), tokens, logits, cache, done)
    return jax.lax.while_loop(unfinished, step, carry)[1]
