"""Trains CoCa, or evaluates what a workdir holds.

    python -m coca_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m coca_jax.main --config=configs/coca_large.py --workdir=gs://bucket/run --config.data.train=...

Any key of the configuration can be set after the file: --config.optimizer.peak_lr=1e-3. Started again with the same
--workdir, a run goes on from its newest checkpoint, or says that it is complete.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or bucket for checkpoints, metrics and the report.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train, or evaluate the newest checkpoint.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}: settings are written --config.key=value")
    if not _CONFIG.value or not _WORKDIR.value:
        missing = "--workdir=FOLDER" if _CONFIG.value else "--config=configs/NAME.py"
        raise app.UsageError(f"{missing} is needed; for a first run: bash launch/quickstart")
    from coca_jax import run  # after the flags: --help must not wait for JAX

    if error := run.run(_CONFIG.value, _WORKDIR.value, evaluate_only=_MODE.value == "evaluate"):
        sys.exit(error)


def cli() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's notes to itself
    app.run(main)


if __name__ == "__main__":
    cli()
