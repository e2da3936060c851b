"""Trains CoCa, or evaluates what a workdir holds.

    python -m coca_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m coca_jax.main --config=configs/coca_large.py --workdir=gs://bucket/run --config.data.train=...

Any key of the configuration can be set after the file: --config.optimizer.peak_lr=1e-3. Started again with the same
--workdir, a run goes on from its newest checkpoint, or says that it is complete.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from coca_jax import config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or bucket for checkpoints, metrics and the report.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train, or evaluate the newest checkpoint.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: settings are written --config.key=value")
    if not _CONFIG.value or not _WORKDIR.value:
        missing = "--workdir=FOLDER" if _CONFIG.value else "--config=configs/NAME.py"
        sys.exit(f"error: {missing} is needed; for a first run: bash launch/quickstart")
    try:
        config.check(config.from_config_dict(_CONFIG.value))  # before JAX is loaded, which takes seconds
    except config.ConfigError as error:
        sys.exit(f"error: {error}")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache as soon as it is imported
    from coca_jax import run  # after the flags: --help must not wait for JAX

    sys.exit(run.run(_CONFIG.value, _WORKDIR.value, evaluate_only=_MODE.value == "evaluate"))


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and returns the other arguments; exits with one line that says what is wrong with them."""
    try:
        for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
            name, equals, value = argument.partition("=")
            name = name.lstrip("-") if name.startswith("-") else ""
            file = (value if equals else following).split(":")[0]
            if name == "config" and not os.path.isfile(file):
                raise config.ConfigError(
                    f"--config={file}: no such file; a recipe is a file such as configs/quickstart.py"
                )
            if name.startswith("config."):
                config.check_key(name.removeprefix("config."))
        return flags.FLAGS(argv)
    except SystemExit as done:
        # absl ends with 1 after its help, which is no failure.
        sys.exit(0 if {"--help", "--helpshort", "--helpfull"} & set(argv) else done.code)
    except Exception as error:  # a recipe is a program: it may raise anything
        sys.exit(f"error: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    """The message, on one line; of an error in a recipe, where in its file it was raised."""
    cause: BaseException | None = error
    while cause is not None:
        for frame in traceback.extract_tb(cause.__traceback__):
            if frame.name == "get_config":
                return f"{frame.filename}:{frame.lineno}: {type(cause).__name__}: {' '.join(str(cause).split())}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())


def cli() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's notes to itself
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
