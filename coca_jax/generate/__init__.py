"""Captions from images: cached decoding in one compiled loop, by greedy search, sampling or beam search.

An image's keys and values are computed and stored once for all of its captions. Axes: b images, r captions per image, p
prompt tokens, t token positions, q image tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from coca_jax import config
from coca_jax.generate import beam, single
from coca_jax.generate.decoder import Decoder
from coca_jax.generate.options import Captions, Options
from coca_jax.model.text_decoder import last_token_position

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
    """Decode captions of images. Pure: jit it with `model`, `options`, the ids and `prefix` static.

    Args:
      model: Model configuration.
      params: Model parameters.
      image_tokens: Output of `encode_image`.
      options: Decoding options.
      bos_id, eos_id: Ids of the tokenizer; padding is `model.text.pad_id`. Bos and padding are never generated.
      prompt: First tokens of the captions: bos, tokens, padding; lengths may differ. None: bos alone.
      prefix: Number of prompt tokens that are decoded in one pass, the others one at a time. Must not exceed the
        shortest prompt (`prefix_length`); the captions do not depend on it.
      keys: Random keys for sampling, one per image, so that samples do not depend on the other images in the batch.

    Raises:
      ValueError: The options do not fit the model, sampling has no keys, or a prompt fills the length.
    """
    options.check(model.text.length)
    length = options.length or model.text.length
    if (options.method == "sample") != (keys is not None):
        raise ValueError(f"method={options.method!r} with keys={keys}: pass keys for method='sample' and only for it")
    pad_id = model.text.pad_id
    if prompt is None:
        prompt = jnp.full((image_tokens.shape[0], 1), bos_id, jnp.int32)
    if not 1 <= prefix <= prompt.shape[1] < length:
        raise ValueError(
            f"prompts of {prompt.shape[1]} tokens (prefix {prefix}) leave no tokens of length={length} to generate: "
            "shorten them or raise the length"
        )
    lengths = 1 + last_token_position(prompt, pad_id)
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
    """Token ids of `generate` with default options, one caption per image."""
    captions = generate(model, params, image_tokens, Options(length=length), bos_id=bos_id, eos_id=eos_id)
    return captions.tokens[:, 0]


def prefix_length(lengths: Any) -> int:
    """Largest power of two that no prompt is shorter than, so that many prompts share few compiled programs.

    Args:
      lengths: Tokens per prompt, bos included, `[b]`.
    """
    return 1 << (int(min(lengths)).bit_length() - 1)
