"""Trains CoCa, or evaluates what a workdir holds.

    python -m coca_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m coca_jax.main --config=configs/coca_large.py --workdir=gs://bucket/run --config.data.train=...

Any key of the configuration can be set after the file: --config.optimizer.peak_lr=1e-3. Started again with the same
--workdir, a run goes on from its newest checkpoint, or says that it is complete. On several hosts the same command is
started on each; where the cluster does not say who is who, --coordinator, --num_processes and --process_id do
(docs/many_hosts.md).
"""

from __future__ import annotations

import logging
import os
import sys

from absl import flags
from ml_collections import config_flags

from coca_jax import commandline, compiler, config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or bucket for checkpoints, metrics and the report.")
_PROFILE = flags.DEFINE_string("profile", "", "start:stop: trace these steps for a profiler (docs/profiling.md).")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "train, or evaluate the newest checkpoint.")
# Text, so that what is wrong with a number is said as for the environment's variables.
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, of a job of several processes.")
_NUM_PROCESSES = flags.DEFINE_string("num_processes", "", "How many processes the job has.")
_PROCESS_ID = flags.DEFINE_string("process_id", "", "Which of them this is: 0 .. num_processes - 1.")
_TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds without a heartbeat before a process counts as lost.",
    lower_bound=2,
)


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
    compiler.setup()  # before JAX is loaded, which reads it
    with commandline.starting():
        from coca_jax import run  # after the flags: --help must not wait for JAX

    processes = {f"--{flag.name}": flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
    sys.exit(
        run.run(
            _CONFIG.value,
            _WORKDIR.value,
            evaluate_only=_MODE.value == "evaluate",
            profile=_PROFILE.value,
            processes=processes,
            timeout=_TIMEOUT.value,
            heartbeat=_HEARTBEAT.value,
        )
    )


def cli() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's notes to itself
    commandline.run(main)


if __name__ == "__main__":
    cli()
