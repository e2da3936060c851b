"""A vocabulary as tokenizer.json: the same ids, or an error. transformers opens it in tests/peers/open_clip_test.py."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import tokenizer_json
from coca_jax.interop.weights import ConversionError

CAPTIONS = [
    "a red apple on a table",
    "two cats, naïve café",
    "A photo of 3 dogs <3 in Paris!",
    "中文字符 and 日本語",
] * 5


def trained(**options: Any) -> Tokenizer:
    out = io.BytesIO()
    options = {"vocab_size": 380, "byte_fallback": True, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=out, hard_vocab_limit=False, minloglevel=2, **options
    )
    return Tokenizer(out.getvalue())


def opened(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    files = tokenizer_json.convert(tokenizer)
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    made.encode_special_tokens = json.loads(files["tokenizer_config.json"])["split_special_tokens"]
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"pad_id": 3, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_piece": "<PAD>", "vocab_size": 330},
    ],
)
def test_ids_are_those_of_sentencepiece(options: dict[str, Any]) -> None:
    tokenizer = trained(**options)
    made = opened(tokenizer)
    # Texts of letters drawn from all that the probes and captions have, and from anywhere; accents on plain letters.
    rng = np.random.default_rng(0)
    letters = sorted(set("".join([*CAPTIONS, *tokenizer_json.PROBES])) - {"\x00"})
    letters += [chr(x) for x in rng.integers(0x20, 0x2FFF, 300)]
    letters = [x for x in letters if unicodedata.category(x)[0] != "M"]
    accented = ["e\u0301", "n\u0303", "A\u030b", "½\u0301", "y\u0308", "か\u3099", "<s>", "<0x41>", "  ", "👩‍👩‍👧"]
    for n in range(400):
        text = "".join(rng.choice([*letters, *accented * (1 + n % 2 * 20)], rng.integers(1, 30)))
        length = 8 * len(text.encode()) + 8
        wanted = tokenizer.encode(text, length)
        ids = made.encode(text).ids
        assert ids == wanted[: len(ids)].tolist() and ids[-1] == tokenizer.eos_id, repr(text)
        assert set(wanted[len(ids) :].tolist()) <= {tokenizer.pad_id}
        if options.get("byte_fallback", True):  # else there are unknown pieces, which are written in two ways
            assert made.decode(ids) == tokenizer.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (made.encode("").ids[0], made.encode("").ids[-1])


def test_it_is_read_here_too() -> None:
    tokenizer = trained()
    again = Tokenizer(tokenizer_json.convert(tokenizer)["tokenizer.json"].encode())
    for key in ("vocab_size", "pad_id", "bos_id", "eos_id"):
        assert getattr(again, key) == getattr(tokenizer, key)
    text = "two  CATS 😀 <s>"
    np.testing.assert_array_equal(again.encode(text, 50), tokenizer.encode(text, 50))
    assert json.loads(tokenizer_json.convert(again)["tokenizer_config.json"])["pad_token"] == "<pad>"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "its kind is not unigram"),
        ({"user_defined_symbols": ["<image>"]}, "it has user-defined or unused pieces"),
        ({"add_dummy_prefix": False}, "it treats blanks in another way"),
        ({"remove_extra_whitespaces": False}, "it treats blanks in another way"),
        ({"normalization_rule_name": "identity"}, "its normalisation is 'identity', not nmt_nfkc or nmt_nfkc_cf"),
        ({"treat_whitespace_as_suffix": True}, "its pieces may hold blanks inside or behind"),
    ],
)
def test_what_cannot_be_converted_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        tokenizer_json.convert(trained(**options))


def test_clips_merges_have_none() -> None:
    with pytest.raises(ConversionError, match=r"has no tokenizer\.json"):
        tokenizer_json.convert(Tokenizer.clip())


def test_a_difference_is_named() -> None:
    tokenizer = trained()
    made = opened(tokenizer)
    made.normalizer = tokenizers.normalizers.Sequence([made.normalizer, tokenizers.normalizers.Lowercase()])
    with pytest.raises(ConversionError, match=r"exactly: 'A Photo OF a Cat\.' is"):
        tokenizer_json.check_ids(made, tokenizer, "not exactly")
