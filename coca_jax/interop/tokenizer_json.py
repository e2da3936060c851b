"""A vocabulary as a `tokenizer.json`, which the transformers library opens: exactly, or not at all."""

from __future__ import annotations

import importlib
import json
from typing import Any

from coca_jax.data.records import DataError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.data.vocabulary import SentencePiece
from coca_jax.interop.weights import ConversionError

# SentencePiece's default, and that with lower case.
_NORMALIZATIONS = ("nmt_nfkc", "nmt_nfkc_cf")

# Compared id for id before a conversion is believed, with every piece of the vocabulary beside them.
PROBES = (
    *(
        "",
        " ",
        "a",
        "a red apple",
        "  two  blanks  ",
        "A Photo OF a Cat.",
        "tab\tnew\nline",
        "1,234.5 + 67 = 8",
        "don't",
    ),
    *(
        "ﬁne ½ ① \uff21",
        "naïve café",
        "nai\u0308ve cafe\u0301",
        "Ελληνικά",
        "русский текст",
        "中文字符",
        "日本語 テキスト",
        "한국어",
    ),
    *(
        "עברית",
        "العربية",
        "हिन्दी",
        "ไทย",
        "😀",
        "👩‍👩‍👧 🇫🇷",
        "a😀b",
        "\u200bzero\u200dwidth",
        "soft\u00adhyphen",
        "\u00a0nbsp\u3000",
    ),
    *("½\u0301 A\u030b \u00a0\u0301", "y\u0308\u094d", "か\u3099", "\u1112\u1161\u11ab", "\x85", "a\r\nb"),
    *("▁", "a▁b", "<s>", "</s> x", "a <pad> b", "<unk>", "<0x41>", "<0xZZ>", "x<s>y", "<|endoftext|>", "[CLS]"),
    *(
        "http://a.b/c?d=e&f#g",
        "emoji: :)",
        "ẞß",
        "İi",
        "\ufeffbom",
        "\x00\x01",
        "\U0001d518\U0001d52b\U0001d526",
        "\U0001f9d1\U0001f3fd",
        "a long text " * 20,
        "q " * 50,
    ),
)


def convert(tokenizer: Tokenizer) -> dict[str, str]:
    """A tokenizer as the files that transformers' AutoTokenizer opens, by name.

    Their ids of a text, framed by bos and eos, are those of `tokenizer` before padding.

    Args:
      tokenizer: of a SentencePiece model (unigram, as all that are trained here), or of a tokenizer.json.

    Returns:
      Contents of `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    Raises:
      ConversionError: it cannot be converted exactly; the first text whose ids would differ is named.
    """
    library = _library()
    content = tokenizer.to_bytes()
    if tokenizer.file_name == SentencePiece.file_name:
        made, names = _from_sentencepiece(library, content)
    elif tokenizer.file_name == "tokenizer.json":
        made = library.Tokenizer.from_str(content.decode())
        names = {what: made.id_to_token(getattr(tokenizer, f"{what}_id")) for what in ("pad", "bos", "eos")}
        made.no_padding()
        made.no_truncation()
    else:
        raise ConversionError(f"{tokenizer.file_name} has no tokenizer.json")
    made.post_processor = library.processors.TemplateProcessing(
        single=f"{names['bos']}:0 $A:0 {names['eos']}:0",
        special_tokens=[(names[what], getattr(tokenizer, f"{what}_id")) for what in ("bos", "eos")],
    )
    check_ids(made, tokenizer, "the vocabulary cannot be converted to a tokenizer.json exactly")
    special = {f"{what}_token": name for what, name in names.items()}
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "padding_side": "right",
        "truncation_side": "right",
        # A text that spells a control piece is a text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": made.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(described, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }


def check_ids(made: Any, tokenizer: Tokenizer, summary: str) -> None:
    """Raises ConversionError unless a `tokenizers.Tokenizer` gives bos, our pieces, eos for every probe."""
    made.encode_special_tokens = True  # what split_special_tokens of the configuration does
    pieces = [made.id_to_token(i) or "" for i in range(min(tokenizer.vocab_size, 1000))]
    for text in (*PROBES, *pieces, " ".join(pieces)):
        length = 8 * len(text.encode()) + 8  # all of it, whatever it normalises to
        ids = tokenizer.encode(text, length)
        wanted = ids[: next(i for i in range(1, length) if ids[i] == tokenizer.eos_id) + 1].tolist()
        if (found := made.encode(text).ids) != wanted:
            raise ConversionError(f"{summary}: {text!r} is {found}, and here {wanted}")


def framed(content: bytes, tokenizer: Tokenizer, name: str) -> None:
    """Raises ConversionError unless a tokenizer.json itself frames texts as `tokenizer` does: bos, pieces, eos."""
    made = _library().Tokenizer.from_str(content.decode())
    made.no_padding()
    made.no_truncation()
    check_ids(made, tokenizer, f"{name} does not frame texts by bos and eos, as models here are trained with")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError('tokenizers is not installed, which makes it: pip install "coca_jax[bpe]"') from error
    return tokenizers


def _from_sentencepiece(library: Any, content: bytes) -> tuple[Any, dict[str, str]]:
    """The same pieces, scores and normalisation; and the names of pad, bos and eos.

    The same but for several accents on one letter that are not in Unicode's order, accents behind a ligature, and texts
    that can be cut in several equally likely ways (one letter many times over).

    As SentencePiece does (Kudo and Richardson 2018, arXiv 1808.06226): normalise by the precompiled table, make runs of
    blanks one and drop those around, write a blank as U+2581 with one in front, take the likeliest pieces, spell in
    bytes what has none.
    """
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # it has no types
    proto = messages.ModelProto()
    proto.ParseFromString(content)
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    reasons = []
    if trainer.model_type != trainer.UNIGRAM:
        reasons.append("its kind is not unigram")
    if any(piece.type in (kinds.USER_DEFINED, kinds.UNUSED) for piece in proto.pieces):
        reasons.append("it has user-defined or unused pieces")
    if not (normalizer.add_dummy_prefix and normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces):
        reasons.append("it treats blanks in another way than SentencePiece's default")
    if normalizer.name not in _NORMALIZATIONS:
        reasons.append(f"its normalisation is {normalizer.name!r}, not {' or '.join(_NORMALIZATIONS)}")
    if trainer.treat_whitespace_as_suffix or not trainer.split_by_whitespace:
        reasons.append("its pieces may hold blanks inside or behind")
    if reasons:
        raise ConversionError("this SentencePiece model cannot be converted to a tokenizer.json:", reasons)
    names = {what: proto.pieces[getattr(trainer, f"{what}_id")].piece for what in ("pad", "bos", "eos")}
    # There, the names of control pieces and of bytes are no pieces that a text can have. Here they are, and must never
    # be the likelier. That makes unknown letters as unlikely, which decides nothing: no piece holds one.
    normal = [piece for piece in proto.pieces if piece.type == kinds.NORMAL]
    never = min(piece.score for piece in normal) - 10_000.0
    letters = sorted({piece.piece for piece in normal if len(piece.piece) == 1} | {"▁"})
    if not {letter for piece in normal for letter in piece.piece} <= set(letters):
        raise ConversionError("this SentencePiece model has pieces of letters that are none themselves")
    model = library.models.Unigram(
        [(piece.piece, piece.score if piece.type == kinds.NORMAL else never) for piece in proto.pieces],
        trainer.unk_id,
        trainer.byte_fallback,
    )
    made = library.Tokenizer(model)
    norm, pre, decoders = library.normalizers, library.pre_tokenizers, library.decoders
    made.normalizer = norm.Sequence(
        [
            # There, the table is applied to one user-perceived character at a time, and all of one is replaced by what
            # its first letter becomes: accents are lost behind what the table has. U+0001, which the table drops, cuts
            # them into letters; what letters the table would have joined, NFC does.
            norm.Replace(library.Regex(r"(?<=.)(?=[^\x00-\x7F])|(?<=[^\x00-\x7F])(?=.)"), "\x01"),
            norm.Precompiled(normalizer.precompiled_charsmap),
            norm.NFC(),
            norm.Replace(library.Regex(" {2,}"), " "),
            norm.Replace(library.Regex("^ +| +$"), ""),
        ]
    )
    unknown = "[^" + "".join(f"\\x{{{ord(x):x}}}" for x in letters) + "]"
    made.pre_tokenizer = pre.Sequence(
        [
            pre.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            # So that a name with an unknown letter in it is none either. Unknown letters in a row are one unknown
            # piece, but with bytes they are each spelled: there, a row of them could itself be a byte's name.
            pre.Split(library.Regex(unknown if trainer.byte_fallback else f"{unknown}+"), behavior="isolated"),
        ]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([names[what] for what in ("pad", "bos", "eos")])
    return made, names
