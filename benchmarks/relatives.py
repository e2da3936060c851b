"""CoCa and its relatives on the built-in set at equal compute, and what a step of each costs.

    python -m benchmarks.relatives train --workdir=runs/relatives    # every row, one after the other
    python -m benchmarks.relatives train --workdir=runs/relatives --only=clip
    python -m benchmarks.relatives table --workdir=runs/relatives
    taskset -c 0 python -m benchmarks.relatives cost

Equal compute is equal model FLOPs (coca_jax/model/flops.py): those of --steps steps of the quickstart's recipe. Each
row is configs/relatives/NAME.py for as many steps of the same batch as they buy. LiT and the bridge begin with the CoCa
row's checkpoint, whose training comes on top; the bridge's two stages have two thirds and one third of the budget. Each
row is evaluated on the pictures of the unseen designer with names that were seen. One that is there is left.

`cost` times the compiled step of each, in a process of its own, taking turns; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.turns import OtherWork, Worker, take_turns
from coca_jax import config, parent
from coca_jax.model import flops
from coca_jax.train.metrics import read_lines

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
# Row -> recipe, share of the budget, the row that it begins from.
ROWS = {
    "coca": ("quickstart", 1.0, ""),
    "clip": ("relatives/clip", 1.0, ""),
    "siglip": ("relatives/siglip", 1.0, ""),
    "captioner": ("relatives/captioner", 1.0, ""),
    "lit": ("relatives/lit", 1.0, "coca"),
    "bridge_stage_one": ("relatives/bridge_stage_one", 2 / 3, "coca"),
    "bridge_stage_two": ("relatives/bridge_stage_two", 1 / 3, "bridge_stage_one"),
}
SHOWN = ("image_to_text/r1", "image_to_text/r10", "text_to_image/r1", "text_to_image/r10", "caption_loss")


def recipe(row: str) -> config.Config:
    """A row's configuration, as if it began with nothing."""
    values = runpy.run_path(str(CONFIGS / f"{ROWS[row][0]}.py"))["get_config"]()
    return dataclasses.replace(config.from_config_dict(values), init=config.Init())


def steps_of(row: str, budget: int) -> int:
    """So many steps of a row cost its share of `budget` steps of CoCa, in model FLOPs."""
    return max(
        1, round(ROWS[row][1] * budget * flops.train_step_flops(recipe("coca")) / flops.train_step_flops(recipe(row)))
    )


def train(row: str, folder: pathlib.Path, budget: int) -> None:
    """One row, or nothing where it is there. Raises CalledProcessError where the run fails."""
    name, _, begins = ROWS[row]
    changes: dict[str, Any] = {
        "steps": steps_of(row, budget),
        "evaluate.splits": ("emoji:seen",),
        "evaluate.zero_shot": "",
        "evaluate.reference_style": "",
        "evaluate.captions": 0,
        "checkpoint.every": 10_000,
    } | ({"init.checkpoint": str(folder / begins)} if begins else {})
    command = [sys.executable, "-m", "coca_jax.main", f"--config={CONFIGS / name}.py", f"--workdir={folder / row}"]
    subprocess.run(
        [*command, *(f"--config.{key}={value}" for key, value in changes.items())],
        env=os.environ | parent.environment(),
        check=True,
    )


def table(folder: pathlib.Path, budget: int) -> list[str]:
    """Lines of Markdown: of every row its cost and what it has learned; the rows that are not there are left out."""
    lines = ["| | GFLOP a step | x CoCa's | steps | " + " | ".join(SHOWN) + " |", "|---" * (4 + len(SHOWN)) + "|"]
    whole = flops.train_step_flops(recipe("coca"))
    for row in ROWS:
        if not (folder / row / "report.html").exists():
            continue
        found = [line for line in read_lines(folder / row / "metrics.jsonl") if "loss" not in line][-1]
        one, steps = flops.train_step_flops(recipe(row)), steps_of(row, budget)
        if found["step"] != steps:
            sys.exit(f"error: {folder / row} has {found['step']} steps, and --steps={budget} makes {steps}")
        values = [f"{found[f'seen/{name}']:.3f}" if f"seen/{name}" in found else "" for name in SHOWN]
        lines.append(f"| {row} | {one / 1e9:.1f} | {one / whole:.2f} | {steps} | " + " | ".join(values) + " |")
    return lines


def cost(rounds: int, steps: int, only: list[str]) -> list[str]:
    """Lines of Markdown: seconds of a step."""
    workers = [
        Worker(row, sys.executable, "benchmarks.our_step", {"config": dataclasses.asdict(recipe(row))}) for row in only
    ]
    load = OtherWork(workers)
    answers = take_turns(workers, rounds, do="step", steps=steps) if rounds else {}
    others = load.share()
    lines = ["| | GFLOP a step | x CoCa's | seconds a step, median | least | most | x CoCa's |", "|---" * 7 + "|"]
    seconds = {row: [answer["seconds"] for answer in answers[row]] for row in answers}
    for worker in workers if rounds else ():
        own, first = seconds[worker.name], statistics.median(seconds[workers[0].name])
        share = worker.known["step_flops"] / workers[0].known["step_flops"]
        median = statistics.median(own)
        lines.append(
            f"| {worker.name} | {worker.known['step_flops'] / 1e9:.1f} | {share:.2f} | {median:.3f} | {min(own):.3f} | "
            f"{max(own):.3f} | {median / first:.2f} |"
        )
    for worker in workers:
        worker.close()
    return [
        *lines,
        f"other processes had {others:.0%} of the cores meanwhile{': not a measurement' if others > 0.05 else ''}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "table", "cost"))
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/relatives"), help="a folder a row")
    parser.add_argument("--steps", type=int, default=100, help="of CoCa, that are the budget; default: %(default)s")
    parser.add_argument("--only", action="append", choices=ROWS, help="rows; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="of cost; 0 only compiles; default: %(default)s")
    parser.add_argument("--turn", type=int, default=3, help="steps of a round; default: %(default)s")
    args = parser.parse_args(arguments)
    if args.what == "train":
        for row in args.only or ROWS:
            train(row, args.workdir, args.steps)
    elif args.what == "table":
        print(*table(args.workdir, args.steps), sep="\n")
    else:
        print(*cost(args.rounds, args.turn, args.only or list(ROWS)), sep="\n")


if __name__ == "__main__":
    main()
