"""How many programs are compiled: one step for a whole run, and none that the last start has compiled already."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import pytest

from coca_jax import sharding
from coca_jax.train import optimizer, state
from coca_jax.train.step import compile_step
from tests import conftest, pairs, tiny

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]
COMPILED = "/jax/core/compile/backend_compile_duration"


def test_a_step_is_compiled_once() -> None:
    """For batches of any content and for states that a step made."""
    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    c = tiny.CONFIG
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    place = sharding.batch_sharding(mesh)
    batches = [jax.device_put(tiny.batch(c.model, [9] * 4 + [2] * 4, seed), place) for seed in range(3)]
    with jax.set_mesh(mesh):
        now = state.real(c, tx, mesh)
        step = compile_step(c, tx, mesh, now)
        before = names.count(COMPILED)
        counts = []
        for batch in batches:
            now, _ = jax.block_until_ready(step(now, batch))
            counts.append(names.count(COMPILED) - before)
    assert counts == [1, 1, 1]


@pytest.mark.soak
def test_a_second_start_compiles_nothing(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    """The keys of compiled programs are the same from process to process, whatever the workdir."""
    source, tokenizer = pairs.write(tmp_path)
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    data = [f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]
    found: list[dict[str, Any]] = []
    for name in ("first", "second"):
        arguments = ["--config=tests/tiny_recipe.py", f"--workdir={tmp_path / name}", *data]
        command = ["-m", "benchmarks.startup", "--child", "0", *arguments]
        done = run_python(command, devices=1, env=environment, cwd=conftest.REPOSITORY)
        line = next(line for line in done.stdout.splitlines() if line.startswith('{"startup"'))
        found.append(json.loads(line)["startup"])
    first, second = found
    assert first["programs"] == second["programs"], found
    assert first["misses"] > 0 == first["hits"], found
    assert second["hits"] > 0 == second["misses"], found
    assert os.listdir(tmp_path / "compiled")
