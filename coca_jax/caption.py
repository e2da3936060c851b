"""Captions pictures.

    python -m coca_jax.caption photos/ more/cat.jpg --checkpoint=runs/mine --output=captions.jsonl
    python -m coca_jax.caption photos/ --checkpoint=runs/mine --output=captions.jsonl --method=beam --returns=3 --rerank

Each line of the output is a picture: its path, and its captions, the best first, with log-probability (nats), the score
that they are ranked by and the cosine similarity with the picture. A path that ends in .parquet makes a folder of
Parquet files instead. Started again, it goes on where it stopped. Pictures that cannot be read are listed in
OUTPUT.bad.jsonl; to try them again, remove it.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
from absl import flags

from coca_jax import commandline, compiler

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "What coca_jax.load opens: a workdir, an exported directory, ...")
_OUTPUT = flags.DEFINE_string("output", "", "File that ends in .jsonl, or a folder's name that ends in .parquet.")
_PROMPT = flags.DEFINE_string("prompt", "", "What every caption begins with.")
_RERANK = flags.DEFINE_bool("rerank", False, "Rank by similarity with the picture, not by likelihood.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures that are computed at a time.", lower_bound=1)
_METHOD = flags.DEFINE_enum("method", "greedy", ["greedy", "sample", "beam"], "How the next token is chosen.")
# Where one is left out, generate.Options says what holds: importing it here would load JAX before --help.
_OPTIONS = [
    flags.DEFINE_integer("returns", None, "Captions of each picture (sample, beam). Default 1."),
    flags.DEFINE_integer("length", None, "Tokens of a caption at most. Default: as many as the model has positions."),
    flags.DEFINE_integer("min_length", None, "Tokens of a caption at least."),
    flags.DEFINE_float("temperature", None, "Of sampling. Default 1."),
    flags.DEFINE_integer("top_k", None, "Sampling is among so many of the likeliest tokens. Default 0: all."),
    flags.DEFINE_float("top_p", None, "Sampling is among the likeliest tokens of this probability. Default 1: all."),
    flags.DEFINE_integer("beams", None, "Of beam search. Default 6."),
    flags.DEFINE_float("length_penalty", None, "Beam search ranks by log-probability / length ** this. Default 1."),
    flags.DEFINE_float("repetition_penalty", None, "Above 1, tokens that were used become unlikelier. Default 1."),
    flags.DEFINE_integer("no_repeat_ngram", None, "No run of so many tokens comes twice. Default 0: off."),
]


def main(argv: list[str]) -> None:
    for flag in (_CHECKPOINT, _OUTPUT):
        if not flag.value:
            sys.exit(f"error: --{flag.name}=PATH is needed; --help says what it may be")
    if len(argv) < 2:
        sys.exit("error: name pictures or folders of pictures: python -m coca_jax.caption PICTURE_OR_FOLDER ...")
    options: dict[str, Any] = {"method": _METHOD.value} | {
        flag.name: flag.value for flag in _OPTIONS if flag.value is not None
    }
    compiler.setup()
    commandline.quiet()
    with commandline.starting():
        from coca_jax import pictures, pretrained
        from coca_jax.config import ConfigError
        from coca_jax.data.records import DataError
        from coca_jax.generate import Options
        from coca_jax.interop.weights import ConversionError
        from coca_jax.train.checkpoint import CheckpointError

    try:
        pictures.open_rows(_OUTPUT.value)
        paths = pictures.find(argv[1:])
        coca = pretrained.load(_CHECKPOINT.value)
        Options(**options).check(coca.config.model.text.length)
        how = options | {"prompt": _PROMPT.value, "rerank": _RERANK.value, "seed": _SEED.value}

        def compute(pixels: np.ndarray, numbers: list[int]) -> list[dict[str, Any]]:
            found = coca.caption_pixels(pixels, numbers=numbers, batch_size=_BATCH_SIZE.value, **how)
            return [{"captions": [dataclasses.asdict(caption) for caption in captions]} for captions in found]

        with pictures.begun(_OUTPUT.value, _CHECKPOINT.value, coca, **how):
            said = pictures.run(
                paths,
                coca.preprocessor,
                compute,
                _OUTPUT.value,
                batch_size=_BATCH_SIZE.value,
                description="captions",
            )
        print(said)
    except (DataError, ConversionError, CheckpointError, ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(commandline.stopped(pictures.STOPPED))


if __name__ == "__main__":
    commandline.run(main)
