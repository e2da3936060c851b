"""A run that is stopped and killed gives the same bits as one that never was: real processes, real signals."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import read_lines
from tests import conftest, pairs

# What a clock says is not the run's.
CLOCKS = (
    *("examples_per_second", "images_per_second_per_device", "model_tflops_per_device", "mfu"),
    "data_wait_seconds",
)


def start(folder: pathlib.Path, workdir: pathlib.Path, source: str, tokenizer: pathlib.Path) -> subprocess.Popen[str]:
    environment = (
        os.environ
        | conftest.STRICT
        | {
            "PYTHONPATH": str(conftest.REPOSITORY),
            "COCA_JAX_CACHE": str(folder / "cache"),  # one compilation for all the processes here
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
    )
    command = [sys.executable, "-m", "coca_jax.main", "--config=tests/tiny_recipe.py", f"--workdir={workdir}"]
    command += [f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]
    return subprocess.Popen(
        command, cwd=conftest.REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], expected: int) -> str:
    output = process.communicate(timeout=280)[0]
    assert process.returncode == expected, output
    return output


def wait_for_step(process: subprocess.Popen[str], workdir: pathlib.Path, step: int) -> None:
    """Until the run says that it has made a step."""
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}:\n{process.communicate()[0]}")
        if any(line["step"] >= step for line in read_lines(epath.Path(workdir / "metrics.jsonl"))):
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} in time")


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    lines = read_lines(epath.Path(workdir / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path."""
    import orbax.checkpoint as ocp

    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest()
    assert step == 12
    folder = epath.Path(workdir) / "checkpoints" / "12" / "state"
    handler = ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
    restored = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }


def test_killed_and_restarted_is_bit_identical(tmp_path: pathlib.Path) -> None:
    source, tokenizer = pairs.write(tmp_path)
    whole = tmp_path / "whole"
    finish(start(tmp_path, whole, source, tokenizer), 0)

    broken = tmp_path / "broken"
    process = start(tmp_path, broken, source, tokenizer)
    wait_for_step(process, broken, 2)
    process.send_signal(signal.SIGTERM)  # saves where it is, off the usual steps
    output = finish(process, 143)
    assert "stopped at step" in output and "Traceback" not in output
    process = start(tmp_path, broken, source, tokenizer)
    wait_for_step(process, broken, 9)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    finish(start(tmp_path, broken, source, tokenizer), 0)

    assert metrics(broken) == metrics(whole)
    assert [line["step"] for line in metrics(whole)] == list(range(1, 13))
    one, other = final_state(whole), final_state(broken)
    assert one.keys() == other.keys() and any("ema" in name for name in one) and any("mu" in name for name in one)
    for name in one:
        np.testing.assert_array_equal(other[name], one[name], err_msg=name)
    positions = [json.loads((w / "checkpoints/12/data/metadata").read_text()) for w in (whole, broken)]
    assert positions[0] == positions[1] and positions[0]["position"] == 12 * 8

    assert "complete" in finish(start(tmp_path, broken, source, tokenizer), 0)
