"""From the command to the first step: where time goes, with an empty cache of compiled programs and with a full one.

    python -m benchmarks.startup                                          # configs/quickstart.py, a minute or two
    python -m benchmarks.startup --config=configs/debug.py --rounds=5

Each line is the real `coca_jax.main` in a process of its own that is ended after two steps; the data are prepared
beforehand. Seconds since the command, medians; memory is what the process holds at the first step's end. `--help` is
timed too, and what the imports take.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import REPOSITORY, platforms

STAGES = ("python", "imports", "devices", "state", "compiled", "first step", "second step")


def child(started: float, arguments: list[str]) -> None:
    """Runs main with its stages noted, and prints them: seconds since `started`, of the clock all processes share."""
    stages: dict[str, float] = {}

    def note(stage: str) -> None:
        stages.setdefault(stage, time.monotonic() - started)

    note("python")
    from coca_jax import compiler

    compiler.setup()  # what main does before it imports what follows
    import jax

    from coca_jax import main, run  # noqa: F401
    from coca_jax.train import loop

    note("imports")
    jax.devices()
    note("devices")
    compiled, hits = [], []

    def event(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(event)
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    original = loop.compile_step

    def noted(*args: Any) -> Any:
        note("state")
        function: Any = original(*args)
        calls = 0

        def step(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                function.lower(*inputs).compile()
                note("compiled")
            outputs = function(*inputs)
            jax.block_until_ready(outputs)
            note("first step" if calls == 1 else "second step")
            if calls == 2:
                held = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
                answer = {
                    "stages": stages,
                    "programs": len(compiled),
                    "compile_seconds": sum(compiled),
                    "misses": hits.count("/jax/compilation_cache/cache_misses"),
                    "hits": hits.count("/jax/compilation_cache/cache_hits"),
                    "resident_bytes": int(held.split()[1]) * 1024,
                }
                print("\n" + json.dumps({"startup": answer}), flush=True)
                os._exit(0)  # what a run does at its end is not measured here
            return outputs

        return step

    loop.compile_step = noted
    sys.argv = ["coca_jax.main", *arguments]
    main.cli()


def run_once(cache: str, arguments: list[str]) -> dict[str, Any]:
    """One start with a folder of compiled programs."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "benchmarks.startup", "--child", str(time.monotonic()), *arguments]
        environment = {**os.environ, "JAX_PLATFORMS": platforms(), "JAX_COMPILATION_CACHE_DIR": cache}
        environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
        done = subprocess.run(
            [*command, f"--workdir={workdir}/run"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"startup"')]
    if not lines:
        sys.exit(f"error: the run ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(lines[-1])["startup"]
    return answer


def seconds(*command: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="recipe; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="starts with a full cache; default: %(default)s")
    parser.add_argument("more", nargs="*", help="further arguments of coca_jax.main, after --")
    args = parser.parse_args()
    arguments = [f"--config={args.config}", *args.more]
    with tempfile.TemporaryDirectory() as cache:
        cold = [run_once(cache, arguments)]
        warm = [run_once(cache, arguments) for _ in range(args.rounds)]
    helped = statistics.median(seconds("-m", "coca_jax.main", "--help") for _ in range(args.rounds))
    imported = statistics.median(seconds("-c", "import jax") for _ in range(args.rounds))
    print(f"{args.config}; {platform.machine()}, Python {platform.python_version()}, {datetime.date.today()}")
    print(f"--help {helped:.2f} s; python -c 'import jax' {imported:.2f} s")
    print(f"{'seconds since the command':28}" + "".join(f"{stage:>13}" for stage in STAGES))
    for name, runs in (("empty cache", cold), ("full cache", warm)):
        medians = [statistics.median(one["stages"][stage] for one in runs) for stage in STAGES]
        print(f"{name:28}" + "".join(f"{value:13.2f}" for value in medians))
        last = runs[-1]
        print(
            f"{'':28}{last['programs']} programs compiled or read in {last['compile_seconds']:.1f} s, "
            f"{last['hits']} read from the cache, {last['misses']} not in it; "
            f"{last['resident_bytes'] / 2**20:.0f} MiB held after the second step"
        )
    return None


if __name__ == "__main__":
    main()
