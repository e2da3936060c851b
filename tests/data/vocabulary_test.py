"""Vocabularies from elsewhere, and drawn pieces."""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
import pickle
import re

import numpy as np
import pytest
import tokenizers

from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer

CAPTIONS = ["a man running in the rain", "two dogs running", "the dog's ball, 3 years old"] * 4

# ---------------------------------------------------------------------------------------------------------------------
# CLIP's merges


def clip_file(*merges: str) -> bytes:
    return gzip.compress("\n".join(["#version: 0.2", *merges, ""]).encode())


def reference(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding as its definition goes: of all pairs in a word the first in the list is joined, again."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(set(range(256)) - set(plain))}
    found = []
    for word in re.findall(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        pieces = [letters[b] for b in word.encode()]
        pieces[-1] += "</w>"
        while pairs := [p for p in merges if p in list(itertools.pairwise(pieces))]:
            first, second = pairs[0]
            at = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == (first, second))
            pieces[at : at + 2] = [first + second]
        found += pieces
    return found


MERGES = [
    ("t", "h"),
    ("th", "e</w>"),
    ("d", "o"),
    ("n", "n"),
    ("i", "n"),
    ("in", "g</w>"),
    ("'", "s</w>"),
    ("do", "g</w>"),
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer(clip_file(*(" ".join(pair) for pair in MERGES)))


@pytest.mark.parametrize("text", [*CAPTIONS[:3], "The DOGS, the dog's: 42!?", "running dining inn", "x\t\n y"])
def test_clips_merges_are_byte_pair_encoding(clip: Tokenizer, text: str) -> None:
    ids = clip.encode(text, 64)
    pieces = reference(text, MERGES)
    assert ids[0] == clip.bos_id == 512 + len(MERGES) and clip.eos_id == clip.bos_id + 1 == clip.vocab_size - 1
    assert ids[len(pieces) + 1] == clip.eos_id and not ids[len(pieces) + 2 :].any()
    order = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    order += [chr(256 + n) for n in range(68)]
    vocabulary = [*order, *(letter + "</w>" for letter in order), *(a + b for a, b in MERGES)]
    assert [vocabulary[i] for i in ids[1 : len(pieces) + 1]] == pieces


@pytest.mark.parametrize("text", ["größe 漢字 🙂", "the dog 's ball"])
def test_any_text_comes_back_in_lower_case(clip: Tokenizer, text: str) -> None:
    assert clip.decode(clip.encode(text, 80)) == text


def test_texts_are_mended_as_open_clip_does(clip: Tokenizer) -> None:
    same = [("&amp;lt;b&amp;gt;", "<b>"), ("sâ€™il", "s'il"), ("A  B\n\tc ", "a b c")]
    for raw, mended in same:
        np.testing.assert_array_equal(clip.encode(raw, 40), clip.encode(mended, 40))
    # What looks like a control piece is text.
    assert np.count_nonzero(clip.encode("<end_of_text>", 40) == clip.eos_id) == 1


# As open_clip_torch 3.3.0 gives them (SimpleTokenizer), on 2026-11-24.
RECORDED = json.loads((pathlib.Path(__file__).parent / "clip_ids.json").read_text())


def test_the_real_merges_give_open_clips_ids() -> None:
    tokenizer = Tokenizer.clip()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49408, 49406, 49407, 0)
    for text, wanted in RECORDED.items():
        ids = tokenizer.encode(text, 200)
        assert ids[: len(wanted) + 2].tolist() == [49406, *wanted, 49407], text


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def json_file(special: list[str], normalizer: bool = False) -> bytes:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=special[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        made.normalizer = tokenizers.normalizers.Lowercase()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CAPTIONS, trainer)
    made.enable_padding(length=99)
    made.enable_truncation(3)
    return made.to_str().encode()


def test_a_tokenizer_json(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(json_file(["<pad>", "<s>", "</s>"]))
    tokenizer = Tokenizer(path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    text = "two dogs running </s> <pad> größe"
    ids = tokenizer.encode(text, 80)
    # Control pieces in a text are text, and the file's own padding and truncation are not used.
    assert ids[0] == 1 and np.count_nonzero(ids == 2) == 1 and ids[-1] == 0
    assert tokenizer.decode(ids) == text
    cut = tokenizer.encode(text, 6)
    assert cut[-1] == 2 and cut[:5].tolist() == ids[:5].tolist()
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again.encode(text, 80), ids)
    assert "none" in tokenizer.normalization
    lowering = Tokenizer(json_file(["[PAD]", "[CLS]", "[SEP]"], normalizer=True))
    assert lowering.decode(lowering.encode("Two DOGS", 40)) == "two dogs" and "Lowercase" in lowering.normalization


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json_file(["<pad>", "<s>"]), "has no token for eos: none of </s>, <eos>"),
        (b'{"version": "1.0"}', "not a tokenizer.json of the tokenizers library"),
        (b"{", "not a tokenizer.json"),
        (b"\x1f\x8b\x08 no gzip", "not CLIP's merges, a gzipped text of pairs"),
        (gzip.compress(b"#version\na b c\n"), "not CLIP's merges"),
        (gzip.compress(b"#version\nqq zz\n"), "not CLIP's merges"),
        (gzip.compress(bytes(1 << 25)), "more than 16777216 bytes"),
        (b"no vocabulary", "not a SentencePiece model (nor a tokenizer.json, nor CLIP's merges)"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_vocabulary_is_said(tmp_path: pathlib.Path, content: bytes, said: str) -> None:
    path = tmp_path / "vocabulary"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        Tokenizer(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Drawn pieces


def test_pieces_are_drawn_by_the_rng_alone() -> None:
    tokenizer = Tokenizer.train(CAPTIONS * 3, vocab_size=330)
    text = "a man running in the rain"
    likeliest = tokenizer.encode(text, 40)

    def drawn(seed: int, alpha: float) -> list[int]:
        return tokenizer.encode(text, 40, rng=np.random.default_rng(seed), sampling=alpha).tolist()

    ways = {tuple(drawn(seed, 0.2)) for seed in range(20)}
    assert len(ways) > 3 and all(tokenizer.decode(way) == text for way in ways)
    assert drawn(7, 0.2) == drawn(7, 0.2)
    # The larger alpha, the likelier is the likeliest way.
    assert {tuple(drawn(seed, 50.0)) for seed in range(20)} == {tuple(likeliest.tolist())}
    assert tokenizer.encode("", 5, rng=np.random.default_rng(0), sampling=0.2).tolist() == [2, 1, 0, 0, 0]


def test_only_sentencepiece_draws(clip: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"config\.data\.subword_sampling needs a SentencePiece model"):
        clip.encode("a dog", 9, rng=np.random.default_rng(0), sampling=0.1)
