"""Whether the device waits for the host: a trace of the real loop, with data, metrics, checkpoints and progress on.

    python -m benchmarks.waiting                                     # configs/quickstart.py on the built-in data
    python -m benchmarks.waiting --config=configs/coca_base.py --steps=40 -- --config.data.train=...

Runs `coca_jax.main` without evaluations, metrics written every step and a checkpoint in the middle of the traced steps,
and prints the share of the traced time in which no operation of the device ran, its longest pauses, and where the host
was in them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import trace
from benchmarks.turns import REPOSITORY, platforms
from coca_jax import parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="recipe; default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="of the run; the last two thirds are traced")
    parser.add_argument("--no-checkpoint", dest="checkpoint", action="store_false", help="none in the traced steps")
    parser.add_argument("more", nargs="*", help="further arguments of coca_jax.main, after --")
    args = parser.parse_args()
    first, last = args.steps // 3 + 1, args.steps - 1
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "coca_jax.main", f"--config={args.config}", f"--workdir={folder}/run"),
            *(f"--config.steps={args.steps}", "--config.log_every=1", f"--profile={first}:{last}"),
            *("--config.evaluate.splits=()", "--config.evaluate.zero_shot=", "--config.evaluate.captions=0"),
            f"--config.checkpoint.every={(first + last) // 2 if args.checkpoint else args.steps + 1}",
            *args.more,
        ]
        environment = {**os.environ, **parent.environment(), "JAX_PLATFORMS": platforms()}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: the run ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        events = trace.read(Path(folder) / "run" / "profile")
    intervals = trace.merged(events)
    span = intervals[-1][1] - intervals[0][0]
    busy = sum(end - start for start, end in intervals)
    pauses = sorted(((b[0] - a[1], a[1] - intervals[0][0]) for a, b in itertools.pairwise(intervals)))
    steps = last - first + 1
    print(f"{args.config}; {platform.machine()}, Python {platform.python_version()}, {datetime.date.today()}")
    print(f"{steps} steps in {span:.2f} s: the device was idle for {1 - busy / span:.2%} of it")
    longest = ", ".join(f"{pause * 1e3:.1f} ms at {at:.2f} s" for pause, at in reversed(pauses[-5:]))
    print(f"longest pauses: {longest}")
    short = sum(pause for pause, _ in pauses if pause < 1e-3)
    print(f"in pauses of less than 1 ms, between operations of a step: {short / span:.2%}")


if __name__ == "__main__":
    main()
