"""Captions a second: with the cache of keys and values, against running the whole decoder again for each token.

    python -m benchmarks.decode     # coca_base, 8 pictures, 30 tokens; some minutes on a CPU
    python -m benchmarks.decode --peer=.venv-peers/bin/python    # coca_ViT-B-32 from pixels, and open_clip
    python -m benchmarks.decode --config=configs/coca_large.py --batch=64 --dtype=bfloat16

Random weights; the end of a caption is forbidden, so that every way makes as many tokens. The ways take turns in one
process; figures are medians, and ratios of them. The whole decoder runs over the full length each time, as one
compiled program must: that is what a decoder without a cache costs. With --peer, open_clip's `generate` decodes with
the same weights in a process of its own, both from the pictures on; how many of the greedy tokens agree is printed.
Decoding cannot be quicker than its parameters and the keys and values of the pictures can be read for each token: the
time that takes at the measured bandwidth of reading stands beside; encoding the pictures is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from coca_jax import compiler

compiler.setup()  # as the programs that decode do, before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.turns import Worker  # noqa: E402
from coca_jax import config, generate  # noqa: E402
from coca_jax.generate import Options  # noqa: E402
from coca_jax.interop import open_clip  # noqa: E402
from coca_jax.model.coca import CoCa  # noqa: E402
from coca_jax.train import state  # noqa: E402

BOS, EOS = 1, 2


def whole_decoder(model: config.Model, length: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Greedy decoding by one pass over all positions for each token: image keys and values too, as without a cache."""
    coca, pad = CoCa(model), model.text.pad_id

    def decode(params: Any, image_tokens: jax.Array) -> jax.Array:
        def logits(tokens: jax.Array) -> Any:
            def run(m: CoCa) -> Any:
                hidden, _ = m.text_decoder.encode(tokens, cls=False)
                return m.text_decoder.decode(hidden, image_tokens), m.head()

            return coca.apply({"params": params}, method=run)

        def step(at: jax.Array, tokens: jax.Array) -> jax.Array:
            hidden, head = logits(tokens)
            last = jax.lax.dynamic_index_in_dim(hidden, at - 1, 1, keepdims=False)
            scores = jnp.einsum("bd,dv->bv", last, head.astype(last.dtype), preferred_element_type=jnp.float32)
            new = jnp.argmax(scores.at[:, jnp.array([pad, BOS, EOS])].set(-jnp.inf), axis=1).astype(jnp.int32)
            return jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], at, axis=1)

        tokens = jnp.full((image_tokens.shape[0], length), pad, jnp.int32).at[:, 0].set(BOS)
        return jax.lax.fori_loop(1, length, step, tokens)

    return decode


def cached(model: config.Model, options: Options) -> Callable[[Any, jax.Array], jax.Array]:
    def decode(params: Any, image_tokens: jax.Array) -> jax.Array:
        # min_length keeps the end away, whose id is beyond what is drawn from otherwise.
        return generate.generate(model, params, image_tokens, options, bos_id=BOS, eos_id=EOS).tokens[:, 0]

    return decode


def from_pixels(model: config.Model, way: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    def decode(params: Any, images: jax.Array) -> jax.Array:
        output: Any = CoCa(model).apply({"params": params}, images, contrastive=False, method="encode_image")
        return way(params, output.image_tokens)

    return decode


def _configuration(args: argparse.Namespace) -> config.Config:
    recipe = args.config or ("" if args.peer else "configs/coca_base.py")
    if recipe:
        c = config.from_config_dict(runpy.run_path(recipe)["get_config"]())
    else:
        c = config.Config(model=open_clip.model_config("coca_ViT-B-32"))
    return dataclasses.replace(c, model=dataclasses.replace(c.model, dtype=args.dtype, attention="xla"))


def _peer(args: argparse.Namespace, model: config.Model, params: Any, images: jax.Array) -> Worker:
    """open_clip with our weights and pictures."""
    tensors = open_clip.export_parameters(jax.tree.map(np.asarray, params), model)
    with tempfile.TemporaryDirectory() as folder:
        files = {"weights": f"{folder}/weights.safetensors", "images": f"{folder}/images.safetensors"}
        save_file(tensors, files["weights"])
        save_file({"images": np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))}, files["images"])
        sizes = {"open_clip": open_clip.open_clip_config(model), "bos_id": BOS, "eos_id": EOS}
        options = sizes | files | {name: getattr(args, name) for name in ("length", "beams", "dtype")}
        return Worker("open_clip", args.peer, "benchmarks.open_clip_decode", options)


def read_bandwidth() -> float:
    """Bytes a second at which a device reads memory: of 256 MB by a sum and by a product with a vector, the best."""
    matrix, vector = jnp.ones((8192, 8192), jnp.float32), jnp.ones(8192, jnp.float32)
    best = float("inf")
    for read in (jax.jit(lambda x, _: jnp.sum(x)), jax.jit(lambda x, y: x @ y), jax.jit(lambda x, y: y @ x)):
        jax.block_until_ready(read(matrix, vector))
        for _ in range(10):
            started = time.perf_counter()
            jax.block_until_ready(read(matrix, vector))
            best = min(best, time.perf_counter() - started)
    return matrix.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="", help="recipe; default: configs/coca_base.py, with --peer coca_ViT-B-32")
    parser.add_argument("--peer", default="", help="Python of an environment with open_clip")
    parser.add_argument("--batch", type=int, default=8, help="pictures")
    parser.add_argument("--length", type=int, default=30, help="tokens of a caption")
    parser.add_argument("--beams", type=int, default=6, help="0: greedy alone; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="times that each way has its turn")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()

    c = _configuration(args)
    model, text = c.model, c.model.text
    queries = model.pooler.queries - (model.pooler.kind == "single")
    if not 3 <= args.length <= text.length:
        parser.error(f"--length={args.length} must lie in 3..{text.length}")
    params = jax.jit(lambda: state.init_parameters(c, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    common = {"length": args.length, "min_length": args.length}
    ways = {"greedy, cached": cached(model, Options(**common))}
    if args.beams:
        ways[f"beam {args.beams}, cached"] = cached(model, Options("beam", beams=args.beams, **common))
    given = jnp.asarray(rng.normal(size=(args.batch, model.image.size, model.image.size, 3)), jnp.float32)
    if args.peer:
        ways = {name: from_pixels(model, way) for name, way in ways.items()}
    else:
        given = jnp.asarray(rng.normal(size=(args.batch, queries, text.width)), model.dtype)
        ways = {"greedy, whole decoder each token": whole_decoder(model, args.length)} | ways
    peer = _peer(args, model, params, given) if args.peer else None
    compiled = {name: jax.jit(way) for name, way in ways.items()}
    made = {}
    for name in tqdm(compiled, desc="compiling", leave=False):
        made[name] = jax.block_until_ready(compiled[name](params, given))
    seconds: dict[str, list[float]] = {}
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
        for name in ("greedy", "beam")[: 2 if args.beams else 1] if peer else ():
            answer = peer.ask(do=name)
            seconds.setdefault(f"open_clip, {name}", []).append(answer["seconds"])
            if name == "greedy":
                same = np.mean(np.asarray(answer["tokens"])[:, :-1] == np.asarray(made["greedy, cached"])[:, :-1])
        for name, way in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(way(params, given))
            seconds.setdefault(name, []).append(time.perf_counter() - started)

    bandwidth = read_bandwidth()
    decoder = params["text_decoder"]
    read = sum(x.nbytes for x in jax.tree.leaves(decoder)) - decoder["token_embedding"]["embedding"].nbytes
    image = 2 * text.n_multi * args.batch * queries * text.width * jnp.dtype(model.dtype).itemsize
    bound = (args.length - 1) * (read + image) / bandwidth
    device = f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})"
    print(
        f"{args.config or ('coca_ViT-B-32' if args.peer else 'configs/coca_base.py')}, {args.dtype}, {args.batch} "
        f"pictures, {args.length} tokens; {device}, {platform.machine()}, jax {jax.__version__}, "
        f"{datetime.date.today()}"
    )
    if peer:
        print(f"{same:.1%} of the greedy tokens are open_clip's; {peer.known['versions']}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians))
    rows = {}
    for name, values in seconds.items():
        median = medians[name]
        slow = medians.get(f"open_clip, {name.split()[0]}" if peer and "cached" in name else first, medians[first])
        rows[name] = {"captions_per_second": args.batch / median, "seconds": values}
        print(
            f"{name:34} {args.batch / median:9.2f} captions/s   {slow / median:6.2f} x   {median / bound:5.1f} x bound"
        )
    print(
        f"bound: {read / 1e6:.0f} MB of decoder parameters and {image / 1e6:.0f} MB of the pictures' keys and values a "
        f"token at {bandwidth / 1e9:.1f} GB/s, {bound:.2f} s"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": device, "bandwidth": bandwidth, "ways": rows}, file, indent=2)


if __name__ == "__main__":
    main()
