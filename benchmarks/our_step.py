"""One train step of ours, made when asked: our process of benchmarks/train_step.py.

The step is the one that the loop calls (`train.step.compile_step`), with everything that the loop has in it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import Answer, peak_memory, serve
from coca_jax import compiler

compiler.setup()  # as main does, before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import trace  # noqa: E402
from coca_jax import config, sharding  # noqa: E402
from coca_jax.model import flops  # noqa: E402
from coca_jax.train import optimizer as optimizers  # noqa: E402
from coca_jax.train import state as states  # noqa: E402
from coca_jax.train.step import compile_step  # noqa: E402


def matmul_rate(n: int, dtype: str) -> float:
    """FLOP/s of an n^3 product, the best of three."""
    x, product = jnp.ones((n, n), dtype), jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def batch_of(c: config.Config) -> dict[str, jax.Array]:
    """Random pictures and captions without padding."""
    rng, model = np.random.default_rng(0), c.model
    size, text = model.image.size, model.text
    images = rng.integers(0, 256, (c.batch_size, size, size, 3), dtype=np.uint8)
    tokens = rng.integers(1, text.vocab_size, (c.batch_size, text.length))
    return {"images": jnp.asarray(images), "tokens": jnp.asarray(tokens, jnp.int32)}


def open_worker(options: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    started = time.perf_counter()
    c = config.from_config_dict(options["config"])
    device = jax.devices()[0]
    config.check(c, platform=jax.default_backend())
    mesh = sharding.make_mesh((1, 1, 1), [device])
    shapes = states.abstract_parameters(c)
    optimizer = optimizers.of_run(c, shapes)
    with jax.set_mesh(mesh):
        state = states.real(c, optimizer, mesh)
        batch = batch_of(c)
        jitted: Any = compile_step(c, optimizer, mesh, states.abstract(c, optimizer, mesh))
        lowered = jitted.lower(state, batch)
        compiling = time.perf_counter()
        function = lowered.compile()
        compile_seconds = time.perf_counter() - compiling
        state, metrics = function(state, batch)
        first = float(metrics["loss"])
    memory: Any = function.memory_analysis()
    held = state

    def step() -> dict[str, Any]:
        nonlocal held
        held, metrics = function(held, batch)
        jax.block_until_ready((held, metrics))
        return metrics

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "step":
            started = time.perf_counter()
            for _ in range(request["steps"]):
                metrics = step()
            return {"seconds": (time.perf_counter() - started) / request["steps"], "loss": float(metrics["loss"])}
        if request["do"] == "matmul":
            return {"flops": matmul_rate(request["n"], options["dtype"])}
        if request["do"] == "parts":
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    step()
                parts = trace.parts(Path(folder), function.as_text())
            return parts
        statistics = device.memory_stats() or {}
        return {"peak_bytes": statistics.get("peak_bytes_in_use") or peak_memory()}

    known = {
        "parameters": states.parameter_count(shapes),
        "device": device.device_kind,
        "versions": f"jax {jax.__version__}",
        "loss": first,
        "step_flops": flops.train_step_flops(c),
        "compile_seconds": compile_seconds,
        "first_step_seconds": time.perf_counter() - started,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "platform": jax.default_backend(),
    }
    if folder := os.environ.get("COCA_JAX_BENCHMARK_HLO"):
        Path(folder).write_text(function.as_text())
        Path(folder + ".json").write_text(json.dumps(known))
    return known, answer


if __name__ == "__main__":
    serve(open_worker)
