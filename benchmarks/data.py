"""Images a second that one core makes ready for training, from JPEGs of the web's sizes, against open_clip's pipeline.

    python -m benchmarks.data                                # 3 to 4 minutes; writes its pictures into the cache folder
    python -m benchmarks.data --tensorflow=/other/bin/python # and tf.data, in an interpreter that has TensorFlow
    python -m benchmarks.data --host_cores=208 --host_chips=4 --chip_rate=805

Everything from the file to the batch: read, decode, random-resized crop to 288 px, tokenise, batch. Each pipeline runs
in a process pinned to one core and is asked in turn, over and over; the figures are medians of images per second of CPU
time, so that other work on the machine matters less. coca_jax normalises on the device; "host norm." does it on the
host, as open_clip and tf.data do, for the comparison.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from tqdm import tqdm

from benchmarks import data_cases
from benchmarks.data_photos import SIDES, write
from coca_jax import cache

CROPS = {"0.9-1": (0.9, 1.0), "0.5-1": (0.5, 1.0), "0.08-1": (0.08, 1.0)}  # open_clip's, coca_jax's, Inception's
DEFAULT = CROPS["0.5-1"]


class Child:
    """A process that measures one case when asked."""

    def __init__(self, command: list[str], cores: set[int] | None):
        # One thread in each library: what is measured is a core.
        environment = os.environ | {
            key: "1" for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
        }
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, sorted(cores))), *command] if cores else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        self._process.wait()
        self._errors.seek(0)
        raise SystemExit(f"a pipeline ended:\n{self._errors.read()[-3000:]}")

    def ready(self) -> Child:
        self._line()
        return self

    def ask(self, side: int, count: int) -> Any:
        assert self._process.stdin is not None
        print(side, count, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def child(folder: pathlib.Path, cores: set[int], pipeline: str, **options: Any) -> Child:
    case = {"folder": str(folder), "cores": sorted(cores), "pipeline": pipeline, **options}
    return Child([sys.executable, "-m", "benchmarks.data", "--case", json.dumps(case)], None)


def one_core(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Child]:
    """The cases of the first table."""
    core = {min(os.sched_getaffinity(0))}
    cases: dict[str, Child] = {}
    for name, crop in CROPS.items():
        cases[f"coca_jax, array_record, crop {name}"] = child(folder, core, "ours", source="array_record", crop=crop)
        cases[f"open_clip (webdataset + Pillow), crop {name}"] = child(folder, core, "open_clip", crop=crop)
    for source, location in data_cases.LOCATIONS.items():
        if source != "array_record" and (folder / location.format(SIDES[0])).exists():
            cases[f"coca_jax, {source}, crop 0.5-1"] = child(folder, core, "ours", source=source, crop=DEFAULT)
    shared = {"source": "array_record", "crop": DEFAULT}
    cases["coca_jax, array_record, crop 0.5-1, host norm."] = child(folder, core, "ours", normalize=True, **shared)
    color = {"color_jitter": 0.4, "hue_jitter": 0.1, "grayscale": 0.2}
    cases["coca_jax, array_record, crop 0.5-1, colour"] = child(folder, core, "ours", augment=color, **shared)
    if options.tensorflow:
        arguments = json.dumps([str(folder), data_cases.SIZE, data_cases.BATCH, DEFAULT])
        command = [options.tensorflow, "-c", data_cases.tf_program(), arguments]
        cases["tf.data, no tokens, crop 0.5-1"] = Child(command, core)
    return cases


def measured(cases: dict[str, Child], sides: tuple[int, ...], count: int, rounds: int, clock: int) -> dict:
    """Median images/s of each case and side; `clock` 0: of wall time, 1: of CPU time."""
    rates: dict[tuple[str, int], list[float]] = {}
    whole = count // data_cases.BATCH * data_cases.BATCH
    progress = tqdm(total=rounds * len(cases) * len(sides), unit="measurement")
    for each in cases.values():
        each.ready()
    for _ in range(rounds):
        for side in sides:
            for name, each in cases.items():
                rates.setdefault((name, side), []).append(whole / each.ask(side, whole)[clock])
                progress.update()
    progress.close()
    for each in cases.values():
        each.close()
    return {key: statistics.median(values) for key, values in rates.items()}


def table(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, *lines]:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=cache.folder() / "benchmark_data", help="%(default)s")
    parser.add_argument("--pictures", type=int, default=100, help="of each size; default: %(default)s")
    parser.add_argument("--count", type=int, default=64, help="images a measurement; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; default: %(default)s")
    parser.add_argument(
        "--tensorflow", default="", help="an interpreter that has TensorFlow; default: this one if it has"
    )
    parser.add_argument(
        "--chip_rate", type=float, default=805, help="images/s a chip eats: docs/planner.md, base on v4"
    )
    parser.add_argument("--host_chips", type=int, default=4, help="chips of a host; default: %(default)s")
    parser.add_argument("--host_cores", type=int, default=100, help="cores of a host; default: %(default)s")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.tensorflow and importlib.util.find_spec("tensorflow"):
        options.tensorflow = sys.executable
    return options


def main() -> None:
    options = parse()
    if options.case:
        return data_cases.serve(json.loads(options.case))
    write(options.folder, options.pictures)
    cores = sorted(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, {len(cores)} cores, {platform.machine()}, Python {platform.python_version()}")
    print(f"{data_cases.SIZE} px, batches of {data_cases.BATCH}, {options.pictures} JPEGs of each longer side {SIDES}")

    rates = measured(one_core(options.folder, options), SIDES, options.count, options.rounds, clock=1)
    names = list(dict.fromkeys(name for name, _ in rates))
    print(
        "\nimages/s/core (CPU time), by the longer side of the JPEG in pixels, and times open_clip's at the same crop"
    )
    lines = []
    for name in names:
        crop = name.split("crop ")[1].split(",")[0]
        base = f"open_clip (webdataset + Pillow), crop {crop}"
        lines.append([name, *(f"{rates[name, s]:.0f}  {rates[name, s] / rates[base, s]:.1f}x" for s in SIDES)])
    table(["", *map(str, SIDES)], lines)
    if not options.tensorflow:
        print("tf.data: left out, there is no TensorFlow here; --tensorflow=/path/of/python that has it")

    stage_child = child(options.folder, {cores[0]}, "stages").ready()
    spent = {side: stage_child.ask(side, 2 * options.count) for side in SIDES}
    stage_child.close()
    print("\nCPU ms an image, by stage (array_record, crop 0.5-1); the rest of the whole path is Grain's and Python's")
    ours = "coca_jax, array_record, crop 0.5-1"
    lines = [[stage, *(f"{spent[s][stage]:.3f}" for s in SIDES)] for stage in spent[SIDES[0]]]
    parts = {s: sum(value for stage, value in spent[s].items() if stage != "host norm.") for s in SIDES}
    lines.append(["sum without host norm.", *(f"{parts[s]:.3f}" for s in SIDES)])
    lines.append(["whole path", *(f"{1e3 / rates[ours, s]:.3f}" for s in SIDES)])
    table(["", *map(str, SIDES)], lines)

    if len(cores) > 1:
        both = set(cores[:2])
        shared = {"source": "array_record", "crop": DEFAULT}
        ways: dict[str, dict[str, Any]] = {f"threads={n}": {"threads": n} for n in (1, 2, 4)}
        ways |= {"threads=2, prefetch=2": {"threads": 2, "prefetch": 2}}
        ways |= {"threads=4, prefetch=2": {"threads": 4, "prefetch": 2}}
        ways |= {"workers=2, threads=1": {"workers": 2, "threads": 1}}
        cases = {name: child(options.folder, both, "ours", **shared, **way) for name, way in ways.items()}
        wall = measured(cases, (800,), 2 * options.count, max(3, options.rounds - 2), clock=0)
        print("\nimages/s on 2 cores (wall time), JPEGs of 800 px, array_record")
        table(["", "images/s"], [[name, f"{wall[name, 800]:.0f}"] for name in cases])

    rate, eaten = rates[ours, 800], options.host_chips * options.chip_rate
    print(
        f"\nA host of {options.host_cores} cores feeds up to {options.host_cores * rate:,.0f} images/s (800 px JPEGs); "
        f"its {options.host_chips} chips eat {options.host_chips} x {options.chip_rate:g} = {eaten:,.0f}, for which "
        f"{eaten / rate:.1f} cores would do."
    )


if __name__ == "__main__":
    main()
