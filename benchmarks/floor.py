"""What the parts of a train step take alone, added up: what the step could take if its parts stood in no other's way.

    python -m benchmarks.floor                  # coca_ViT-B-32, batch 8, float32; some minutes on a CPU
    python -m benchmarks.floor --model=small --batch=32

Each part, with its backward pass, is a program of its own, of the step's shapes and the step's code, over arrays that
mostly stay in the caches, as the step's do not. The step can be quicker than their sum where parts run side by side,
slower where they wait for one another. Not in it: residual sums, embeddings, the pooler, the contrastive loss, and
taking the layers' parameters out of their stacks. "Of its products": FLOPs at the rate of a square product, the ceiling
of benchmarks.train_step; "beside them": the rest of the part's time. Where that adds up to more than a ninth of the
products, running these parts one after the other cannot reach 90% of the ceiling.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from coca_jax import compiler

if __name__ == "__main__":
    os.environ.setdefault(compiler.KEEP_MEMORY, "on")  # as benchmarks.train_step has it
    compiler.setup()  # as main does, before JAX is imported

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import train_step
from coca_jax import config, losses, sharding
from coca_jax.model import layers, products
from coca_jax.model.attention import attend
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from coca_jax.train import step as steps

_COPIES = 4  # of a part in one program, which share the time that a call takes by itself


class Part(NamedTuple):
    """What the step has so many times: a function of arrays of these shapes, and the FLOPs of its products, once."""

    name: str
    times: int
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    flops: float = 0.0


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function of arrays: one of these and of its result's gradient, that gives the result and their gradients."""

    def both(*arrays: Any) -> Any:
        result, backward = jax.vjp(function, *arrays[:-1])
        return result, backward(arrays[-1])

    return both


def parts(c: config.Config) -> Iterator[Part]:
    """Those of the blocks, and the captioning loss, of open_clip's kind of CoCa."""
    model, image, text, b = c.model, c.model.image, c.model.text, c.batch_size
    t, m = text.length, model.pooler.queries - (model.pooler.kind == "single")
    n = (image.size // image.patch) ** 2 + image.class_token
    dense: collections.Counter[tuple[int, int, int]] = collections.Counter()
    norms: collections.Counter[tuple[int, int]] = collections.Counter()
    gelus: collections.Counter[tuple[int, int]] = collections.Counter()
    attention: collections.Counter[tuple[int, int, int, int, bool]] = collections.Counter()

    def add(depth: int, s: int, tower: config.ImageEncoder | config.TextDecoder, causal: bool, keys: int = 0) -> None:
        d, f, mlps = tower.width, tower.mlp_dim, 1 + bool(keys and text.cross_mlp)
        dense[b * s, d, d] += depth * (6 if keys else 4)
        dense[b * s, d, f] += depth * mlps
        dense[b * s, f, d] += depth * mlps
        gelus[b * s, f] += depth * mlps
        norms[b * s, d] += depth * (1 + mlps + bool(keys))
        attention[s, s, tower.heads, d // tower.heads, causal] += depth
        if keys:
            dense[b * keys, d, d] += 2 * depth
            norms[b * keys, d] += depth * text.cross_kv_norm
            attention[s, keys, tower.heads, d // tower.heads, False] += depth

    add(image.depth, n, image, causal=False)
    add(text.n_uni, t + 1, text, causal=True)
    add(text.n_multi, t, text, causal=True, keys=m)

    for (rows, inputs, outputs), count in dense.items():
        shapes = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
        flops = 3.0 * 2 * rows * inputs * outputs
        function = with_gradients(lambda x, kernel, bias: products.dot(x, kernel, bias=bias))
        yield Part(f"product {rows} x {inputs} x {outputs}", count, function, shapes, flops)
    for (s, keys, heads, k, causal), count in attention.items():
        query, key = (b, s, heads, k), (b, keys, heads, k)
        function = with_gradients(functools.partial(attend, is_causal=causal, implementation=model.attention))
        flops = 3.0 * 4 * b * s * keys * heads * k
        yield Part(f"attention {s} x {keys}, {heads} heads", count, function, (query, key, key, query), flops)
    norm = layers.layer_norm(model)
    for (rows, d), count in norms.items():
        function = with_gradients(lambda x, scale, bias: norm.apply({"params": {"scale": scale, "bias": bias}}, x))
        yield Part(f"norm {rows} x {d}", count, function, ((rows, d), (d,), (d,), (rows, d)))
    for (rows, f), count in gelus.items():
        function = with_gradients(functools.partial(layers.gelu, approximate=model.gelu == "tanh"))
        yield Part(f"GELU {rows} x {f}", count, function, ((rows, f),) * 2)

    def captioning(hidden: Any, head: Any) -> Any:
        tokens = jnp.ones((b, t), jnp.int32)
        loss = functools.partial(losses.captioning, tokens=tokens, pad_id=text.pad_id, chunk=c.loss.caption_chunk)
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    given = ((b, t, text.width), (text.width, text.vocab_size))
    yield Part("captioning loss", 1, captioning, given, 3.0 * 2 * b * t * text.width * text.vocab_size)


def timed(part: Part, dtype: Any) -> Callable[[], float]:
    """A function that runs a part and says how many seconds one of it took."""
    copies = _COPIES if part.times > 1 else 1
    keys = jax.random.split(jax.random.key(0), copies * len(part.shapes))
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, part.shapes * copies, strict=True)]
    each = len(part.shapes)
    program = jax.jit(lambda arrays: [part.function(*arrays[i : i + each]) for i in range(0, len(arrays), each)])
    jax.block_until_ready(program(arrays))

    def run() -> float:
        started, times = time.perf_counter(), 0
        while not times or time.perf_counter() - started < 0.1:
            jax.block_until_ready(program(arrays))
            times += 1
        return (time.perf_counter() - started) / times / copies

    return run


def optimiser(c: config.Config) -> Callable[[], float]:
    """The step itself with gradients that are given, on one device."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    made = optimizers.of_run(c, states.abstract_parameters(c))
    with jax.set_mesh(mesh):
        held = states.real(c, made, mesh)
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), held.params)

    def update(state: Any, gradients: Any) -> Any:
        of_loss, steps.gradients_of = steps.gradients_of, lambda *_: (gradients, {"loss": jnp.float32(1.0)})
        try:  # while it is traced
            return steps.train_step(c, made, state, {})
        finally:
            steps.gradients_of = of_loss

    program = jax.jit(update, donate_argnums=0)
    held, _ = jax.block_until_ready(program(held, gradients))

    def run() -> float:
        nonlocal held
        started = time.perf_counter()
        held, _ = jax.block_until_ready(program(held, gradients))
        return time.perf_counter() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coca_ViT-B-32", choices=("coca_ViT-B-32", "small"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each part; default: %(default)s")
    args = parser.parse_args()
    from benchmarks.our_step import matmul_rate  # which sets the compiler up too

    values, _ = train_step.configuration(
        train_step.parse([f"--{k}={getattr(args, k)}" for k in ("model", "batch", "dtype")])
    )
    c = config.from_config_dict(values)
    found = list(parts(c))
    runs = {part.name: timed(part, jnp.dtype(args.dtype)) for part in tqdm(found, desc="compiling", leave=False)}
    runs["optimiser"] = optimiser(c)
    found.append(Part("optimiser", 1, lambda: None, ()))
    rates: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
        rates.append(matmul_rate(2048, args.dtype))
        for name, run in runs.items():
            seconds[name].append(run())
    ceiling = statistics.median(rates)
    print(
        f"{args.model}, batch {args.batch}, {args.dtype}; {jax.devices()[0].device_kind}, {platform.machine()}, jax "
        f"{jax.__version__}, {datetime.date.today()}; ceiling {ceiling / 1e9:.1f} GFLOP/s"
    )
    print(f"{'':36}{'times':>6}{'ms each':>10}{'s':>8}{'of its products':>18}{'beside them':>14}")
    total = of_products = 0.0
    for part in found:
        each = statistics.median(seconds[part.name])
        whole, ideal = part.times * each, part.times * part.flops / ceiling
        total, of_products = total + whole, of_products + ideal
        print(f"{part.name:36}{part.times:6}{1e3 * each:10.3f}{whole:8.3f}{ideal:18.3f}{whole - ideal:14.3f}")
    print(f"{'all':36}{'':16}{total:8.3f}{of_products:18.3f}{total - of_products:14.3f}")
    print(f"the parts' sum has {of_products / total:.0%} of the ceiling")


if __name__ == "__main__":
    main()
