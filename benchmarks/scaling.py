"""What a device computes, holds and sends as there are more of them; the losses' memory as batch and vocabulary grow.

    python -m benchmarks.scaling cpu       # 1 to 8 virtual devices: compiled here, a minute
    python -m benchmarks.scaling tpu       # 16, 256 and 2,048 chips of v4, which need not be there: libtpu, minutes
    python -m benchmarks.scaling losses    # contrastive: batch 1k to 64k; captioning: vocabulary 8k to 256k
    python -m benchmarks.scaling plot      # docs/scaling.png and docs/loss_memory.png from the three

Nothing runs: FLOPs are counted in the traced program, memory is the compiler's buffer assignment, bytes sent are read
in the compiled program. The batch of a device stays the same. Figures go to benchmarks/results/*.json. Theory, for
parameters of s bytes sharded over f devices and replicated r times: what is computed with is gathered in the forward
and again in the backward pass, gradients are reduced and scattered, and each shard is reduced over the replicas:
3 s (f - 1) / f + 2 (s / f) (r - 1) / r, less where it travels in bfloat16; and the features of the contrastive loss,
which are small.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coca_jax import config
from coca_jax.plan import compiled, topology

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
GIB, MIB = 2**30, 2**20
CHIPS = ("v4:2x2x4", "v4:4x8x8", "v4:8x16x16")


def recipe(name: str, rows: int, devices: int, fsdp: int, **changes: Any) -> config.Config:
    """A recipe with `rows` of the batch for each device, its parameters sharded over `fsdp` of them."""
    values = runpy.run_path(str(REPOSITORY / name))["get_config"]()
    c = config.from_config_dict(values)
    mesh = config.Mesh(replica=devices // fsdp, fsdp=fsdp)
    return dataclasses.replace(c, batch_size=rows * devices, mesh=mesh, **changes)


def theory(parameters: int, bytes_each: int, fsdp: int, replica: int) -> float:
    """Bytes that a device sends a step at least."""
    size = parameters * bytes_each
    return 3 * size * (fsdp - 1) / fsdp + 2 * size / fsdp * (replica - 1) / replica


def figures(c: config.Config, devices: int, measured: compiled.Measured) -> dict[str, Any]:
    from coca_jax.train import state

    if measured.error:
        sys.exit(f"error: {devices} devices: {measured.error}")
    parameters = state.parameter_count(state.abstract_parameters(c))
    return {
        "devices": devices,
        "mesh": [c.mesh.replica, c.mesh.fsdp],
        "batch": c.batch_size,
        "parameters": parameters,
        "tflops": measured.executed_flops / 1e12,
        "memory_gib": sum(measured.memory.values()) / GIB,
        "sent_mb": sum(measured.collectives.values()) / 1e6,
        "sent": {kind: size / 1e6 for kind, size in measured.collectives.items() if size},
        "theory_mb": theory(parameters, 4, c.mesh.fsdp, c.mesh.replica) / 1e6,
        "compile_seconds": measured.compile_seconds,
    }


def cpu_child(devices: int) -> None:
    """In a process that JAX gives so many devices: prints the figures."""
    from coca_jax import sharding

    # AdamW: what Muon computes for the parameters does not grow with the batch, and is shared by the devices.
    c = recipe("configs/quickstart.py", 16, devices, devices, optimizer=config.Optimizer(name="adamw"))
    mesh = sharding.make_mesh((1, devices, 1))
    print(json.dumps(figures(c, devices, compiled.compile_on(c, mesh))))


def cpu() -> list[dict[str, Any]]:
    lines = []
    for devices in tqdm((1, 2, 4, 8), unit="program"):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        command = [sys.executable, "-m", "benchmarks.scaling", "cpu", f"--child={devices}"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    return lines


def tpu(rows: int) -> list[dict[str, Any]]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only counts parameters
    lines = []
    for name in tqdm(CHIPS, unit="program"):
        slices = topology.parse_topology(name)
        c = recipe("configs/coca_base.py", rows, slices.chips, 16)
        lines.append(figures(c, slices.chips, compiled.measure(c, slices, timeout=1500)))
    return lines


def loss_memory() -> dict[str, Any]:
    """Temporaries of the losses with their gradients, MiB a device, all at once and in parts."""
    from benchmarks import losses

    out: dict[str, Any] = {"topology": "v5e:4x4", "contrastive": [], "captioning": []}
    for batch in tqdm((1024, 2048, 4096, 8192, 16_384, 32_768, 65_536), unit="batch"):
        options = losses.parse([f"--batch={batch}"])
        mesh = losses.make_mesh(options.topology, "")
        out["contrastive"].append({"batch": batch} | _temporaries(losses.contrastive_cases(options, mesh)[:2], mesh))
    for vocab in tqdm((8192, 16_384, 32_768, 65_536, 131_072, 262_144), unit="vocabulary"):
        options = losses.parse([f"--vocab={vocab}"])
        out["captioning"].append({"vocab": vocab} | _temporaries(losses.captioning_cases(options, mesh), mesh))
    return out


def _temporaries(cases: Any, mesh: Any) -> dict[str, float]:
    from benchmarks import losses

    sizes = [losses.compiled(case, mesh).memory_analysis().temp_size_in_bytes / MIB for case in cases]
    return dict(zip(("whole", "parts"), sizes, strict=True))


def table(lines: list[dict[str, Any]]) -> str:
    header = ["devices", "replica x fsdp", "TFLOP a device", "GiB a device", "MB sent a device", "theory, float32"]
    rows = [
        [
            *(str(line["devices"]), " x ".join(map(str, line["mesh"])), f"{line['tflops']:.4g}"),
            *(f"{line['memory_gib']:.3g}", f"{line['sent_mb']:.4g}", f"{line['theory_mb']:.4g}"),
        ]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---:"] * len(header), *rows])


def plot() -> list[Path]:
    """Draws what is in benchmarks/results."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "tpu", "losses")}
    scaling = Figure(figsize=(10, 3.2), layout="constrained")
    axes = scaling.subplots(1, 3)
    for name, style in (("cpu", "o-"), ("tpu", "s-")):
        lines = results[name]
        devices = [line["devices"] for line in lines]
        label = "quickstart, virtual CPU devices, fsdp" if name == "cpu" else "coca_base, TPU v4, fsdp 16 x replicas"
        for axis, key in zip(axes[:2], ("tflops", "memory_gib"), strict=True):
            axis.plot(devices, [line[key] / lines[-1][key] for line in lines], style, label=label)
        # Of what theory has in float32: there are two lines because a compiler may send half of it, in bfloat16.
        ratios = [line["sent_mb"] / line["theory_mb"] if line["theory_mb"] else 1.0 for line in lines]
        axes[2].plot(devices, ratios, style, label=label)
    for bound in (0.5, 1.0):
        axes[2].axhline(bound, color="black", linestyle=":")
    titles = ("FLOPs a device, last = 1", "memory a device, last = 1", "bytes sent / theory; dotted: bfloat16, float32")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="devices", xscale="log", ylim=(0, 1.1 * axis.get_ylim()[1]))
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes[2].legend(fontsize=6)

    memory = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (name, key) in zip(
        memory.subplots(1, 2), (("contrastive", "batch"), ("captioning", "vocab")), strict=True
    ):
        lines = results["losses"][name]
        for way, label in (("whole", "all at once"), ("parts", "tiles" if key == "batch" else "chunks")):
            axis.plot([line[key] for line in lines], [line[way] for line in lines], "o-", label=label)
        axis.set(title=f"{name} loss, temporaries a chip", xlabel=key, ylabel="MiB")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:.0f}k"))
        axis.legend()
    files = []
    for figure, name in ((scaling, "scaling"), (memory, "loss_memory")):
        files.append(REPOSITORY / "docs" / f"{name}.png")
        figure.savefig(files[-1], dpi=90, metadata={"Software": None})
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cpu", "tpu", "losses", "plot"))
    parser.add_argument("--rows", type=int, default=32, help="of the batch, a TPU chip; default: %(default)s")
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return cpu_child(args.child)
    if args.what == "plot":
        return print(*plot(), sep="\n")
    found: Any = {"cpu": cpu, "tpu": lambda: tpu(args.rows), "losses": loss_memory}[args.what]()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1) if args.what == "losses" else table(found))
    return None


if __name__ == "__main__":
    main()
