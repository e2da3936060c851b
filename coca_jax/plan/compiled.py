"""Compile the real training step for an absent slice and measure the program, in a separate process.

A separate process, because a compilation cannot be interrupted otherwise, and because libtpu may abort its process and
writes noise to the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from coca_jax import config, parent
from coca_jax.plan.topology import Topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Measured:
    """Properties of a compiled step. Bytes and FLOPs are per chip and per step.

    Attributes:
      memory: Bytes by kind; empty if the program did not compile.
      needed: Total bytes, also if the chip has less memory; 0 if unknown.
      executed_flops: FLOPs of all matrix products that run, including recomputation and the optimizer.
      uncounted: Names of parts whose products cannot be counted (kernels without a cost estimate).
      collectives, exposed, hbm, hbm_apart, product_cycles, unknown_loops: See hlo.Traffic.
      compile_seconds: Time for lowering and compiling.
      error: Why there is no program; empty if there is one.
    """

    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    needed: float = 0.0
    executed_flops: float = 0.0
    uncounted: tuple[str, ...] = ()
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    exposed: float = 0.0
    hbm: float = 0.0
    hbm_apart: float = 0.0
    product_cycles: float = 0.0
    unknown_loops: int = 0
    compile_seconds: float = 0.0
    error: str = ""


def measure(
    c: config.Config, topology: Topology, timeout: float, tick: Callable[[], object] = lambda: None
) -> Measured:
    """Compile in another process and wait for it.

    Args:
      c: Configuration, already checked against the topology.
      topology: Topology to compile for.
      timeout: Seconds after which the process is killed.
      tick: Called about once a second.

    Returns:
      The measurements, with `error` set if compilation failed, timed out, or its process died.
    """
    request = {"config": json.loads(config.to_json(c)), "topology": topology.name, "slices": topology.slices}
    environment = {
        **os.environ,
        **parent.environment(),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not query Google Cloud's metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program has no measurements or compile time
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        answer = os.path.join(directory, "answer.json")
        with open(os.path.join(directory, "log"), "w+", errors="replace") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "coca_jax.plan.compiled", answer],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                text=True,
            )
            try:
                assert child.stdin
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    json.dump(request, child.stdin)
                while child.poll() is None:
                    seconds = time.monotonic() - started
                    if seconds > timeout:
                        return Measured(
                            compile_seconds=seconds, error=f"compilation exceeded --timeout={timeout:.0f} s"
                        )
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(min(1.0, timeout - seconds + 0.001))
                    tick()
            finally:
                child.kill()
                child.wait()
            if os.path.exists(answer):
                with open(answer) as file:
                    values = json.load(file)
                return Measured(**{**values, "uncounted": tuple(values["uncounted"])})
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        seconds = time.monotonic() - started
        reason = lines[-1] if lines else f"exit status {child.returncode}"
        return Measured(compile_seconds=seconds, error=f"the compiler process died: {' '.join(reason.split())[:500]}")


def out_of_memory_bytes(message: str) -> float | None:
    """Bytes that a program needs, parsed from the compiler's out-of-memory message; None for other messages."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return float(found.group(1)) * units[found.group(2)]
    if found := re.search(r"total memory required for [^(]*\(([\d.]+)([KMGT])\) exceeds available HBM", message):
        return float(found.group(1)) * units[found.group(2)]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Runs in the other process


def compile_here(c: config.Config, topology: Topology) -> Measured:
    """Compile in this process, whose environment `measure` has set."""
    import jax
    from jax.experimental import topologies

    from coca_jax import sharding

    try:
        devices = topologies.get_topology_desc(**topology.options()).devices
    except jax.errors.JaxRuntimeError as error:
        return Measured(error=f"libtpu does not know {topology}: {_first_line(error)}")
    if len(devices) != topology.chips:
        return Measured(error=f"libtpu gives {len(devices)} devices for the {topology.chips} chips of {topology}")
    shape = config.mesh_shape(c.mesh, len(devices), slice_count=topology.slices, platform="tpu")
    return compile_on(c, sharding.make_mesh(shape, devices, dcn=config.dcn_shape(c.mesh, topology.slices)))


def compile_on(c: config.Config, mesh: Any) -> Measured:
    """Compile in this process for a mesh of devices, which need not be present."""
    import jax

    from coca_jax.plan import activations, hlo, products

    rows = c.batch_size / c.microbatches / (mesh.shape["replica"] * mesh.shape["fsdp"])
    residual_bytes = activations.residual_bytes_per_row(c, rows) * rows
    traced, state, batch = trace_step(c, mesh)
    with jax.set_mesh(mesh):
        count = products.flops(traced.jaxpr.jaxpr, mesh.size)
        started = time.monotonic()
        try:
            program = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return Measured(
                needed=out_of_memory_bytes(str(error)) or 0.0,
                executed_flops=count.flops / mesh.size,
                uncounted=tuple(sorted(count.unknown)),
                compile_seconds=time.monotonic() - started,
                error=_first_line(error),
            )
        seconds = time.monotonic() - started
        memory = _memory(program.memory_analysis(), state, batch, residual_bytes)
        try:
            text = program.as_text()
        except jax.errors.JaxRuntimeError as error:
            return Measured(
                memory=memory,
                needed=sum(memory.values()),
                executed_flops=count.flops / mesh.size,
                uncounted=tuple(sorted(count.unknown)),
                compile_seconds=seconds,
                error=unreadable(error),
            )
        traffic = hlo.traffic(text, mesh.size)
    return Measured(
        memory=memory,
        needed=sum(memory.values()),
        executed_flops=count.flops / mesh.size,
        uncounted=tuple(sorted(count.unknown)),
        collectives=traffic.collectives,
        exposed=traffic.exposed,
        hbm=traffic.hbm,
        hbm_apart=traffic.hbm_apart,
        product_cycles=traffic.product_cycles,
        unknown_loops=traffic.unknown_loops,
        compile_seconds=seconds,
    )


def unreadable(error: BaseException) -> str:
    """Explain why a compiled program has no text: libtpu may be newer than what this jaxlib can read."""
    required = [r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "libtpu"))
    return (
        f"compiled, but {versions} are incompatible ({_first_line(error)}): pip install '{required[0]}', the version "
        "for this JAX"
    )


def trace_step(c: config.Config, mesh: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Trace the training step for a mesh (a `jax.stages.Traced`); also return the shapes of its state and batch."""
    import jax

    from coca_jax import sharding
    from coca_jax.train import optimizer as optimizers
    from coca_jax.train import state as states
    from coca_jax.train.step import compile_step

    optimizer = optimizers.of_run(c, states.abstract_parameters(c))
    with jax.set_mesh(mesh):
        state = states.abstract(c, optimizer, mesh)
        batch = abstract_batch(c, sharding.batch_sharding(mesh))
        step: Any = compile_step(c, optimizer, mesh, state)
        return step.trace(state, batch), state, batch


def abstract_batch(c: config.Config, sharding: Any) -> dict[str, Any]:
    """Shapes of a training batch as the pipeline shards it."""
    import jax
    import jax.numpy as jnp

    from coca_jax.train import state as states

    size = c.model.image.size
    shapes = {
        "images": ((c.batch_size, *states.frames_of(c), size, size, 3), jnp.uint8),
        "tokens": ((c.batch_size, c.model.text.length), jnp.int32),
        "problem": ((c.batch_size,), jnp.int8),
    } | ({"labels": ((c.batch_size,), jnp.int32)} if c.loss.lambda_cls else {})
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def _memory(compiled: Any, state: Any, batch: Any, residual_bytes: float) -> dict[str, float]:
    """Bytes per chip by kind. What the compiler reports for arguments beyond their shards is padding."""
    import jax

    def held(tree: Any) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.number)]
        sizes = [
            jax.numpy.dtype(leaf.dtype).itemsize * _elements(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
        ]
        return float(sum(sizes))

    kinds = {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "moving average": held(state.ema),
        "batch": held(batch),
    }
    kinds["padding of these"] = max(0.0, compiled.argument_size_in_bytes - sum(kinds.values()))
    # The new state reuses the old one's buffers, so only metrics remain.
    kinds["results"] = float(compiled.output_size_in_bytes - compiled.alias_size_in_bytes)
    # The compiler reports the sum only. It may keep less than the trace suggests; then no temporaries remain.
    kinds["activations"] = min(residual_bytes, float(compiled.temp_size_in_bytes))
    kinds["temporaries"] = compiled.temp_size_in_bytes - kinds["activations"]
    kinds["program"] = float(compiled.generated_code_size_in_bytes)
    return kinds


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:1000]


def _main(answer: str) -> None:
    from coca_jax import compiler
    from coca_jax.plan import topology as topologies

    parent.follow()
    compiler.setup(["tpu"])  # the compiler flags of a run on TPUs
    request = json.load(sys.stdin)
    c = config.from_config_dict(request["config"])
    try:
        measured = compile_here(c, topologies.parse_topology(request["topology"], request["slices"]))
    except Exception as error:  # Python's output would end with JAX's note about tracebacks
        measured = Measured(error=f"{type(error).__name__}: {_first_line(error)}")
    with open(answer + ".partial", "w") as file:
        json.dump(dataclasses.asdict(measured), file)
    os.replace(answer + ".partial", answer)


if __name__ == "__main__":
    _main(sys.argv[1])
