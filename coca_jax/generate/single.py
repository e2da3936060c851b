"""Greedy decoding and sampling, where captions are decoded independently."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from coca_jax.generate import choosing, decoder
from coca_jax.generate.options import Captions, Options


def decode(
    model: decoder.Decoder,
    prompt: Int[Array, "b p"],
    lengths: Int[Array, " b"],
    prefix: int,
    image_tokens: Float[Array, "b q d"],
    options: Options,
    keys: Key[Array, " b"] | None,
    *,
    never: tuple[int, ...],
    eos_id: int,
    pad_id: int,
) -> Captions:
    """See `generate.generate`. `prompt` may hold anything beyond `lengths`."""
    b, r, t = prompt.shape[0], options.returns, model.length
    tokens = decoder.buffer(prompt, r, t, pad_id)
    lengths = jnp.repeat(lengths, r)
    logits, cache = model.start(prompt[:, :prefix], image_tokens, r)
    if keys is not None:
        keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(r)))(keys).reshape(-1)

    def choose(at: Array, tokens: Array, log_probs: Array, logits: Array, done: Array) -> tuple[Array, ...]:
        """Write the tokens of position `at` and return them too."""
        adjusted = choosing.adjust(logits, tokens, at, options, never=never, eos_id=eos_id)
        if keys is None:
            new = jnp.argmax(adjusted, axis=1).astype(jnp.int32)
        else:
            new = choosing.draw(adjusted, jax.vmap(lambda k: jax.random.fold_in(k, at))(keys), options)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), new[:, None], axis=1)[:, 0]
        forced, is_forced = decoder.prompt_tokens_at(tokens, lengths, at)
        new = jnp.where(is_forced, forced, jnp.where(done, pad_id, new))
        own = jnp.where(is_forced | done, 0.0, own)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], at, axis=1)
        log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, own[:, None], at, axis=1)
        return tokens, log_probs, new, done | (~is_forced & (new == eos_id))

    def keep_going(carry: Any) -> Array:
        at, _, _, _, done, _ = carry
        return (at < t) & ~jnp.all(done)

    # Step the model first: no step is needed after the last token.
    def step(carry: Any) -> Any:
        at, tokens, log_probs, new, done, cache = carry
        logits, cache = model.step(new, cache)
        return at + 1, *choose(at, tokens, log_probs, logits, done), cache

    at = jnp.int32(prefix)
    first = choose(at, tokens, jnp.zeros((b * r, t)), logits, jnp.zeros((b * r,), bool))
    _, tokens, log_probs, _, _, _ = jax.lax.while_loop(keep_going, step, (at + 1, *first, cache))
    log_probs = log_probs.reshape(b, r, t)
    return Captions(tokens.reshape(b, r, t), log_probs, log_probs.sum(axis=2))
