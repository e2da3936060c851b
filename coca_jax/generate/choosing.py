"""Next-token selection: forbidden tokens, penalties and sampling.

Axes: n captions being decoded, t token positions, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coca_jax.generate.options import Options

FORBIDDEN = -1e9  # finite, so that sums stay comparable and no difference becomes NaN


def adjust(
    logits: Float[Array, "n v"],
    tokens: Int[Array, "n t"],
    at: Int[Array, ""],
    options: Options,
    *,
    never: tuple[int, ...],
    eos_id: int,
) -> Float[Array, "n v"]:
    """Apply the options' penalties to the logits (or log-probabilities) of the token at position `at`.

    Args:
      logits: float32 logits.
      tokens: Captions so far; entries at `at` and after it are ignored.
      at: Position.
      options: repetition_penalty, no_repeat_ngram and min_length are used.
      never: Ids that a caption never contains (padding, bos).
      eos_id: Id of the end token.
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
    """Tokens that would complete an n-gram of `size` tokens that already occurs before `at`."""
    n, t = tokens.shape
    rows = jnp.arange(n)[:, None]
    starts = jnp.arange(t)
    # Compare the last size - 1 tokens with those at every start; the token after a match would repeat the n-gram.
    same = jnp.ones((n, t), bool)
    for offset in range(size - 1):
        last = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(at - (size - 1) + offset, 0), 1)
        same &= jnp.roll(tokens, -offset, axis=1) == last
    complete = (starts + size - 1 < at)[None, :]
    following = jnp.roll(tokens, -(size - 1), axis=1)
    return jnp.zeros((n, vocab), bool).at[rows, following].max(same & complete & (at >= size))


def draw(logits: Float[Array, "n v"], keys: Key[Array, " n"], options: Options) -> Int[Array, " n"]:
    """Sample one token per row by temperature, top_k and top_p, each row with its own key."""
    # Subtract the maximum first, which stays 0 at any temperature: low temperatures would otherwise push allowed tokens
    # below FORBIDDEN, and very high ones raise forbidden tokens. float32 cannot divide by less than its smallest normal
    # number.
    below = logits - jnp.max(logits, axis=1, keepdims=True)
    temperature = max(options.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = jnp.where(logits > FORBIDDEN / 2, below / temperature, FORBIDDEN)
    if options.top_k and options.top_k < logits.shape[1]:
        threshold = jax.lax.top_k(logits, options.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, FORBIDDEN, logits)
    if options.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=1)
        probability = jax.nn.softmax(ordered, axis=1)
        # Keep a token while the probability before it is below top_p, so the first is always kept.
        kept = jnp.cumsum(probability, axis=1) - probability < options.top_p
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=1, keepdims=True)
        logits = jnp.where(logits < threshold, FORBIDDEN, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
