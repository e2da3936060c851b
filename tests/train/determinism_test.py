"""The same configuration twice, from nothing, each time compiled anew: the same bits. Real processes."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Callable

import pytest
from etils import epath

from coca_jax.train.checkpoint import manifest
from coca_jax.train.metrics import CLOCKS, read_lines
from tests import pairs

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_two_runs_give_the_same_bits(tmp_path: pathlib.Path, run_python: RunPython) -> None:
    """With threads that read and augment, several devices, asynchronous saves, and XLA's optimisations as a
    user has them; nothing that the first left behind is used by the second."""
    source, tokenizer = pairs.write(tmp_path)
    arguments = ["-m", "coca_jax.main", "--config=tests/tiny_recipe.py", f"--config.data.train={source}"]
    arguments += [f"--config.data.tokenizer={tokenizer}"]
    arguments += ["--config.loss.lambda_cap=0.0", "--config.evaluate.captions=0"]
    found = []
    for name in ("one", "other"):
        workdir, cache = tmp_path / name, tmp_path / f"cache of {name}"
        flags = {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        run_python([*arguments, f"--workdir={workdir}"], devices=2, env={"COCA_JAX_CACHE": str(cache), **flags})
        assert len(list(cache.rglob("*lambda*-cache"))) > 0  # its own compilation: the step is a lambda
        lines = read_lines(epath.Path(workdir) / "metrics.jsonl")
        kept = [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]
        leaves = [manifest.read(epath.Path(workdir) / f"checkpoints/{step}").leaves for step in (8, 12)]
        found.append((kept, leaves))
    (lines, leaves), (other_lines, other_leaves) = found
    assert lines == other_lines and lines[-1]["step"] == 12
    for mine, others in zip(leaves, other_leaves, strict=True):  # a digest of the bits of each array
        assert mine == others and all(leaf.digest for leaf in mine.values())
        assert any("ema" in path for path in mine) and any("mu" in path for path in mine)
