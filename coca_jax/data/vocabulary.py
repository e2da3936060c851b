"""The vocabularies that a tokenizer can be made of: SentencePiece, a Hugging Face tokenizer.json, and CLIP's merges.

Which one a file is, is seen by its content. The last two are for models that come from elsewhere, and need
`pip install "coca_jax[bpe]"`.
"""

from __future__ import annotations

import gzip
import html
import importlib
import io
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from coca_jax.data.records import DataError


class Vocabulary(Protocol):
    """Text <-> pieces, without bos, eos and padding.

    Attributes:
      size: ids are 0 .. size - 1.
      pad_id, bos_id, eos_id: of padding, beginning and end.
      normalization: what is done to a text before it is cut into pieces, for people.
      file_name: that other people's tools look for.
    """

    size: int
    pad_id: int
    bos_id: int
    eos_id: int
    normalization: str
    file_name: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids within the vocabulary, control ids left out."""
        ...

    def sample(self, text: str, rng: np.random.Generator, alpha: float) -> list[int]:
        """Pieces drawn among ways to cut the text. Raises DataError where there is only one."""
        ...


def read(content: bytes, name: str) -> Vocabulary:
    """The vocabulary that a file holds.

    Args:
      content: of a SentencePiece `.model`, a `tokenizer.json`, or `bpe_simple_vocab_16e6.txt.gz`.
      name: for messages.

    Raises:
      DataError: it is none of them, lacks pad, bos or eos, or needs a package that is not installed.
    """
    if content[:2] == b"\x1f\x8b":
        return ClipMerges(content, name)
    if content.lstrip()[:1] == b"{":
        return HuggingFace(content, name)
    return SentencePiece(content, name)


class SentencePiece:
    """A SentencePiece model, with the control ids that it was trained with."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, name: str):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(content) and self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeDecodeError):  # the second where its message quotes a piece that is no UTF-8
            loaded = False
        if not loaded:
            raise DataError(
                f"{name}: {len(content)} bytes that are not a SentencePiece model (nor a tokenizer.json, nor CLIP's "
                "merges); train or copy it again"
            )
        self.size = self._processor.vocab_size()
        self.pad_id, self.bos_id, self.eos_id = (
            getattr(self._processor, what)() for what in ("pad_id", "bos_id", "eos_id")
        )
        for what in ("pad_id", "bos_id", "eos_id"):
            if getattr(self, what) < 0:
                raise DataError(f"{name}: the SentencePiece model has no {what}; train it with {what} set, 0 or more")
        self.normalization = "the SentencePiece model's own: NFKC with its default, case kept"

    def encode(self, text: str) -> list[int]:
        pieces: list[int] = self._processor.encode(text)
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([i for i in ids if not self._processor.IsControl(i)])
        return text

    def sample(self, text: str, rng: np.random.Generator, alpha: float, among: int = 64) -> list[int]:
        """One of the `among` likeliest ways, each with a probability in proportion to its own to the power of alpha.

        After Kudo 2018 (arXiv:1804.10959, section 3.3). SentencePiece's own sampling has a random generator for each
        thread, so that no example could be made again.
        """
        ways: list[list[int]] = self._processor.NBestEncode(text, nbest_size=among, out_type=int)
        # The logarithm of a way's probability is the sum of its pieces' scores. What is spelt in bytes is the same in
        # all of them.
        scores = alpha * np.array([sum(map(self._processor.GetScore, way)) for way in ways], np.float64)
        weights = np.exp(scores - scores.max())
        return ways[int(rng.choice(len(ways), p=weights / weights.sum()))]


# The control pieces of a tokenizer.json, by the names that such files use. One without padding pads with its end.
_CONTROL = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<start_of_text>", "<|startoftext|>", "<|begin_of_text|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "[EOS]", "<end_of_text>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
}


class HuggingFace:
    """A `tokenizer.json` of the tokenizers library. Special tokens in a text are text."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, name: str):
        library = _need("tokenizers", name)
        try:
            self._tokenizer = library.Tokenizer.from_str(content.decode())
            described = json.loads(content)
        except BaseException as error:  # the library raises bare Exception, and where Rust panics what is not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{name}: not a tokenizer.json of the tokenizers library: {reason}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        found: dict[str, int] = {}
        for what, names in _CONTROL.items():
            ids = [number for n in names if (number := self._tokenizer.token_to_id(n)) is not None]
            if ids:
                found[what] = ids[0]
            elif what != "pad":
                raise DataError(f"{name}: has no token for {what}: none of {', '.join(names)}")
        self.bos_id, self.eos_id = found["bos"], found["eos"]
        padding = described.get("padding") or {}
        self.pad_id = found["pad"] if "pad" in found else int(padding.get("pad_id", self.eos_id))
        self._control = {self.pad_id, self.bos_id, self.eos_id}
        self._control |= {t["id"] for t in described.get("added_tokens") or () if t.get("special")}
        normalizer = described.get("normalizer") or {}
        self.normalization = f"the tokenizer.json's own: {normalizer.get('type', 'none')}"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([i for i in ids if i not in self._control], skip_special_tokens=False)
        return text

    def sample(self, text: str, rng: np.random.Generator, alpha: float) -> list[int]:
        raise DataError("config.data.subword_sampling needs a SentencePiece model, not a tokenizer.json: set it to 0")


class ClipMerges:
    """CLIP's byte-pair encoding, as OpenAI's and open_clip's `bpe_simple_vocab_16e6.txt.gz` holds it.

    Texts are mended (ftfy), HTML entities resolved, white space made single blanks, and lowered, as open_clip does.
    Ids are open_clip's: 256 bytes, 256 bytes that end a word, one for each merge, begin, end. Padding is 0, which is
    also the piece "!". `<start_of_text>` in a text is text.
    """

    file_name = "bpe_simple_vocab_16e6.txt.gz"
    _MERGES = 49152 - 256 - 2  # of the file's, which holds more
    _LARGEST = 1 << 24  # bytes, unpacked; the file's are 3 million
    _SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

    def __init__(self, content: bytes, name: str):
        library, self._ftfy = _need("tokenizers", name), _need("ftfy", name)
        try:
            with gzip.open(io.BytesIO(content)) as file:
                unpacked = file.read(self._LARGEST + 1)
            if len(unpacked) > self._LARGEST:
                raise ValueError(f"more than {self._LARGEST} bytes")
            lines = unpacked.decode().split("\n")[1 : self._MERGES + 1]
            merges = [(first, second) for first, second in (line.split() for line in lines if line)]
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"{name}: not CLIP's merges, a gzipped text of pairs: {error}") from error
        letters = _byte_letters()
        pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        pre = library.pre_tokenizers
        try:
            model = library.models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: not CLIP's merges: {error}") from error
        self._tokenizer = library.Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre.Sequence(
            [
                pre.Split(library.Regex(self._SPLIT), behavior="removed", invert=True),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._pieces, self._bytes = pieces, {letter: byte for byte, letter in _letters_of_bytes().items()}
        self.size = len(pieces) + 2
        self.pad_id, self.bos_id, self.eos_id = 0, len(pieces), len(pieces) + 1
        self.normalization = "ftfy, HTML entities, white space to single blanks, lower case"

    def encode(self, text: str) -> list[int]:
        mended = html.unescape(html.unescape(self._ftfy.fix_text(text)))
        ids: list[int] = self._tokenizer.encode(re.sub(r"\s+", " ", mended).strip().lower()).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        words = "".join(self._pieces[i] for i in ids if i < len(self._pieces)).replace("</w>", " ")
        data = b"".join(b" " if letter == " " else bytes([self._bytes[letter]]) for letter in words)
        return data.decode("utf-8", errors="replace").strip()

    def sample(self, text: str, rng: np.random.Generator, alpha: float) -> list[int]:
        raise DataError("config.data.subword_sampling needs a SentencePiece model, not CLIP's merges: set it to 0")


def _letters_of_bytes() -> dict[int, str]:
    """Byte -> the printable letter that stands for it (GPT-2's byte-level BPE, Radford et al. 2019, section 2.2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _byte_letters() -> list[str]:
    """The 256 letters in the order of CLIP's ids: the plain ones first."""
    return list(_letters_of_bytes().values())


def _need(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f'{name}: {package} is not installed, which reads it: pip install "coca_jax[bpe]"') from error
