"""Beam search: keep the best of all continuations of an image's best captions.

Axes: b images, k beams, t token positions, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax.generate import choosing, decoder
from coca_jax.generate.options import Captions, Options

_EMPTY = -1e18  # score of an empty slot: below all sums of choosing.FORBIDDEN


@flax.struct.dataclass
class _Beams:
    """k captions per image, best first.

    Attributes:
      tokens: Token ids, padded at the end.
      log_probs: Log-probabilities under the model itself.
      scores: Of unfinished captions, sums of adjusted log-probabilities; of finished ones, ranking scores.
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
    """See `generate.generate`. Stops when no unfinished caption can outrank the worst one to be returned."""
    b, k, t = prompt.shape[0], options.beams, model.length
    tokens = decoder.buffer(prompt, k, t, pad_id).reshape(b, k, t)
    logits, cache = model.start(prompt[:, :prefix], image_tokens, k)
    # All beams start equal: only the first gets a usable score, so that the beams become different.
    scores = jnp.where(jnp.arange(k)[None, :] == 0, jnp.zeros((b, 1)), choosing.FORBIDDEN * t)
    blank = jnp.zeros((b, k, t))
    live = _Beams(tokens, blank, scores)
    finished = _Beams(tokens, blank, jnp.full((b, k), _EMPTY))

    def rank(score: Float[Array, "b n"], end: Array) -> Float[Array, "b n"]:
        """Ranking score of captions whose last token is before position `end`."""
        count = jnp.maximum(end - lengths[:, None], 1).astype(jnp.float32)
        return score / count**options.length_penalty

    def keep_going(carry: Any) -> Array:
        at, live, finished, _, _, _ = carry
        # Log-probabilities are negative: an unfinished caption ranks at most at its present score for the best length.
        longest = t if options.length_penalty > 0 else at + 1
        upper_bound = rank(live.scores[:, :1], jnp.asarray(longest))[:, 0]
        settled = finished.scores[:, options.returns - 1] >= upper_bound
        return (at < t) & ~jnp.all(settled & (at >= lengths))

    def choose(at: Array, live: _Beams, finished: _Beams, logits: Array) -> tuple[Any, ...]:
        """Extend all beams by one token: unfinished and finished beams, new tokens, and each beam's previous row."""
        own = jax.nn.log_softmax(logits, axis=1)
        flat = live.tokens.reshape(b * k, t)
        adjusted = choosing.adjust(own, flat, at, options, never=never, eos_id=eos_id)
        forced, is_forced = decoder.prompt_tokens_at(flat, jnp.repeat(lengths, k), at)
        forced_only = jnp.arange(own.shape[1])[None, :] == forced[:, None]
        adjusted = jnp.where(is_forced[:, None], jnp.where(forced_only, 0.0, choosing.FORBIDDEN), adjusted)
        v = own.shape[1]
        total = (live.scores[:, :, None] + adjusted.reshape(b, k, v)).reshape(b, k * v)
        # 2k candidates: even if k of them end, k remain.
        top, index = jax.lax.top_k(total, min(2 * k, k * v))
        rows, parent, new = jnp.arange(b)[:, None], index // v, (index % v).astype(jnp.int32)
        is_forced = is_forced.reshape(b, k)[:, :1]
        gained = jnp.where(is_forced, 0.0, own.reshape(b, k * v)[rows, index])
        candidates = _Beams(
            jax.lax.dynamic_update_slice_in_dim(live.tokens[rows, parent], new[:, :, None], at, axis=2),
            jax.lax.dynamic_update_slice_in_dim(live.log_probs[rows, parent], gained[:, :, None], at, axis=2),
            top,
        )
        ends: Bool[Array, "b n"] = (new == eos_id) & ~is_forced
        valid = ends & (top > choosing.FORBIDDEN / 2)  # an eos that was forbidden does not count
        finished = _join(finished, candidates, jnp.where(valid, rank(top, at + 1), _EMPTY), k)
        live, chosen = candidates.best(jnp.where(ends, _EMPTY, top), k)
        parents = (jnp.take_along_axis(parent, chosen, axis=1) + jnp.arange(b)[:, None] * k).reshape(-1)
        last = jnp.take_along_axis(new, chosen, axis=1).reshape(-1)
        return live, finished, last, parents

    # Step the model first: no step is needed after the last token.
    def step(carry: Any) -> Any:
        at, live, finished, last, parents, cache = carry
        logits, cache = model.step(last, decoder.take(cache, parents))
        return at + 1, *choose(at, live, finished, logits), cache

    at = jnp.int32(prefix)
    start = (at + 1, *choose(at, live, finished, logits), cache)
    at, live, finished, _, _, _ = jax.lax.while_loop(keep_going, step, start)
    # Scores that contain forbidden tokens, or come from the initial copies of the first beam, are empty slots.
    is_caption = live.scores > choosing.FORBIDDEN / 2
    # Truncated captions follow all finished ones, in their own order.
    order = jnp.broadcast_to(_EMPTY * (0.25 + 0.25 * jnp.arange(k) / k)[None, :], (b, k))
    best = _join(finished, live, order, options.returns)
    truncated = jnp.where(is_caption, rank(live.scores, at), -jnp.inf)
    scores = jnp.concatenate([finished.scores, truncated], axis=1)
    combined = jnp.concatenate([finished.scores, order], axis=1)
    index = jax.lax.top_k(combined, options.returns)[1]
    return Captions(best.tokens, best.log_probs, jnp.take_along_axis(scores, index, axis=1))


def _join(held: _Beams, more: _Beams, scores: Float[Array, "b n"], count: int) -> _Beams:
    """The best captions of `held` and of `more`, which has the given scores."""
    both = _Beams(
        jnp.concatenate([held.tokens, more.tokens], axis=1),
        jnp.concatenate([held.log_probs, more.log_probs], axis=1),
        jnp.concatenate([held.scores, scores], axis=1),
    )
    return both.best(both.scores, count)[0]
