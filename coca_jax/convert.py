"""Takes weights from one form to another.

    python -m coca_jax.convert --input=runs/mine --output=exported/mine
    python -m coca_jax.convert --input=CoCa-ViT-L-14/ --output=coca_l14
    python -m coca_jax.convert --input=runs/mine --output=for_open_clip --to=open_clip

--input is a workdir, a directory that was written here, or open_clip's: a directory with open_clip_config.json, or a
file of weights alone (.safetensors; .pt and .bin with `pip install "coca_jax[torch]"`). --to says what is written:

    coca_jax    one directory of JSON, safetensors and the tokenizer's file (docs/checkpoints.md)
    open_clip   what open_clip.create_model_and_transforms('local-dir:DIR') opens
    stablehlo   compiled functions for CPU, CUDA and TPU, for programs with JAX alone
    onnx        the same functions for ONNX Runtime (`pip install "coca_jax[onnx]"`)

docs/porting.md shows each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from coca_jax import commandline, compiler
from coca_jax.data import addresses

FORMATS = ("coca_jax", "open_clip", "stablehlo", "onnx")

_INPUT = flags.DEFINE_string("input", "", "Weights: a workdir, an exported directory, or open_clip's files.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder or bucket that is written.")
_TO = flags.DEFINE_enum("to", "coca_jax", FORMATS, "What is written.")
_STEP = flags.DEFINE_integer("step", None, "Of a workdir: which checkpoint. The newest if left out.", lower_bound=0)
_NAME = flags.DEFINE_string("name", "", "Of open_clip weights without a configuration: the model, e.g. coca_ViT-L-14.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Of weights that came without (open_clip's): file of the vocabulary; none: go without."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is at --output.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: settings are written --input=PATH")
    for flag in (_INPUT, _OUTPUT):
        if not flag.value:
            sys.exit(f"error: --{flag.name}=PATH is needed; --help says what it may be")
    source, target = os.path.realpath(_INPUT.value), os.path.realpath(_OUTPUT.value)
    if source == target:
        sys.exit(f"error: --output={_OUTPUT.value} is --input: name another folder")
    if source.startswith(os.path.join(target, "")):  # --overwrite would remove it
        sys.exit(f"error: --input={_INPUT.value} lies in --output={_OUTPUT.value}: name another folder")
    compiler.setup()
    commandline.quiet()
    with commandline.starting():
        from coca_jax.config import ConfigError
        from coca_jax.data.records import DataError
        from coca_jax.interop.weights import ConversionError
        from coca_jax.train.checkpoint import CheckpointError

    try:
        _convert()
    except (ConversionError, CheckpointError, DataError, ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        left = "may be there in part: write it again with --overwrite" if "://" in _OUTPUT.value else "is as it was"
        sys.exit(commandline.stopped(f"stopped: {_OUTPUT.value} {left}"))


def _convert() -> None:
    started = time.monotonic()
    with commandline.starting():
        import jax
        import numpy as np

        from coca_jax.stored import read_weights

        write = _writer(_TO.value)
    weights = read_weights(_INPUT.value, step=_STEP.value, tokenizer=_TOKENIZER.value, name=_NAME.value)
    model, tokenizer = weights.config.model, weights.tokenizer
    count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(weights.params))
    step = f", step {weights.step:,}" if weights.step else ""
    text = f"{tokenizer.vocab_size:,} pieces ({tokenizer.file_name})" if tokenizer else "none"
    print(f"read {_INPUT.value}: {count / 1e6:.2f}M parameters{step}; tokenizer: {text}")
    print(
        f"  image {model.image.size} px in patches of {model.image.patch}, {model.image.depth} x {model.image.width}; "
        f"pooler {model.pooler.kind}, {model.pooler.queries} queries; text {model.text.n_uni} + {model.text.n_multi} x "
        f"{model.text.width}, {model.text.length} tokens"
    )
    write(weights, _OUTPUT.value, overwrite=_OVERWRITE.value)
    print(f"wrote {_OUTPUT.value} in {time.monotonic() - started:.1f} s:")
    for line in _listing(_OUTPUT.value):
        print(f"  {line}")


def _writer(to: str) -> Callable[..., Any]:
    # Imported one at a time: some need packages that not everybody has.
    if to == "coca_jax":
        from coca_jax.interop import exported

        return exported.write
    if to == "open_clip":
        from coca_jax.interop import open_clip

        return open_clip.write
    if to == "stablehlo":
        from coca_jax.interop import stablehlo

        return stablehlo.write
    from coca_jax.interop import onnx

    onnx.check_installed()  # before gigabytes are read
    return onnx.write


def _listing(folder: str) -> list[str]:

    files = [path for path in addresses.path(folder).glob("*") if path.is_file()]
    width = max(len(path.name) for path in files)
    return [f"{path.name:{width}}  {path.stat().length / 1e6:12,.3f} MB" for path in sorted(files)]


def cli() -> None:
    commandline.run(main)


if __name__ == "__main__":
    cli()
