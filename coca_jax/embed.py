"""Features of pictures or of texts: vectors of unit length, whose products are cosine similarities.

    python -m coca_jax.embed photos/ --checkpoint=runs/mine --output=pictures.parquet
    python -m coca_jax.embed --texts=sentences.txt --checkpoint=runs/mine --output=sentences.jsonl

Each row of the output is a picture with its `path` (or a line of the text file with its `text`), and its `feature`,
float32. A path that ends in .parquet makes a folder of Parquet files, .jsonl a file of JSON lines. Started again, it
goes on where it stopped. Pictures that cannot be read are listed in OUTPUT.bad.jsonl; to try them again, remove it.
"""

from __future__ import annotations

import sys

from absl import flags

from coca_jax import commandline, compiler

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "What coca_jax.load opens: a workdir, an exported directory, ...")
_OUTPUT = flags.DEFINE_string("output", "", "File that ends in .jsonl, or a folder's name that ends in .parquet.")
_TEXTS = flags.DEFINE_string("texts", "", "File of texts, one a line, instead of pictures.")
_MAX_TEXTS = 4 << 30  # bytes
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Rows that are computed at a time.", lower_bound=1)


def main(argv: list[str]) -> None:
    for flag in (_CHECKPOINT, _OUTPUT):
        if not flag.value:
            sys.exit(f"error: --{flag.name}=PATH is needed; --help says what it may be")
    if bool(_TEXTS.value) == (len(argv) > 1):
        sys.exit("error: name pictures or folders of pictures, or give --texts=FILE, one of the two")
    compiler.setup()
    commandline.quiet()
    with commandline.starting():
        from coca_jax import pictures, pretrained
        from coca_jax.config import ConfigError
        from coca_jax.data.records import DataError
        from coca_jax.interop.weights import ConversionError
        from coca_jax.train.checkpoint import CheckpointError

    try:
        pictures.open_rows(_OUTPUT.value)
        texts = _lines(_TEXTS.value) if _TEXTS.value else None
        paths = pictures.find(argv[1:]) if texts is None else []
        coca = pretrained.load(_CHECKPOINT.value)
        if coca.config.model.bridge.stage == 1 and _OUTPUT.value.endswith(".parquet") and texts is None:
            raise ValueError(f"--output={_OUTPUT.value}: a bridge gives a picture several features: name a .jsonl file")
        with pictures.begun(_OUTPUT.value, _CHECKPOINT.value, coca, texts=_TEXTS.value):
            if texts is None:
                said = pictures.embed(paths, coca, _OUTPUT.value, batch_size=_BATCH_SIZE.value)
            else:
                said = pictures.embed_texts(texts, coca, _OUTPUT.value, batch_size=_BATCH_SIZE.value)
        print(said)
    except (DataError, ConversionError, CheckpointError, ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(commandline.stopped(pictures.STOPPED))


def _lines(path: str) -> list[str]:
    from coca_jax.data import opening
    from coca_jax.data.records import DataError

    try:
        # Not splitlines, which also ends lines at U+2028, U+0085 and others that stand inside of texts.
        lines = opening.read_text(path, _MAX_TEXTS, "a file of texts").split("\n")
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    except FileNotFoundError:
        raise DataError(f"--texts={path}: no such file") from None
    except (OSError, DataError) as error:
        raise DataError(f"--texts={path}: {error}") from error


if __name__ == "__main__":
    commandline.run(main)
