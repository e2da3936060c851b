"""BLEU, ROUGE-L and CIDEr of captions, as the COCO evaluation computes them, in plain Python.

All take captions and references as words (`words.words`), one caption and one or more references for each picture.
"""

from __future__ import annotations

import collections
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from coca_jax.evaluate.words import words

Words = Sequence[str]
Runs = collections.Counter[tuple[str, ...]]  # how often each run of words occurs
_N = 4  # runs of 1 to 4 words


def scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, float], np.ndarray]:
    """What is reported of a set.

    Args:
      captions: `m` texts.
      references: of each, one or more texts.

    Returns:
      `bleu_1` .. `bleu_4`, `rouge_l` and `cider` of the set (a CIDEr of 1.20 is what papers call 120), with what says
      whether they mean anything: `images`, m; `empty`, the captions without a word; `cider_defined`, 0 where CIDEr is 0
      whatever the captions are (see `tells_apart`), else 1. And the CIDEr of each caption, float64 `[m]`.

    Raises:
      ValueError: there are no captions, not as many as references, or one without a reference.
    """
    if not captions or len(captions) != len(references):
        raise ValueError(
            f"{len(captions)} captions with references for {len(references)}: there must be as many, 1 or more"
        )
    if missing := [at for at, texts in enumerate(references) if not texts]:
        raise ValueError(f"caption {missing[0]} has no reference")
    said = [_words(text) for text in captions]
    known = [[_words(text) for text in texts] for texts in references]
    each = cider(said, known)
    named = {f"bleu_{n}": value for n, value in enumerate(bleu(said, known), 1)}
    named |= {"rouge_l": float(rouge_l(said, known).mean()), "cider": float(each.mean()), "images": float(len(said))}
    empty = sum(not caption for caption in said)
    return named | {"empty": float(empty), "cider_defined": float(tells_apart(known))}, each


def _words(text: str) -> list[str]:
    """Letters with their marks composed first: a caption may compose them where its reference does not."""
    return words(unicodedata.normalize("NFC", text))


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the set (Papineni et al. 2002, sections 2.1-2.3), the closest reference's length counting.

    The counts of a set are added up before they are divided. Ties between lengths go to the shorter.
    """
    correct, guessed, length, closest = np.zeros(_N), np.zeros(_N), 0, 0
    for caption, texts in zip(captions, references, strict=True):
        length += len(caption)
        closest += min((abs(len(text) - len(caption)), len(text)) for text in texts)[1]
        most: Runs = collections.Counter()
        for text in texts:
            most |= _runs(text)
        for run, count in _runs(caption).items():
            correct[len(run) - 1] += min(count, most[run])
        guessed += [max(0, len(caption) - n) for n in range(_N)]
    # Too small to see: what keeps 0 / 0 a number in the reference implementation.
    precision = (correct + 1e-15) / (guessed + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precision[:n]) ** (1 / n)) * brevity for n in range(1, _N + 1)]


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L of each caption, float64 `[m]` (Lin 2004, section 3), with beta = 1.2.

    Precision and recall are each the best of any reference, as in COCO's evaluation.
    """
    beta = 1.2**2
    found = []
    for caption, texts in zip(captions, references, strict=True):
        # An empty text counts as one word that matches nothing but another empty one, as `"".split(" ")` does there.
        said, known = caption or [""], [text or [""] for text in texts]
        common = [_common(said, text) for text in known]
        precision = max(common) / len(said)
        recall = max(c / len(text) for c, text in zip(common, known, strict=True))
        found.append((1 + beta) * precision * recall / (recall + beta * precision) if precision and recall else 0.0)
    return np.array(found)


def tells_apart(references: Sequence[Sequence[Words]]) -> bool:
    """Whether some run of words belongs to some images only. Else all weigh 0 in CIDEr, as with a single image."""
    every = [set().union(*map(_runs, texts)) for texts in references]
    return any(own != every[0] for own in every) or not every


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of each caption, float64 `[m]` (Vedantam et al. 2015, arXiv 1411.5726, sections 3 and 6), with sigma = 6.

    How rare a run of words is, is counted over the pictures of this set; COCO's "CIDEr" is this.
    """
    texts = [[_runs(text) for text in of_one] for of_one in references]
    pictures: Runs = collections.Counter()
    for of_one in texts:
        pictures.update(set().union(*of_one))
    log_total = math.log(len(references))

    def weighted(counts: Runs) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Term frequency times inverse picture frequency, by length of run; norms; and the number of pairs."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_N)]
        for run, count in counts.items():
            vectors[len(run) - 1][run] = count * (log_total - math.log(max(1, pictures[run])))
        norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for run, count in counts.items() if len(run) == 2)

    found = []
    for caption, of_one in zip(captions, texts, strict=True):
        said, said_norms, said_length = weighted(_runs(caption))
        total = 0.0
        for counts in of_one:
            known, known_norms, known_length = weighted(counts)
            penalty = math.exp(-((said_length - known_length) ** 2) / (2 * 6.0**2))
            for n in range(_N):
                same = sum(min(x, known[n].get(run, 0.0)) * known[n].get(run, 0.0) for run, x in said[n].items())
                if said_norms[n] and known_norms[n]:
                    same /= said_norms[n] * known_norms[n]
                total += same * penalty
        found.append(10.0 * total / _N / len(of_one))
    return np.array(found)


def _runs(text: Words) -> Runs:
    return collections.Counter(tuple(text[at : at + n]) for n in range(1, _N + 1) for at in range(len(text) - n + 1))


def _common(a: Iterable[str], b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # of the row above, one to the left
        for at, other in enumerate(b, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
