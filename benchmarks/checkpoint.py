"""What checked checkpoints cost: time to save, to read back, to restore, with digests and without.

    python -m benchmarks.checkpoint --gigabytes=1 --folder=/tmp

Arrays of float32 in the shapes of a transformer with AdamW, random, on the devices that JAX finds. Prints the seconds
of each part, the median of --repeats. "with Orbax alone" is the same save or restore without manifest, digests and
reading back. The files are in the page cache when they are read again: for a disk's own speed, add bytes / bandwidth.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Size of the state.", lower_bound=0.001)
_FOLDER = flags.DEFINE_string("folder", "", "Where to write; a temporary folder if left out.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Of each measurement.", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    from coca_jax import config
    from coca_jax.train import guard
    from coca_jax.train.checkpoint import Checkpoints, digest, manifest, verify
    from coca_jax.train.state import TrainState

    drawn = np.random.default_rng(0)
    width, layers = 1024, 2
    # Parameters and two moments, in blocks of 12 width^2 float32 a layer.
    width = min(width, int((_GIGABYTES.value * 1e9 / 3 / 4 / 12 / layers) ** 0.5))
    blocks = max(1, round(_GIGABYTES.value * 1e9 / 3 / 4 / 12 / layers / width**2))
    shapes = {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width), "out": (layers, 4, width, width)}

    def leaf(shape: tuple[int, ...]) -> Any:
        return jax.device_put(drawn.standard_normal(shape, np.float32))

    def tree() -> Any:
        return {f"block{n}": {name: leaf(shape) for name, shape in shapes.items()} for n in range(blocks)}

    def state(step: int) -> TrainState:
        return TrainState(**(parts | {"step": jax.numpy.int32(step)}))

    parts: dict[str, Any] = {"params": tree(), "opt_state": {"mu": tree(), "nu": tree()}, "ema": None}
    parts |= {"rng": jax.random.key(0), "step": jax.numpy.int32(0), "guard": guard.fresh()}
    parts |= {name: None for name in TrainState.__dataclass_fields__ if name not in parts}
    size = sum(x.nbytes for x in jax.tree.leaves({k: parts[k] for k in ("params", "opt_state")}))
    print(f"{size / 1e9:.2f} GB in {len(jax.tree.leaves(parts))} arrays, {os.cpu_count()} cores, {jax.devices()[0]}")

    folder = epath.Path(tempfile.mkdtemp(dir=_FOLDER.value or None))
    plain = {"params": parts["params"], "opt_state": parts["opt_state"]}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    abstract_plain = {"params": abstract.params, "opt_state": abstract.opt_state}

    def measure(name: str, function: Callable[[int], None]) -> float:
        seconds = []
        for n in range(_REPEATS.value):
            started = time.perf_counter()
            function(n)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        print(f"{name:58s} {median:7.2f} s   {size / median / 1e9:6.2f} GB/s", flush=True)
        return median

    try:
        alone = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

        def orbax_save(n: int) -> None:
            if (folder / f"whole{n}").exists():
                (folder / f"whole{n}").rmtree()
            alone.save(folder / f"whole{n}", args=ocp.args.StandardSave(plain))
            alone.wait_until_finished()

        measure("save, with Orbax alone", orbax_save)
        read = ocp.args.StandardRestore(abstract_plain)
        measure("restore, with Orbax alone", lambda n: _ready(alone.restore(folder / "whole0", args=read)))
        measure("digests of the arrays (training waits for this)", lambda n: digest.of_process(plain))
        for path in folder.glob("whole*"):
            path.rmtree()
        with Checkpoints(folder, config.Checkpoint(keep=1)) as checkpoints:

            def save(n: int) -> None:
                checkpoints.save(state(n), {"position": 0}, {})
                checkpoints.wait()

            measure("save, checked: digests, files, manifest, read back", save)
            step = folder / "checkpoints" / str(checkpoints.latest())
            measure(
                "  of which SHA-256 of the files", lambda n: [manifest.sha256(p) for _, p in manifest.files_of(step)]
            )
            leaves = manifest.read(step).leaves
            measure("  of which reading back", lambda n: list(verify.check_leaves(step, leaves)))
            measure("restore, checked", lambda n: _ready(checkpoints.restore(abstract, {})))
            measure("python -m coca_jax.checkpoint verify", lambda n: verify.check_step(step))
    finally:
        shutil.rmtree(folder)


def _ready(tree: Any) -> None:
    import jax

    jax.block_until_ready(jax.tree.leaves(tree))


if __name__ == "__main__":
    app.run(main)
