"""The train step compiled for an NVIDIA H100 that need not be there: what it holds, moves and computes. Nothing runs.

    python -m benchmarks.gpu_program            # coca_large at 288 px, 64 pairs a step: minutes of a CPU
    python -m benchmarks.gpu_program --batch=128 --ours='apart: model.image.scan_unroll=0 model.text.scan_unroll=0'

Needs XLA's compiler for NVIDIA GPUs, 6 GB: pip install "coca_jax[gpu]". The attention is cuDNN's but where a variant
says otherwise. Without a device XLA cannot try out kernels: all products are cuBLAS's, which on a device Triton's
replace where they are quicker.

"Products", "attention" and "the rest": what their kernels read and write, workspaces left out, each kernel as if it
found nothing in the cache (50 MB). "S at best" is what the model's products need at the peak of the data sheet, and the
others at its memory's, one after the other: an estimate, and no measurement. "Of peak": the model FLOPs utilisation
that it would be.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import runpy
import time
from typing import Any

# Without a device there is nothing to tune on, and Triton's product does not compile for some shapes.
_UNTUNED = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
if __name__ == "__main__":  # before JAX is imported
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_UNTUNED}"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # the GPU is only compiled for
    from coca_jax import compiler

    compiler.setup(["gpu"])

from benchmarks.train_step import changed  # noqa: E402
from coca_jax import chips, config  # noqa: E402

# What the compiler asks of a device: of an H100 SXM, in the text form of XLA's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 1 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GB, GIB = 1e9, 2**30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/coca_large.py", help="recipe; default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step of one GPU; default: %(default)s")
    parser.add_argument("--ours", action="append", default=[], help="'name: key=value ...', a variant; repeatable")
    return parser.parse_args()


def devices() -> Any:
    """The H100 that is compiled for.

    Raises:
      SystemExit: the compiler for NVIDIA GPUs is not installed.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    except NotImplementedError as error:
        raise SystemExit(f'error: {error}: pip install "coca_jax[gpu]"') from error


def compile_step(c: config.Config, device: Any) -> Any:
    """The whole step on one device, compiled."""
    import jax

    from coca_jax import sharding
    from coca_jax.plan.compiled import trace_step

    mesh = sharding.make_mesh((1, 1, 1), [device])
    with jax.set_mesh(mesh):
        return trace_step(c, mesh)[0].lower().compile()


def main() -> None:
    args = parse()
    (device,) = devices()
    import jax

    from coca_jax.model import flops
    from coca_jax.plan import hlo

    chip = chips.from_device_kind(device.device_kind)
    assert chip is not None
    c = config.from_config_dict(runpy.run_path(args.config)["get_config"]())
    c = dataclasses.replace(
        c,
        batch_size=args.batch,
        mesh=config.Mesh(replica=1, fsdp=1),
        model=dataclasses.replace(c.model, attention="cudnn"),
    )
    print(f"{args.config}, batch {args.batch}, {device.device_kind}, not run; jax {jax.__version__}, ", end="")
    print(f"{datetime.date.today()}; peak {chip.peak_tflops} TFLOP/s, {chip.hbm_gbs} GB/s")
    head = ("state GiB", "program GiB", "TFLOP", "products GB", "attention GB", "rest GB", "s at best", "of peak")
    print(f"{'':24}{''.join(f'{name:>14}' for name in head)}{'compiled in s':>15}")
    for text in args.ours or ["as the recipe is:"]:
        name, _, changes = text.partition(":")
        variant = config.from_config_dict(changed(c, changes)[0])
        config.check(variant, platform="gpu")
        started = time.monotonic()
        program = compile_step(variant, device)
        seconds = time.monotonic() - started
        memory, moved = program.memory_analysis(), hlo.traffic(program.as_text(), 1).hbm_of
        products = sum(size for kind, size in moved.items() if kind.startswith("__cublas"))
        attention = sum(size for kind, size in moved.items() if kind.startswith("__cudnn"))
        rest = sum(moved.values()) - products - attention
        wanted = flops.train_step_flops(variant) / (chip.peak_tflops * 1e12)
        best = wanted + (attention + rest) / (chip.hbm_gbs * GB)
        figures = (
            *(f"{memory.argument_size_in_bytes / GIB:.2f}", f"{memory.temp_size_in_bytes / GIB:.2f}"),
            *(f"{flops.train_step_flops(variant) / 1e12:.2f}", f"{products / GB:.1f}", f"{attention / GB:.1f}"),
            *(f"{rest / GB:.1f}", f"{best:.4f}", f"{wanted / best:.0%}"),
        )
        print(f"{name:24}{''.join(f'{figure:>14}' for figure in figures)}{seconds:15.0f}", flush=True)


if __name__ == "__main__":
    main()
