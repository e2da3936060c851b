r"""Evaluates a checkpoint: retrieval, captioning, zero-shot classification.

    python -m coca_jax.evaluate --checkpoint=runs/mine --output=results/mine
    python -m coca_jax.evaluate --checkpoint=coca_l14 --output=results/coca_l14 --config=configs/evaluate.py \
        --config.evaluate.splits="('folder:/data/coco/val2014',)"

--checkpoint is a workdir, a directory of coca_jax.convert, or open_clip's files. --config says on what and how: its
`evaluate`, `mesh` and `data` count; without it, a workdir is evaluated as its training was. On several hosts the same
command is started on each. Started again, sources that are done are not computed again.
"""

from __future__ import annotations

import os
import sys

from absl import flags
from ml_collections import config_flags

from coca_jax import commandline, compiler, config

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "What coca_jax.load opens: a workdir, an exported directory, ...")
_OUTPUT = flags.DEFINE_string("output", "", "Folder or bucket for the results and their pages.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "What is evaluated, a file in configs/.", lock_config=True)
_STEP = flags.DEFINE_integer("step", None, "Of a workdir: which checkpoint. The newest if left out.", lower_bound=0)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, of a job of several processes.")
_NUM_PROCESSES = flags.DEFINE_string("num_processes", "", "How many processes the job has.")
_PROCESS_ID = flags.DEFINE_string("process_id", "", "Which of them this is: 0 .. num_processes - 1.")
_TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}: settings are written --config.key=value")
    for flag in (_CHECKPOINT, _OUTPUT):
        if not flag.value:
            sys.exit(f"error: --{flag.name}=PATH is needed; --help says what it may be")
    if _CONFIG.value is not None:
        try:
            config.check(config.from_config_dict(_CONFIG.value))
        except config.ConfigError as error:
            sys.exit(f"error: {error}")
    compiler.setup()
    with commandline.starting():
        from coca_jax import evaluation

    processes = {f"--{flag.name}": flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
    done = evaluation.run(
        _CONFIG.value,
        _CHECKPOINT.value,
        _OUTPUT.value,
        step=_STEP.value,
        processes=processes,
        timeout=_TIMEOUT.value,
    )
    sys.exit(done)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's notes to itself
    commandline.run(main)
