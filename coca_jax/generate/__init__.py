"""Captions from images: cached decoding in one compiled loop, greedy, by sampling or by beam search.

The image's keys and values are computed once and held once, however many captions grow; each token's once. Axes: b
pictures, r captions of each, p prompt tokens, t token positions, q image tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from coca_jax import config
from coca_jax.generate import beam, single
from coca_jax.generate.decoder import Decoder
from coca_jax.generate.options import Captions, Options
from coca_jax.model.text_decoder import last_place

__all__ = ["Captions", "Options", "generate", "greedy", "prefix_length"]


def generate(
    model: config.Model,
    params: Any,
    image_tokens: Float[Array, "b q d"],
    options: Options = Options(),  # noqa: B008  (frozen)
    *,
    bos_id: int,
    eos_id: int,
    prompt: Int[Array, "b p"] | None = None,
    prefix: int = 1,
    keys: Key[Array, " b"] | None = None,
) -> Captions:
    """Captions of pictures. Pure: jit it with `model`, `options`, the ids and `prefix` fixed.

    Args:
      model: configuration.
      params: of the model.
      image_tokens: from `encode_image`.
      options: how.
      bos_id, eos_id: of the tokenizer; padding is `model.text.pad_id`. Bos and padding are never generated.
      prompt: what captions begin with: bos, tokens, padding, of any lengths. None: bos alone.
      prefix: how many tokens every prompt has at least, `prefix_length`: they go through the decoder at once, what is
        beyond one by one. Any number from 1 to that gives the same captions.
      keys: for sampling, one for each picture, so that what is drawn does not depend on the pictures beside it.

    Raises:
      ValueError: the options do not go with the model, sampling has no keys, or a prompt fills the length.
    """
    options.check(model.text.length)
    length = options.length or model.text.length
    if (options.method == "sample") != (keys is not None):
        raise ValueError(f"method={options.method!r} with keys={keys}: sampling takes keys, and nothing else does")
    pad_id = model.text.pad_id
    if prompt is None:
        prompt = jnp.full((image_tokens.shape[0], 1), bos_id, jnp.int32)
    if not 1 <= prefix <= prompt.shape[1] < length:
        raise ValueError(
            f"prompts of {prompt.shape[1]} tokens (prefix {prefix}) leave nothing of length={length} to generate: "
            "shorten them, or raise the length"
        )
    lengths = 1 + last_place(prompt, pad_id)
    decoder = Decoder(model, params, length)
    ids: dict[str, Any] = {"never": tuple({pad_id, bos_id} - {eos_id}), "eos_id": eos_id, "pad_id": pad_id}
    if options.method == "beam":
        return beam.decode(decoder, prompt, lengths, prefix, image_tokens, options, **ids)
    return single.decode(decoder, prompt, lengths, prefix, image_tokens, options, keys, **ids)


def greedy(
    model: config.Model,
    params: Any,
    image_tokens: Float[Array, "b q d"],
    *,
    bos_id: int,
    eos_id: int,
    length: int = 0,
) -> Int[Array, "b t"]:
    """The tokens of `generate` with the defaults, one caption for each picture."""
    made = generate(model, params, image_tokens, Options(length=length), bos_id=bos_id, eos_id=eos_id)
    return made.tokens[:, 0]


def prefix_length(lengths: Any) -> int:
    """The largest power of two that no prompt is shorter than, so that many prompts share few compiled programs.

    Args:
      lengths: tokens of each prompt, bos included, `[b]`.
    """
    return 1 << (int(min(lengths)).bit_length() - 1)
