"""Decoding options and results."""

from __future__ import annotations

import dataclasses

import flax.struct
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Options:
    """Decoding options. Hashable; each distinct value compiles one program.

    Attributes:
      method: greedy, sample or beam.
      returns: Captions per image: 1 for greedy, at most `beams` for beam search.
      length: Maximum tokens of a caption, including bos, prompt and eos; 0: as many as the model has positions.
      min_length: Minimum tokens of a caption, counted in the same way; eos is forbidden earlier.
      temperature: Divisor of the logits in sampling.
      top_k: Sample among this many of the likeliest tokens; 0: among all.
      top_p: Sample among the fewest likeliest tokens with this total probability (Holtzman et al. 2020, arXiv
        1904.09751); 1: among all.
      beams: Number of beams in beam search.
      length_penalty: Beam search ranks by log-probability / length ** length_penalty, with length counted after the
        prompt. 0 ranks by log-probability alone, which favors short captions (Wu et al. 2016, arXiv 1609.08144, without
        its constant 5).
      repetition_penalty: Above 1, tokens already in the caption become less likely: a positive logit is divided by it,
        a negative one multiplied (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
      no_repeat_ngram: No n-gram of this size occurs twice in a caption; 0: off.
    """

    method: str = "greedy"
    returns: int = 1
    length: int = 0
    min_length: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 6
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def check(self, positions: int) -> None:
        """Raise ValueError for options that a model with this many positions cannot decode with."""
        message = None
        if self.method not in ("greedy", "sample", "beam"):
            message = f"method={self.method!r} is unknown: use greedy, sample or beam"
        elif self.returns < 1 or (self.method == "greedy" and self.returns > 1):
            message = f"returns={self.returns} with method={self.method!r}: greedy gives one; use sample or beam"
        elif self.method == "beam" and not self.returns <= self.beams:
            message = f"beams={self.beams} must be at least returns={self.returns}"
        elif not 0 <= self.length <= positions or self.length == 1:
            message = f"length={self.length} must be 2 to {positions}, the model's positions, or 0 for all of them"
        elif not 0 <= self.min_length <= (self.length or positions):
            message = f"min_length={self.min_length} must be 0 to {self.length or positions}, the length"
        elif not self.temperature > 0:
            message = f"temperature={self.temperature} must be above 0; use method='greedy' for its limit"
        elif self.top_k < 0 or self.no_repeat_ngram < 0:
            message = f"top_k={self.top_k} and no_repeat_ngram={self.no_repeat_ngram} must be 0 (off) or above"
        elif not 0 < self.top_p <= 1:
            message = f"top_p={self.top_p} must be above 0 and at most 1 (off)"
        elif not self.repetition_penalty > 0:
            message = f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is off"
        if message:
            raise ValueError(message)


@flax.struct.dataclass
class Captions:
    """Decoded captions, `r` per image; ranked ones come best first.

    Attributes:
      tokens: bos, prompt, caption, eos, padding. A caption truncated at the length has no eos.
      log_probs: log P(token | image, previous tokens) under the model itself, without the options' adjustments; 0 for
        prompt and padding.
      scores: Ranking scores. Beam search: sum of the (adjusted) log-probabilities / length ** length_penalty; otherwise
        the sum of `log_probs`. -inf marks an empty slot, where the options allow fewer captions.
    """

    tokens: Int[Array, "b r t"]
    log_probs: Float[Array, "b r t"]
    scores: Float[Array, "b r"]
