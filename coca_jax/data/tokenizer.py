"""Text <-> token ids, as the text decoder expects them; and training a SentencePiece vocabulary."""

from __future__ import annotations

import importlib.resources
import io
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from coca_jax import config
from coca_jax.data import addresses, opening, vocabulary
from coca_jax.data.records import DataError, check_unicode

# Of the vocabularies trained here. A model from elsewhere keeps its own, read from the file.
PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3


class Tokenizer:
    """A vocabulary with the frame of ids that the text decoder expects: bos, pieces, eos, pad.

    Args:
      model: path of a file (a bucket works), or its bytes: a SentencePiece `.model`; or, for models from elsewhere, a
        Hugging Face `tokenizer.json` or CLIP's `bpe_simple_vocab_16e6.txt.gz`. See coca_jax/data/vocabulary.py.

    Raises:
      DataError: the file is missing, is none of these, or lacks pad, bos or eos.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes):
        if isinstance(model, bytes):
            name, content = "tokenizer", model
        else:
            name = f"tokenizer {os.fspath(model)}"
            try:
                content = opening.read(model, what="a tokenizer")
            except FileNotFoundError:
                raise DataError(
                    f"{name}: no such file; set config.data.tokenizer to a SentencePiece .model file"
                ) from None
            except OSError as error:
                raise DataError(f"{name} cannot be read: {error}") from error
        self._model = content
        self._vocabulary = vocabulary.read(content, name)
        self.vocab_size: int = self._vocabulary.size
        self.pad_id: int = self._vocabulary.pad_id
        self.bos_id: int = self._vocabulary.bos_id
        self.eos_id: int = self._vocabulary.eos_id
        self.normalization: str = self._vocabulary.normalization
        self.file_name: str = self._vocabulary.file_name

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self._model,)  # how worker processes get it

    def encode(
        self, text: str, length: int, *, rng: np.random.Generator | None = None, sampling: float = 0.0
    ) -> np.ndarray:
        """Token ids of one text, int32 `[length]`: bos, pieces, eos, pad. A long text is cut and still ends in eos.

        Args:
          text: what is encoded.
          length: of the result, 3 or more.
          rng: for sampling.
          sampling: 0: the likeliest pieces; above: pieces are drawn, the more freely the nearer it is to 0 (alpha of
            Kudo 2018, arXiv:1804.10959). SentencePiece alone.

        Raises:
          BadExample: the text holds half of a surrogate pair, which the vocabulary cannot read.
        """
        if length < 3:
            raise ValueError(f"length={length} must hold bos, a token and eos: 3 or more")
        if sampling:
            assert rng is not None
            pieces = self._vocabulary.sample(text, rng, sampling)[: length - 2]
        else:
            pieces = self._pieces(text)[: length - 2]
        # np.pad would take several times as long as the encoding itself.
        ids = np.full(length, self.pad_id, np.int32)
        ids[0] = self.bos_id
        ids[1 : len(pieces) + 1] = pieces
        ids[len(pieces) + 1] = self.eos_id
        return ids

    def _pieces(self, text: str) -> list[int]:
        try:
            return self._vocabulary.encode(text)
        except Exception:  # each library has its own; most texts are right, and only a wrong one is looked at twice
            if isinstance(text, str):
                check_unicode([text], "a text for the tokenizer")
            raise

    def encode_prompts(self, texts: Sequence[str]) -> np.ndarray:
        """Beginnings of captions, int32 `[b, p]`: bos, pieces, padding, as long as the longest. Empty ones are bos."""
        pieces = [[self.bos_id, *self._pieces(text)] for text in texts]
        longest = max(map(len, pieces), default=1)
        rows = [row + [self.pad_id] * (longest - len(row)) for row in pieces]
        return np.array(rows, np.int32).reshape(len(rows), longest)

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token ids of several texts, int32 `[b, length]`."""
        return np.stack([self.encode(text, length) for text in texts]) if texts else np.zeros((0, length), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first eos. Control ids, and ids past the vocabulary (of a padded table), are dropped."""
        pieces = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if 0 <= token < self.vocab_size:
                pieces.append(token)
        return self._vocabulary.decode(pieces)

    def check(self, text: config.TextDecoder) -> None:
        """Raises ConfigError where the ids do not fit a text decoder."""
        if self.vocab_size > text.vocab_size:
            raise config.ConfigError(
                f"config.model.text.vocab_size={text.vocab_size} is too small for the tokenizer's {self.vocab_size} "
                "pieces: raise it to that or more"
            )
        if self.pad_id != text.pad_id:
            raise config.ConfigError(
                f"config.model.text.pad_id={text.pad_id}, but the tokenizer pads with {self.pad_id}: set it to that"
            )

    def to_bytes(self) -> bytes:
        """The model file's content; `Tokenizer(these bytes)` is the same tokenizer."""
        return self._model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model file."""
        addresses.path(path).write_bytes(self._model)

    @classmethod
    def clip(cls) -> Tokenizer:
        """The vocabulary of CLIP and of open_clip's published CoCa, which comes with this package (MIT licence).

        Raises:
          DataError: the packages that read it are not installed: `pip install "coca_jax[bpe]"`.
        """
        return cls(importlib.resources.files("coca_jax.data").joinpath(vocabulary.ClipMerges.file_name).read_bytes())

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        path: str | os.PathLike[str] | None = None,
        vocab_size: int = 64_000,
        *,
        max_captions: int = 5_000_000,
    ) -> Tokenizer:
        """Trains a unigram model with byte fallback: any text can be encoded, and decoded again up to NFKC.

        The same captions in the same order give the same model.

        Args:
          captions: the training texts; captions of more than 4,192 bytes are left out by SentencePiece.
          path: where to write the `.model` file; None writes nothing.
          vocab_size: pieces wanted, the 256 bytes and 4 control ids included. Captions that cannot fill it give fewer.
          max_captions: more than this many are subsampled.

        Raises:
          DataError: no captions, or a vocabulary too small for the characters in them.
        """
        out, captions = io.BytesIO(), iter(captions)
        if (first := next(captions, None)) is None:
            raise DataError(f"a vocabulary of vocab_size={vocab_size} could not be trained: there are no captions")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], captions),
                model_writer=out,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                bos_id=BOS_ID,
                unk_id=UNK_ID,
                input_sentence_size=max_captions,
                shuffle_input_sentence=False,
                num_threads=1,  # the sums of several threads differ in the last bit, and so would the vocabulary
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"a vocabulary of vocab_size={vocab_size} could not be trained: {reason}") from error
        tokenizer = cls(out.getvalue())
        if path is not None:
            tokenizer.save(path)
        return tokenizer
