"""Beam search: of all continuations of a picture's best captions the best are kept.

Axes: b pictures, k beams, t token positions, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax.generate import choosing, decoder
from coca_jax.generate.options import Captions, Options

_NONE = -1e18  # the score of a place that holds nothing: below all sums of choosing.FORBIDDEN


@flax.struct.dataclass
class _Beams:
    """k captions of each picture, the best first.

    Attributes:
      tokens: padded behind.
      log_probs: under the model itself.
      scores: growing ones: sums of the log-probabilities as the options bend them; ended ones: what they are ranked by.
    """

    tokens: Int[Array, "b k t"]
    log_probs: Float[Array, "b k t"]
    scores: Float[Array, "b k"]

    def best(self, scores: Float[Array, "b k"], count: int) -> tuple[_Beams, Int[Array, "b count"]]:
        top, index = jax.lax.top_k(scores, count)
        rows = jnp.arange(scores.shape[0])[:, None]
        return _Beams(self.tokens[rows, index], self.log_probs[rows, index], top), index


def decode(
    model: decoder.Decoder,
    prompt: Int[Array, "b p"],
    lengths: Int[Array, " b"],
    prefix: int,
    image_tokens: Float[Array, "b q d"],
    options: Options,
    *,
    never: tuple[int, ...],
    eos_id: int,
    pad_id: int,
) -> Captions:
    """See `generate.generate`. Ends where no growing caption can still rank above the worst that is to be returned."""
    b, k, t = prompt.shape[0], options.beams, model.length
    tokens = decoder.buffer(prompt, k, t, pad_id).reshape(b, k, t)
    logits, cache = model.start(prompt[:, :prefix], image_tokens, k)
    # All beams begin alike: but for the first they are worth nothing, so that what follows differs.
    scores = jnp.where(jnp.arange(k)[None, :] == 0, jnp.zeros((b, 1)), choosing.FORBIDDEN * t)
    blank = jnp.zeros((b, k, t))
    growing = _Beams(tokens, blank, scores)
    ended = _Beams(tokens, blank, jnp.full((b, k), _NONE))

    def rank(score: Float[Array, "b n"], end: Array) -> Float[Array, "b n"]:
        """A score by the caption's length, if its last token stands before position `end`."""
        count = jnp.maximum(end - lengths[:, None], 1).astype(jnp.float32)
        return score / count**options.length_penalty

    def unfinished(carry: Any) -> Array:
        at, growing, ended, _, _, _ = carry
        # Log-probabilities are negative: a caption that grows ranks at most as its score now over the best length.
        longest = t if options.length_penalty > 0 else at + 1
        hope = rank(growing.scores[:, :1], jnp.asarray(longest))[:, 0]
        settled = ended.scores[:, options.returns - 1] >= hope
        return (at < t) & ~jnp.all(settled & (at >= lengths))

    def choose(at: Array, growing: _Beams, ended: _Beams, logits: Array) -> tuple[Any, ...]:
        """All beams one token longer: those that grow and have ended, the tokens, and the rows that each came from."""
        own = jax.nn.log_softmax(logits, axis=1)
        flat = growing.tokens.reshape(b * k, t)
        adjusted = choosing.adjust(own, flat, at, options, never=never, eos_id=eos_id)
        forced, is_forced = decoder.given(flat, jnp.repeat(lengths, k), at)
        only = jnp.arange(own.shape[1])[None, :] == forced[:, None]
        adjusted = jnp.where(is_forced[:, None], jnp.where(only, 0.0, choosing.FORBIDDEN), adjusted)
        v = own.shape[1]
        grown = (growing.scores[:, :, None] + adjusted.reshape(b, k, v)).reshape(b, k * v)
        # Twice as many as beams: even if k of them end, k go on.
        top, index = jax.lax.top_k(grown, min(2 * k, k * v))
        rows, parent, new = jnp.arange(b)[:, None], index // v, (index % v).astype(jnp.int32)
        is_forced = is_forced.reshape(b, k)[:, :1]
        gained = jnp.where(is_forced, 0.0, own.reshape(b, k * v)[rows, index])
        candidates = _Beams(
            jax.lax.dynamic_update_slice_in_dim(growing.tokens[rows, parent], new[:, :, None], at, axis=2),
            jax.lax.dynamic_update_slice_in_dim(growing.log_probs[rows, parent], gained[:, :, None], at, axis=2),
            top,
        )
        ends: Bool[Array, "b n"] = (new == eos_id) & ~is_forced
        whole = ends & (top > choosing.FORBIDDEN / 2)  # a forbidden end is none
        ended = _join(ended, candidates, jnp.where(whole, rank(top, at + 1), _NONE), k)
        growing, chosen = candidates.best(jnp.where(ends, _NONE, top), k)
        came_from = (jnp.take_along_axis(parent, chosen, axis=1) + jnp.arange(b)[:, None] * k).reshape(-1)
        last = jnp.take_along_axis(new, chosen, axis=1).reshape(-1)
        return growing, ended, last, came_from

    # The model steps first: after the last token there is nothing more to ask it.
    def step(carry: Any) -> Any:
        at, growing, ended, last, came_from, cache = carry
        logits, cache = model.step(last, decoder.take(cache, came_from))
        return at + 1, *choose(at, growing, ended, logits), cache

    at = jnp.int32(prefix)
    start = (at + 1, *choose(at, growing, ended, logits), cache)
    at, growing, ended, _, _, _ = jax.lax.while_loop(unfinished, step, start)
    # A sum with forbidden tokens in it, or of the copies that all beams but one began as, is of a place that no caption
    # was left for.
    is_caption = growing.scores > choosing.FORBIDDEN / 2
    # Captions that were cut come behind all that ended, in the order that they have.
    order = jnp.broadcast_to(_NONE * (0.25 + 0.25 * jnp.arange(k) / k)[None, :], (b, k))
    best = _join(ended, growing, order, options.returns)
    cut = jnp.where(is_caption, rank(growing.scores, at), -jnp.inf)
    scores = jnp.concatenate([ended.scores, cut], axis=1)
    place = jnp.concatenate([ended.scores, order], axis=1)
    index = jax.lax.top_k(place, options.returns)[1]
    return Captions(best.tokens, best.log_probs, jnp.take_along_axis(scores, index, axis=1))


def _join(held: _Beams, more: _Beams, scores: Float[Array, "b n"], count: int) -> _Beams:
    """The best of what is held and of more, which has these scores."""
    both = _Beams(
        jnp.concatenate([held.tokens, more.tokens], axis=1),
        jnp.concatenate([held.log_probs, more.log_probs], axis=1),
        jnp.concatenate([held.scores, scores], axis=1),
    )
    return both.best(both.scores, count)[0]
