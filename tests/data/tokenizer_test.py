"""The real SentencePiece, trained on the spot."""

from __future__ import annotations

import io
import pickle
import re

import numpy as np
import pytest
import sentencepiece

from coca_jax.data.records import BadExample, DataError
from coca_jax.data.tokenizer import Tokenizer

CAPTIONS = [
    f"{who} {what}" for who in ("a man", "a woman", "two children") for what in ("running", "rowing a boat")
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=320)


def test_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert 260 < tokenizer.vocab_size <= 320


def test_encode_is_bos_pieces_eos_pad(tokenizer):
    ids = tokenizer.encode("a man running", 24)
    assert ids.dtype == np.int32
    assert ids.shape == (24,)
    assert ids[0] == tokenizer.bos_id
    (end,) = np.flatnonzero(ids == tokenizer.eos_id)
    assert (ids[end + 1 :] == tokenizer.pad_id).all()
    assert not np.isin(ids[1:end], (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)).any()


@pytest.mark.parametrize("text", ["two children rowing a boat", "Größe 漢字 🙂 Ω", "x" * 50, "1 < 2 & <s> </s> <pad>"])
def test_decode_inverts_encode(tokenizer, text):
    # Byte fallback: also letters that the captions never had; "<s>" in a text is text.
    ids = tokenizer.encode(text, 120)
    assert tokenizer.decode(ids) == text
    assert np.count_nonzero(ids == tokenizer.eos_id) == 1


def test_truncation_keeps_eos(tokenizer):
    whole = tokenizer.encode("a woman rowing a boat", 64)
    cut = tokenizer.encode("a woman rowing a boat", 5)
    assert cut[-1] == tokenizer.eos_id
    np.testing.assert_array_equal(cut[:4], whole[:4])


def test_length_must_hold_a_token(tokenizer):
    with pytest.raises(ValueError, match="length=2 must hold"):
        tokenizer.encode("a man", 2)


def test_empty_text(tokenizer):
    assert tokenizer.encode("", 5).tolist() == [2, 1, 0, 0, 0]
    assert tokenizer.decode([2, 1, 0, 0, 0]) == ""


@pytest.mark.parametrize("wrong", ["\udcff", "a man \ud83d", "\ude42\ud83d"])
def test_half_of_a_surrogate_pair_is_refused_with_its_text(tokenizer, wrong):
    for encode in (lambda texts: tokenizer.encode_batch(texts, 24), tokenizer.encode_prompts):
        assert len(encode(["a man", "🙂"])) == 2
        with pytest.raises(BadExample, match=re.escape(f"{wrong!r} is not Unicode: surrogates not allowed")):
            encode(["a man", wrong])


def test_decode_stops_at_the_first_eos_and_drops_what_is_no_text(tokenizer):
    man, woman = (tokenizer.encode(text, 20) for text in ("a man", "a woman"))
    assert tokenizer.decode([*man, *woman]) == "a man"
    body = man[1 : man.tolist().index(tokenizer.eos_id)]
    assert tokenizer.decode([0, 2, *body, tokenizer.vocab_size, tokenizer.vocab_size + 7]) == "a man"


def test_batch_is_its_rows(tokenizer):
    texts = ["a man running", "", "two children"]
    batch = tokenizer.encode_batch(texts, 12)
    assert batch.dtype == np.int32
    for row, text in zip(batch, texts, strict=True):
        np.testing.assert_array_equal(row, tokenizer.encode(text, 12))
    assert tokenizer.encode_batch([], 12).shape == (0, 12)
    assert tokenizer.encode_prompts([]).shape == (0, 1)


def test_the_same_from_file_bytes_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    wanted = tokenizer.encode("a man rowing", 16)
    for other in (
        Tokenizer(tmp_path / "t.model"),
        Tokenizer(str(tmp_path / "t.model")),
        Tokenizer(tokenizer.to_bytes()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.to_bytes() == tokenizer.to_bytes()
        np.testing.assert_array_equal(other.encode("a man rowing", 16), wanted)


def test_training_is_repeatable(tokenizer, tmp_path):
    again = Tokenizer.train(iter(CAPTIONS), tmp_path / "t.model", vocab_size=320)
    assert again.to_bytes() == tokenizer.to_bytes() == (tmp_path / "t.model").read_bytes()


def test_a_vocabulary_that_captions_cannot_fill_is_smaller():
    assert Tokenizer.train(CAPTIONS, vocab_size=5000).vocab_size < 400


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"missing\.model: no such file; set config\.data\.tokenizer"):
        Tokenizer(tmp_path / "missing.model")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model at all"])
def test_corrupt_file(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.model: {len(content)} bytes that are not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_truncated_file(tokenizer, tmp_path):
    (tmp_path / "cut.model").write_bytes(tokenizer.to_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cut\.model"):
        Tokenizer(tmp_path / "cut.model")


def test_model_without_pad():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=out, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(DataError, match="has no pad_id"):
        Tokenizer(out.getvalue())


@pytest.mark.parametrize("captions, size, why", [([], 300, "there are no captions"), (CAPTIONS, 100, "")])
def test_training_that_cannot_work(captions, size, why):
    with pytest.raises(DataError, match=f"vocab_size={size} could not be trained: {why}"):
        Tokenizer.train(captions, vocab_size=size)
