"""What may be asked of decoding, and what it gives."""

from __future__ import annotations

import dataclasses

import flax.struct
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Options:
    """How captions are decoded. Hashable: one compiled program for each.

    Attributes:
      method: greedy (the likeliest next token) | sample | beam.
      returns: captions for each picture. Greedy has one; of beam search at most `beams`.
      length: tokens of a caption at most, bos, prompt and eos included; 0: as many as the model has positions.
      min_length: tokens of a caption at least, counted alike: eos comes no earlier.
      temperature: of sampling; logits are divided by it.
      top_k: sampling is among so many of the likeliest tokens; 0: among all.
      top_p: sampling is among the fewest likeliest tokens that together have this probability (Holtzman et al. 2020,
        arXiv 1904.09751); 1: among all.
      beams: of beam search.
      length_penalty: beam search ranks by log-probability / length ** this, length counting what came after the prompt;
        0: by log-probability alone, which favours short captions (Wu et al. 2016, arXiv 1609.08144, without its 5).
      repetition_penalty: above 1, what the caption holds already becomes unlikelier: a positive logit is divided by it,
        a negative one multiplied (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
      no_repeat_ngram: no run of so many tokens comes twice in a caption; 0: any may.
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
        """Raises ValueError for what cannot be decoded by a model of so many positions."""
        wrong = None
        if self.method not in ("greedy", "sample", "beam"):
            wrong = f"method={self.method!r}: choose greedy, sample or beam"
        elif self.returns < 1 or (self.method == "greedy" and self.returns > 1):
            wrong = f"returns={self.returns} with method={self.method!r}: greedy gives one; sample or beam more"
        elif self.method == "beam" and not self.returns <= self.beams:
            wrong = f"beams={self.beams} must be returns={self.returns} or more"
        elif not 0 <= self.length <= positions or self.length == 1:
            wrong = f"length={self.length} must lie in 2..{positions}, the model's positions (0: all of them)"
        elif not 0 <= self.min_length <= (self.length or positions):
            wrong = f"min_length={self.min_length} must lie in 0..{self.length or positions}, the length"
        elif not self.temperature > 0:
            wrong = f"temperature={self.temperature} must be more than 0; method='greedy' is its limit"
        elif self.top_k < 0 or self.no_repeat_ngram < 0:
            wrong = f"top_k={self.top_k} and no_repeat_ngram={self.no_repeat_ngram} must be 0 (off) or more"
        elif not 0 < self.top_p <= 1:
            wrong = f"top_p={self.top_p} must be more than 0 and at most 1 (off)"
        elif not self.repetition_penalty > 0:
            wrong = f"repetition_penalty={self.repetition_penalty} must be more than 0; 1 is off"
        if wrong:
            raise ValueError(wrong)


@flax.struct.dataclass
class Captions:
    """Decoded captions, `r` for each picture, the best first where they are ranked.

    Attributes:
      tokens: bos, prompt, caption, eos, padding. One that was cut at the length has no eos.
      log_probs: log P(token | picture, tokens before) under the model itself, whatever options bent the choice; 0 for
        prompt and padding.
      scores: what they are ranked by. Beam search: the sum of the (penalised) log-probabilities / length ** penalty;
        else the sum of `log_probs`. -inf: there are fewer captions that the options allow, and this is none.
    """

    tokens: Int[Array, "b r t"]
    log_probs: Float[Array, "b r t"]
    scores: Float[Array, "b r"]
