"""The whole train step: ours against open_clip's CoCa, and against what the machine's matrix products allow.

    python -m benchmarks.train_step --peer=.venv-peers/bin/python              # coca_ViT-B-32, batch 8, float32
    python -m benchmarks.train_step --peer=.venv-peers/bin/python --model=small --batch=32 --dtype=bfloat16 --compile
    python -m benchmarks.train_step --ours='scanned: model.text.scan_unroll=1 model.image.scan_unroll=1'

The peer's environment is one with `pip install "coca_jax[peers]"`. Both are processes of their own that take turns, in
one command: the same architecture (as many parameters), batch, precision, AdamW, clipping by the global norm, captions
without padding. Our layers are compiled one by one (scan_unroll=0), as those of the peer are run. On CPUs ours keeps
the memory that a step frees (docs/launch.md), as PyTorch mostly does; for one that does not, add --ours='ours:'
--ours='given back: COCA_JAX_KEEP_MEMORY=off'. Figures are medians over the rounds. The ceiling is the rate of a square
product in the same rounds and the same precision; model FLOPs are those of coca_jax/model/flops.py. --ours adds
variants of ours: changes of the configuration, and environment variables (XLA_FLAGS=...), which must have an
upper-case name. On a GPU, with PyTorch for it in the peer's environment, the same commands run there; cuDNN's
attention then is --ours='cudnn: model.attention=cudnn' with --dtype=bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import shlex
import statistics
import sys
from typing import Any

from benchmarks.turns import OtherWork, Worker, platforms, take_turns
from coca_jax import compiler, config
from coca_jax.interop.open_clip import CONFIGS, model_config, open_clip_config

# Like coca_ViT-B-32, small enough for a look in seconds.
_TEXT = {"context_length": 32, "vocab_size": 8192, "width": 256, "heads": 4, "layers": 4}
SMALL = {
    "embed_dim": 256,
    "vision_cfg": {
        **{"image_size": 128, "patch_size": 16, "width": 256, "layers": 4, "head_width": 64},
        **{"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 64, "output_tokens": True},
    },
    "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": _TEXT,
}
GB, GIB = 1e9, 2**30


def configuration(args: argparse.Namespace, changes: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Our configuration as a nested dict with some changes, and the environment variables among these.

    Raises:
      SystemExit: a change cannot be read, or names no key.
    """
    sizes: dict[str, Any] = SMALL if args.model == "small" else CONFIGS[args.model]
    if args.layers:
        sections = ("vision_cfg", "text_cfg", "multimodal_cfg")
        sizes = {**sizes, **{section: {**sizes[section], "layers": args.layers} for section in sections}}
    model = model_config(sizes)
    model = dataclasses.replace(
        model,
        dtype=args.dtype,
        image=dataclasses.replace(model.image, scan_unroll=0),
        text=dataclasses.replace(model.text, scan_unroll=0),
    )
    c = config.Config(model=model, batch_size=args.batch, steps=1000, optimizer=config.Optimizer(name="adamw"))
    values, environment = changed(c, changes)
    ours = {"JAX_PLATFORMS": platforms(), compiler.KEEP_MEMORY: os.environ.get(compiler.KEEP_MEMORY, "on")}
    return values, ours | environment


def changed(c: config.Config, changes: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A configuration as a nested dict with `key=value`s, and the environment variables among these.

    Raises:
      SystemExit: a change cannot be read, or names no key.
    """
    values: dict[str, Any] = dataclasses.asdict(c)
    environment: dict[str, str] = {}
    for change in shlex.split(changes):
        key, equals, value = change.partition("=")
        if equals and key.isupper():
            environment[key] = value
            continue
        try:
            before = config.get(c, key)
            *groups, name = key.split(".")
            group = functools.reduce(dict.__getitem__, groups, values)
            group[name] = value if isinstance(before, str) else type(before)(json.loads(value))
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            sys.exit(f"error: --ours: {change!r} is not key=value with a key of the configuration: {error}")
    return values, environment


def main() -> None:
    args = parse()
    values, _ = configuration(args)
    theirs = open_clip_config(config.from_config_dict(values).model)
    common = {"dtype": args.dtype, "batch": args.batch, "open_clip": theirs}
    workers = []
    for text in args.ours or ["ours:"]:
        name, _, changes = text.partition(":")
        values, environment = configuration(args, changes)
        workers.append(Worker(name, sys.executable, "benchmarks.our_step", common | {"config": values}, environment))
    if args.peer:
        ways = ["open_clip, eager"] * (args.compile != "only") + ["open_clip, compiled"] * bool(args.compile)
        for name in ways:
            options = common | {"compile": name.endswith("compiled")}
            workers.append(Worker(name, args.peer, "benchmarks.open_clip_step", options))
    for worker in workers[max(1, len(args.ours)) :]:  # variants of ours may be other models
        if worker.known["parameters"] != workers[0].known["parameters"]:
            sys.exit(f"error: {worker.name} has {worker.known['parameters']} parameters, {workers[0].known} ours")

    rates: dict[str, list[float]] = {worker.name: [] for worker in workers}
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    load = OtherWork(workers)
    for _ in range(args.rounds):
        for name, answers in take_turns(workers, 1, do="matmul", n=args.matmul).items():
            rates[name] += [answer["flops"] for answer in answers]
        for name, answers in take_turns(workers, 1, do="step", steps=args.steps).items():
            seconds[name] += [answer["seconds"] for answer in answers]
        print({name: round(values[-1], 3) for name, values in seconds.items()}, file=sys.stderr)
    others = load.share()
    peaks = {worker.name: worker.ask(do="memory")["peak_bytes"] for worker in workers}
    parts = workers[0].ask(do="parts") if args.parts else {}
    report(args, workers, seconds, rates, peaks, parts, others)
    for worker in workers:
        worker.close()


def report(
    args: argparse.Namespace,
    workers: list[Worker],
    seconds: dict[str, list[float]],
    rates: dict[str, list[float]],
    peaks: dict[str, int],
    parts: dict[str, float],
    others: float,
) -> None:
    ours = workers[0]
    flops, ceiling = ours.known["step_flops"], statistics.median(rates[ours.name])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    versions = ", ".join(dict.fromkeys(worker.known["versions"] for worker in workers))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{args.model}, batch {args.batch}, {args.dtype}, {ours.known['parameters'] / 1e6:.1f}M parameters, "
        f"{flops / 1e12:.4f} TFLOP a step; {ours.known['device']}, {cores} cores, {platform.machine()}; {versions}, "
        f"Python {platform.python_version()}; {datetime.date.today()}"
    )
    print(f"ceiling: {ceiling / GB:.1f} GFLOP/s, {args.matmul}^3 product by XLA: a step in {flops / ceiling:.3f} s")
    print(f"other processes had {others:.0%} of the cores meanwhile" + (": not a measurement" if others > 0.05 else ""))
    header = ["", "s a step", "samples/s", "x last", "TFLOP", "GFLOP/s", "of ceiling", "peak GiB", "first step, s"]
    rows = [header]
    for worker in workers:
        name, known = worker.name, worker.known
        flops = known.get("step_flops", ours.known["step_flops"])
        rows.append(
            [
                *(name, f"{median[name]:.3f}", f"{args.batch / median[name]:.2f}"),
                *(
                    f"{median[workers[-1].name] / median[name]:.2f}",
                    f"{flops / 1e12:.4f}",
                    f"{flops / median[name] / GB:.1f}",
                ),
                *(f"{flops / median[name] / ceiling:.0%}", f"{peaks[name] / GIB:.2f}"),
                f"{known['first_step_seconds']:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )
    if parts:
        total = sum(parts.values())
        print(f"{ours.name}, one traced step by part, {total:.3f} s: ", end="")
        print(", ".join(f"{name} {value / total:.1%}" for name, value in parts.items()))
    if args.json:
        with open(args.json, "w") as file:
            figures = {"seconds": seconds, "matmul": rates, "peak_bytes": peaks, "parts": parts}
            json.dump(figures | {"known": {worker.name: worker.known for worker in workers}}, file, indent=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="Python of an environment with open_clip; without: ours alone")
    parser.add_argument("--compile", nargs="?", const="also", choices=("also", "only"), help="torch.compile")
    parser.add_argument("--model", default="coca_ViT-B-32", choices=(*CONFIGS, "small"), help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=0, help="of each tower instead of the model's, for a quick look")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn; default: %(default)s")
    parser.add_argument("--matmul", type=int, default=2048, help="n of the ceiling's n^3 product; default: %(default)s")
    parser.add_argument("--ours", action="append", default=[], help="'name: key=value ...', a variant; repeatable")
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="no trace by part of the first variant")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
