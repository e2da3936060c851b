"""The train step compiled for one TPU chip that need not be there: what it holds, moves and computes. Nothing runs.

    python -m benchmarks.tpu_program                           # coca_base at 288 px, 64 pairs a step: minutes of a CPU
    python -m benchmarks.tpu_program --chip=v6e --ours='xla:' --ours='flash: model.attention=flash'

Needs libtpu: pip install "coca_jax[plan]". Three parts of a step, one after the other, as a TPU computes them:

"Products": what the compiler expects of the operations with a matrix product, in cycles, their memory traffic included.
"Kernels": the instructions that the compiler has laid out for a call of each, one a cycle, times its calls; waiting for
memory is not in it. "The rest": what other operations read and write at the data sheet's bandwidth, as if each found
nothing in the chip's scratch memory but what the compiler has put there. "Of peak": the model FLOPs utilisation that it
would be. An estimate for comparing programs, and no measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before JAX is imported
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # the TPU is only compiled for
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    from coca_jax import compiler

    compiler.setup(["tpu"])

from benchmarks.train_step import changed
from coca_jax import config
from coca_jax.plan import hlo, topology

GB, GIB = 1e9, 2**30
COLUMNS = (
    *("state GiB", "program GiB", "TFLOP", "products ms", "kernels ms"),
    *("rest GB", "rest ms", "ms in all", "of peak"),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/coca_base.py", help="recipe; default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step of one chip; default: %(default)s")
    # Those with one core: how two share the calls of a kernel is not known.
    parser.add_argument("--chip", default="v5e", choices=("v5e", "v6e"), help="default: %(default)s")
    parser.add_argument("--ours", action="append", default=[], help="'name: key=value ...', a variant; repeatable")
    parser.add_argument("--kernels", help=argparse.SUPPRESS)  # the other process: a folder for the compiler's notes
    return parser.parse_args()


def variant(args: argparse.Namespace, changes: str) -> config.Config:
    """The recipe on one chip, with changes."""
    c = config.from_config_dict(runpy.run_path(args.config)["get_config"]())
    c = dataclasses.replace(c, batch_size=args.batch, mesh=config.Mesh(replica=1, fsdp=1))
    c = config.from_config_dict(changed(c, changes)[0])
    config.check(c, platform="tpu")
    return c


def mesh_of(four: topology.Topology) -> Any:
    """A mesh of one chip of those of a host.

    Raises:
      SystemExit: libtpu is not installed.
    """
    import jax
    from jax.experimental import topologies

    from coca_jax import sharding

    try:
        devices = topologies.get_topology_desc(**four.options()).devices
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(f'error: {error}: pip install "coca_jax[plan]"') from error
    return sharding.make_mesh((1, 1, 1), devices[:1])


def main() -> None:
    args = parse()
    four = topology.parse_topology(f"{args.chip}:2x2")
    mesh, chip = mesh_of(four), four.chip
    if args.kernels:
        print(json.dumps(schedules(variant(args, args.ours[0]), mesh, Path(args.kernels))))
        return
    import jax

    from coca_jax.model import flops
    from coca_jax.plan.compiled import trace_step, unreadable

    print(f"{args.config}, batch {args.batch}, {args.chip}, not run; jax {jax.__version__}, ", end="")
    print(f"{datetime.date.today()}; peak {chip.peak_tflops} TFLOP/s, {chip.hbm_gbs} GB/s")
    print(f"{'':24}{''.join(f'{name:>12}' for name in COLUMNS)}{'compiled in s':>15}", flush=True)
    clock = chip.peak_tflops * 1e12 / chip.cycle_flops
    for asked in args.ours or ["xla:", "flash: model.attention=flash"]:
        name, _, changes = asked.partition(":")
        c = variant(args, changes)
        started = time.monotonic()
        with jax.set_mesh(mesh):
            program = trace_step(c, mesh)[0].lower().compile()
        seconds = time.monotonic() - started
        try:
            text = program.as_text()
        except jax.errors.JaxRuntimeError as error:
            sys.exit(f"error: {name}: {unreadable(error)}")
        memory, traffic = program.memory_analysis(), hlo.traffic(text, 1)
        kernels = sum(cycles for _, cycles in in_another_process(args, changes)) / clock
        products, rest = traffic.product_cycles / clock, traffic.hbm_apart / (chip.hbm_gbs * GB)
        wanted, in_all = flops.train_step_flops(c) / (chip.peak_tflops * 1e12), products + kernels + rest
        figures = (
            *(f"{size / GIB:.2f}" for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)),
            *(f"{flops.train_step_flops(c) / 1e12:.2f}", f"{products * 1e3:.3f}", f"{kernels * 1e3:.3f}"),
            *(f"{traffic.hbm_apart / GB:.1f}", f"{rest * 1e3:.3f}", f"{in_all * 1e3:.3f}", f"{wanted / in_all:.0%}"),
        )
        print(f"{name:24}{''.join(f'{figure:>12}' for figure in figures)}{seconds:15.0f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def in_another_process(args: argparse.Namespace, changes: str) -> list[tuple[str, float]]:
    """`schedules` of a variant, with a compiler that writes down its schedule of everything that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        options = ("config", "batch", "chip")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.tpu_program", f"--kernels={folder}", f"--ours={changes}"),
                *(f"--{option}={getattr(args, option)}" for option in options),
            ],
            env={**os.environ, "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return [(name, float(cycles)) for name, cycles in json.loads(done.stdout.splitlines()[-1])]


def schedules(c: config.Config, mesh: Any, folder: Path) -> list[tuple[str, float]]:
    """Name and cycles of a step for each kernel of the step; `folder` is where the compiler writes."""
    import jax
    from jax.interpreters import partial_eval

    from coca_jax.plan.compiled import trace_step

    jaxpr = trace_step(c, mesh)[0].jaxpr.jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    place = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    found, known = [], {}
    for equation, times in pallas_calls(needed, 1.0):
        avals = [v.aval for v in equation.invars]
        key = (equation.params["name"], str(avals), str(equation.params["jaxpr"]))
        if key not in known:
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in avals]
            jax.jit(lambda *x, e=equation: e.primitive.bind(*x, **e.params)).lower(*shapes).compile()
            known[key] = last_schedule(folder)
        grid = equation.params["grid_mapping"].grid
        found.append((f"{key[0]} {avals[0].str_short()}", times * math.prod(grid) * known[key]))
    return found


def pallas_calls(jaxpr: Any, times: float) -> Iterator[tuple[Any, float]]:
    """The kernels of a program, and how often each is called."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, times
            continue
        more = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from pallas_calls(inner, more)


def last_schedule(folder: Path) -> int:
    """Instructions of the one kernel that was compiled since the folder was empty, which it is then again."""
    counts = []
    for file in folder.glob("*schedule-analysis_final_bundles.txt"):
        text = file.read_text()
        count = re.search(r"non empty scheduled bundles: (\d+)", text)
        if count and "tpu_custom_call" in text and "-TLP-" not in file.name:  # the program around it names it too
            counts.append(int(count.group(1)))
    for file in folder.iterdir():
        file.unlink()
    if len(counts) != 1:
        raise SystemExit(f"error: libtpu has written {len(counts)} schedules of one kernel to {folder}")
    return counts[0]


if __name__ == "__main__":
    main()
