"""Words and scores against the official COCO evaluation, whose results are recorded beside this file.

caption_scores.json: texts with the words of Stanford's PTBTokenizer; captions and references with what pycocoevalcap
1.2 computes from their words.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from coca_jax.evaluate import caption_scores
from coca_jax.evaluate.words import words

RECORDED = json.loads((pathlib.Path(__file__).parent / "caption_scores.json").read_text())
CAPTIONS = [text.split() for text in RECORDED["captions"]]
REFERENCES = [[text.split() for text in texts] for texts in RECORDED["references"]]


def test_words_are_those_of_the_penn_treebank() -> None:
    assert len(RECORDED["words"]) == 102
    assert {text: words(text) for text in RECORDED["words"]} == RECORDED["words"]


def test_scores_are_those_of_the_reference() -> None:
    """The same sums of float64 in another order."""
    np.testing.assert_allclose(caption_scores.bleu(CAPTIONS, REFERENCES), RECORDED["bleu"], rtol=1e-12)
    np.testing.assert_allclose(caption_scores.rouge_l(CAPTIONS, REFERENCES), RECORDED["rouge_each"], rtol=1e-12)
    each = caption_scores.cider(CAPTIONS, REFERENCES)
    np.testing.assert_allclose(each, RECORDED["cider_each"], rtol=1e-12, atol=1e-12)
    assert min(each) == 0 < max(each) and np.mean(each) == pytest.approx(RECORDED["cider"], rel=1e-12)


def test_texts_go_through_the_words() -> None:
    texts = ["A red dot.", "The dog's ball, red!"]
    found, each = caption_scores.scores(texts, [["a red dot"], ["the dog 's ball red", "a ball"]])
    assert found["bleu_1"] == pytest.approx(1) and found["rouge_l"] == pytest.approx(1)
    assert each.shape == (2,) and found["cider"] == pytest.approx(each.mean())


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(ValueError, match="0 captions"):
        caption_scores.scores([], [])
    with pytest.raises(ValueError, match="2 captions with references for 1"):
        caption_scores.scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        caption_scores.scores(["a", "b"], [["a"], []])
