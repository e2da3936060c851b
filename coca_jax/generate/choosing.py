"""Which token comes next: what is forbidden, what is made unlikelier, and drawing.

Axes: n captions in the making, t token positions, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coca_jax.generate.options import Options

FORBIDDEN = -1e9  # finite: sums of it stay comparable, and no difference of two infinities becomes a NaN


def adjust(
    logits: Float[Array, "n v"],
    tokens: Int[Array, "n t"],
    at: Int[Array, ""],
    options: Options,
    *,
    never: tuple[int, ...],
    eos_id: int,
) -> Float[Array, "n v"]:
    """Logits (or log-probabilities) of the token at position `at`, as the options bend them.

    Args:
      logits: float32.
      tokens: what stands before `at`; what stands there and behind is not read.
      at: position.
      options: repetition_penalty, no_repeat_ngram, min_length.
      never: ids that are no part of a caption (padding, bos).
      eos_id: of the end.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    before = jnp.arange(tokens.shape[1])[None, :] < at
    if options.repetition_penalty != 1.0:
        seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(before)
        p = options.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / p, logits * p), logits)
    if options.no_repeat_ngram:
        logits = jnp.where(_would_repeat(tokens, at, options.no_repeat_ngram, logits.shape[1]), FORBIDDEN, logits)
    logits = logits.at[:, jnp.array(never)].set(FORBIDDEN)
    if options.min_length:
        early = at < options.min_length - 1
        logits = logits.at[:, eos_id].set(jnp.where(early, FORBIDDEN, logits[:, eos_id]))
    return logits


def _would_repeat(tokens: Int[Array, "n t"], at: Int[Array, ""], size: int, vocab: int) -> Bool[Array, "n v"]:
    """The tokens that would end a run of `size` tokens that stands before `at` already."""
    n, t = tokens.shape
    rows = jnp.arange(n)[:, None]
    starts = jnp.arange(t)
    # The last size - 1 tokens against those from every start; what follows such a run is what must not come again.
    same = jnp.ones((n, t), bool)
    for offset in range(size - 1):
        last = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(at - (size - 1) + offset, 0), 1)
        same &= jnp.roll(tokens, -offset, axis=1) == last
    whole = (starts + size - 1 < at)[None, :]
    following = jnp.roll(tokens, -(size - 1), axis=1)
    return jnp.zeros((n, vocab), bool).at[rows, following].max(same & whole & (at >= size))


def draw(logits: Float[Array, "n v"], keys: Key[Array, " n"], options: Options) -> Int[Array, " n"]:
    """A token of each row, by temperature, top_k and top_p, each row by its own key."""
    # From the likeliest down, which is 0 at any temperature: near 0 what may come would otherwise fall below FORBIDDEN,
    # and at a very high one what is forbidden would rise. float32 cannot divide by less than its tiniest number.
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    temperature = max(options.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = jnp.where(logits > FORBIDDEN / 2, below / temperature, FORBIDDEN)
    if options.top_k and options.top_k < logits.shape[1]:
        least = jax.lax.top_k(logits, options.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, FORBIDDEN, logits)
    if options.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=1)
        probability = jax.nn.softmax(ordered, axis=1)
        # A token is in while those before it do not make up top_p: the first always is.
        kept = jnp.cumsum(probability, axis=1) - probability < options.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=1, keepdims=True)
        logits = jnp.where(logits < least, FORBIDDEN, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
