"""Compiles the real training step for a slice that is not there, and measures the program. In a process of its own.

    measure(c, topology, timeout=1500)

A process of its own, because a compilation cannot be interrupted otherwise, because libtpu may end the process that it
is in, and because it writes to the terminal what nobody needs.
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

from coca_jax import config
from coca_jax.plan.topology import Topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a compiled step. Bytes and FLOPs are those of one chip and one step.

    Attributes:
      memory: bytes by kind; empty where the program did not compile.
      needed: bytes in all, also where they are more than there are; 0 where even that is not known.
      executed_flops: of the matrix products that are computed, those of recomputation and of the optimiser included.
      uncounted: parts whose products cannot be counted (a kernel that does not say), by name.
      collectives, exposed, hbm, hbm_apart, product_cycles, unknown_loops: see hlo.Traffic.
      compile_seconds: how long lowering and compiling took.
      error: why there is no program; empty if there is one.
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
    """Compiles in another process and waits for it.

    Args:
      c: checked against the topology.
      topology: to compile for.
      timeout: seconds, after which the process is ended.
      tick: called about once a second.

    Returns:
      What was measured; with `error` set where it did not compile, was too slow, or its process died.
    """
    order = {"config": json.loads(config.to_json(c)), "topology": topology.name, "slices": topology.slices}
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google Cloud what machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a kept program cannot be measured, and was not compiled now
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, "answer.json")
        with open(os.path.join(folder, "said"), "w+", errors="replace") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "coca_jax.plan.compiled", answer],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=environment,
                text=True,
            )
            try:
                assert child.stdin
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    json.dump(order, child.stdin)
                while child.poll() is None:
                    seconds = time.monotonic() - started
                    if seconds > timeout:
                        return Measured(compile_seconds=seconds, error=f"not compiled in {timeout:.0f} s (--timeout)")
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
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
        seconds = time.monotonic() - started
        reason = lines[-1] if lines else f"exit status {child.returncode}"
        return Measured(compile_seconds=seconds, error=f"the compiling process ended: {' '.join(reason.split())[:500]}")


def too_large(message: str) -> float | None:
    """Bytes that a program would take, from the compiler's message that they are too many; None of other messages."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return float(found.group(1)) * units[found.group(2)]
    if found := re.search(r"total memory required for [^(]*\(([\d.]+)([KMGT])\) exceeds available HBM", message):
        return float(found.group(1)) * units[found.group(2)]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# In the other process


def compile_here(c: config.Config, topology: Topology) -> Measured:
    """Compiles in this process, whose environment is as `measure` sets it."""
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
    """Compiles in this process for a mesh of devices, there or not."""
    import jax

    from coca_jax.plan import activations, hlo, products

    rows = c.batch_size / c.microbatches / (mesh.shape["replica"] * mesh.shape["fsdp"])
    kept = activations.bytes_of_a_row(c, rows) * rows
    traced, state, batch = trace_step(c, mesh)
    with jax.set_mesh(mesh):
        count = products.flops(traced.jaxpr.jaxpr, mesh.size)
        started = time.monotonic()
        try:
            program = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return Measured(
                needed=too_large(str(error)) or 0.0,
                executed_flops=count.flops / mesh.size,
                uncounted=tuple(sorted(count.unknown)),
                compile_seconds=time.monotonic() - started,
                error=_first_line(error),
            )
        seconds = time.monotonic() - started
        memory = _memory(program.memory_analysis(), state, batch, kept)
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
    """Why a compiled program has no text, and what helps: libtpu may be newer than what this jaxlib understands."""
    wanted = [r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "libtpu"))
    return (
        f"compiled, but {versions} do not go together ({_first_line(error)}): pip install '{wanted[0]}', which this "
        "JAX is released with"
    )


def trace_step(c: config.Config, mesh: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The training step traced for a mesh (a `jax.stages.Traced`), and the shapes of its state and batch."""
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


def abstract_batch(c: config.Config, place: Any) -> dict[str, Any]:
    """A training batch as the pipeline places it, in shapes alone."""
    import jax
    import jax.numpy as jnp

    from coca_jax.train import state as states

    size = c.model.image.size
    shapes = {
        "images": ((c.batch_size, *states.frames_of(c), size, size, 3), jnp.uint8),
        "tokens": ((c.batch_size, c.model.text.length), jnp.int32),
        "problem": ((c.batch_size,), jnp.int8),
    } | ({"labels": ((c.batch_size,), jnp.int32)} if c.loss.lambda_cls else {})
    return {name: jax.ShapeDtypeStruct(*shape, sharding=place) for name, shape in shapes.items()}


def _memory(compiled: Any, state: Any, batch: Any, kept: float) -> dict[str, float]:
    """Bytes of one chip by kind. Arguments are counted by their shards; what the compiler says beyond is padding."""
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
    # The new state takes the old one's place: what is left of the results are the metrics.
    kinds["results"] = float(compiled.output_size_in_bytes - compiled.alias_size_in_bytes)
    # The compiler gives the sum. Where it has found a way to keep less, all that is not kept is none of it.
    kinds["activations"] = min(kept, float(compiled.temp_size_in_bytes))
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

    compiler.setup(["tpu"])  # the flags that a run on TPUs has
    order = json.load(sys.stdin)
    c = config.from_config_dict(order["config"])
    try:
        measured = compile_here(c, topologies.read(order["topology"], order["slices"]))
    except Exception as error:  # what Python would print of it ends with a note of JAX's about tracebacks
        measured = Measured(error=f"{type(error).__name__}: {_first_line(error)}")
    with open(answer + ".partial", "w") as file:
        json.dump(dataclasses.asdict(measured), file)
    os.replace(answer + ".partial", answer)


if __name__ == "__main__":
    _main(sys.argv[1])
