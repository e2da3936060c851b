"""Memory of the losses with their gradients, compiled ahead of time, all at once and in parts; on request their time.

    python -m benchmarks.losses                                  # 16 chips of TPU v5e, which need not be there: libtpu
    python -m benchmarks.losses --topology=cpu --batch=8192      # without libtpu: one CPU device
    python -m benchmarks.losses --topology=cpu --only=contrastive --batch=4096 --tile=1024 --time=5

"Temporaries" are what XLA's buffer assignment allots a chip beside arguments and results: deterministic, nothing runs.
The features are arguments, as they come from the model; their gradients are results.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before jax is imported: libtpu compiles without asking for a TPU, beside other processes that do the same.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # after its environment
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from coca_jax import losses, sharding

Case = tuple[str, Callable[..., Any], list[jax.ShapeDtypeStruct]]
MIB = 2**20


def make_mesh(topology: str, shape: str) -> Mesh:
    """The mesh of a topology such as `v5e:4x4` (all fsdp unless a shape is given), or of one CPU device."""
    if topology == "cpu":
        devices = jax.devices("cpu")[:1]
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = [int(n) for n in shape.split(",")] if shape else [1, len(devices), 1]
    return sharding.make_mesh((sizes[0], sizes[1], sizes[2]), devices)


def contrastive_cases(options: argparse.Namespace, mesh: Mesh) -> list[Case]:
    """Value and gradients of both contrastive losses, all at once and in tiles."""
    rows = NamedSharding(mesh, sharding.spec("batch", None))
    features = jax.ShapeDtypeStruct((options.batch, options.dim), jnp.dtype(options.dtype), sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    cases: list[Case] = []
    for kind in ("softmax", "sigmoid"):
        for name, tile in (("all at once", 0), (f"tiles of {options.tile}", options.tile)):
            loss = functools.partial(losses.contrastive, kind=kind, tile=tile)
            gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
            cases.append((f"{kind}, {name}", gradient, [features, features, scalar, scalar]))
    return cases


def captioning_cases(options: argparse.Namespace, mesh: Mesh) -> list[Case]:
    """Value and gradients (of the hidden states and of the head) of the captioning loss, all at once and in chunks."""
    rows = NamedSharding(mesh, sharding.spec("batch"))
    hidden = jax.ShapeDtypeStruct(
        (options.caption_batch, options.length, options.width), jnp.dtype(options.dtype), sharding=rows
    )
    tokens = jax.ShapeDtypeStruct((options.caption_batch, options.length), jnp.int32, sharding=rows)
    head_place = NamedSharding(mesh, sharding.spec("embed", "vocab"))
    head = jax.ShapeDtypeStruct((options.width, options.vocab), jnp.float32, sharding=head_place)
    cases: list[Case] = []
    for name, chunk in (("all at once", 0), (f"chunks of {options.chunk}", options.chunk)):
        loss = functools.partial(losses.captioning, pad_id=0, chunk=chunk)
        cases.append((f"captioning, {name}", jax.value_and_grad(loss, argnums=(0, 1)), [hidden, head, tokens]))
    return cases


def compiled(case: Case, mesh: Mesh) -> Any:
    """The compiled program; gradients lie where what they are of does."""
    _, function, arguments = case
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(function, *arguments)
        places = tuple(a.sharding for a in arguments if a.dtype != jnp.int32)
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), abstract[0])
        return jax.jit(function, out_shardings=(whole, places)).lower(*arguments).compile()


def measure(case: Case, mesh: Mesh, times: int) -> list[str]:
    """A line of the table. Where the compiler finds no room: what it says it would need."""
    started = time.perf_counter()
    try:
        function = compiled(case, mesh)
    except jax.errors.JaxRuntimeError as error:
        # "... temporaries (16.32G) exceeds available HBM (15.75G)", in other versions "Used 16.32G of 15.75G hbm".
        needs = re.findall(r"\b\d+(?:\.\d+)?[KMG]\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(needs) < 2:
            raise
        failed = [case[0], f"no room: {needs[0]} of {needs[1]}", f"{time.perf_counter() - started:.1f}"]
        return [*failed, "-"] if times else failed
    seconds = time.perf_counter() - started
    line = [case[0], f"{function.memory_analysis().temp_size_in_bytes / MIB:.1f}", f"{seconds:.1f}"]
    return [*line, f"{median_time(function, case[2], times) * 1e3:.1f}"] if times else line


def median_time(function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct], times: int) -> float:
    """Median seconds of a call, after one that is not counted, on random vectors of unit length and random ids."""
    arguments = []
    for number, a in enumerate(shapes):
        key = jax.random.key(number)
        if a.dtype == jnp.int32:
            x = jax.random.randint(key, a.shape, 1, 100)
        elif a.shape:
            x = jax.random.normal(key, a.shape)
            x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
        else:
            x = jnp.float32(10.0 if number == 2 else -10.0)
        arguments.append(jax.device_put(x.astype(a.dtype), a.sharding))
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="TPUs as libtpu names them, or cpu; default: %(default)s")
    parser.add_argument("--mesh", default="", help="replica,fsdp,tensor, e.g. 2,8,1; default: all fsdp")
    parser.add_argument("--only", choices=("contrastive", "captioning"), help="one of the losses; default: both")
    parser.add_argument("--way", choices=("whole", "tiles"), help="all at once, or in tiles and chunks; default: both")
    parser.add_argument("--dtype", default="bfloat16", help="of features and hidden states; default: %(default)s")
    for name, value, text in (
        ("batch", 65_536, "rows of the contrastive losses, over all chips"),
        ("dim", 1024, "of the contrastive space"),
        ("tile", 4096, "config.loss.contrastive_tile"),
        ("caption_batch", 1024, "captions, over all chips"),
        ("length", 64, "tokens of a caption"),
        ("width", 768, "of the text decoder"),
        ("vocab", 64_000, "vocabulary"),
        ("chunk", 1024, "config.loss.caption_chunk"),
        ("time", 0, "also run each so many times and print the median; only with --topology=cpu"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text}; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.time and options.topology != "cpu":
        parser.error(f"--time={options.time} runs the losses: it needs --topology=cpu, not {options.topology}")
    return options


def main() -> None:
    options = parse()
    mesh = make_mesh(options.topology, options.mesh)
    cases = contrastive_cases(options, mesh) if options.only != "captioning" else []
    cases += captioning_cases(options, mesh) if options.only != "contrastive" else []
    if options.way:
        cases = [case for case in cases if case[0].endswith("all at once") == (options.way == "whole")]
    lines = [measure(case, mesh, options.time) for case in tqdm(cases, unit="program")]
    print(f"jax {jax.__version__}, {options.topology}, mesh {dict(mesh.shape)}, {options.dtype}")
    print(f"contrastive: batch {options.batch}, dim {options.dim}; captioning: batch {options.caption_batch}, ", end="")
    print(f"length {options.length}, width {options.width}, vocabulary {options.vocab}")
    header = [
        "loss and gradients",
        "temporaries, MiB a chip",
        "compiled in, s",
        *(["median, ms"] if options.time else []),
    ]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, *lines]:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))


if __name__ == "__main__":
    main()
