"""Text <-> token ids: a SentencePiece model with the ids that the text decoder expects."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from etils import epath

from coca_jax.data.records import DataError

# Of the vocabularies trained here. A model from elsewhere keeps its own, read from the file.
PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3


class Tokenizer:
    """A SentencePiece model.

    Args:
      model: path of a `.model` file (a bucket works), or its bytes.

    Raises:
      DataError: the file is missing, is not a SentencePiece model, or lacks pad, bos or eos.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes):
        if isinstance(model, bytes):
            name, content = "tokenizer", model
        else:
            name, path = f"tokenizer {os.fspath(model)}", epath.Path(model)
            if not path.is_file():
                raise DataError(f"{name}: no such file; set config.data.tokenizer to a SentencePiece .model file")
            content = path.read_bytes()
        self._model = content
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(content) and self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise DataError(f"{name}: {len(content)} bytes that are not a SentencePiece model; train or copy it again")
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        for what in ("pad_id", "bos_id", "eos_id"):
            if getattr(self, what) < 0:
                raise DataError(f"{name}: the SentencePiece model has no {what}; train it with {what} set, 0 or more")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self._model,)  # how worker processes get it

    def encode(self, text: str, length: int) -> np.ndarray:
        """Token ids of one text, int32 `[length]`: bos, pieces, eos, pad. A long text is cut and still ends in eos."""
        if length < 3:
            raise ValueError(f"length={length} must hold bos, a token and eos: 3 or more")
        pieces = self._processor.encode(text)[: length - 2]
        # np.pad would take several times as long as the encoding itself.
        ids = np.full(length, self.pad_id, np.int32)
        ids[0] = self.bos_id
        ids[1 : len(pieces) + 1] = pieces
        ids[len(pieces) + 1] = self.eos_id
        return ids

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token ids of several texts, int32 `[b, length]`."""
        return np.stack([self.encode(text, length) for text in texts]) if texts else np.zeros((0, length), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first eos. Control ids, and ids past the vocabulary (of a padded table), are dropped."""
        pieces = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if 0 <= token < self.vocab_size and not self._processor.IsControl(token):
                pieces.append(token)
        return self._processor.decode(pieces)

    def to_bytes(self) -> bytes:
        """The model file's content; `Tokenizer(these bytes)` is the same tokenizer."""
        return self._model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model file."""
        epath.Path(path).write_bytes(self._model)

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
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
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
