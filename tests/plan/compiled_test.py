"""Compile for TPUs with libtpu, without a TPU. Takes minutes: slow."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import pytest

from coca_jax import config, sharding
from coca_jax.model import flops
from coca_jax.train import optimizer, state
from tests import tiny_recipe

# The type of the fixture in tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="NOT RUN: libtpu is not installed, which compiles for TPUs: pip install 'coca_jax[plan]'",
    ),
]


def plan(run_python: RunPython, folder: pathlib.Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, contents of the JSON file, and printed output."""
    file = folder / "plan.json"
    command = ["-m", "coca_jax.plan", "--config=tests/tiny_recipe.py", "--topology=v5e:2x2", f"--json={file}"]
    done = run_python([*command, *arguments], devices=1, timeout=1500, check=False)
    assert file.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(file.read_text()), done.stdout


def test_a_small_model_fits_four_chips(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    arguments = ["--config.model.image.remat=everything", "--config.mesh.replica=2", "--config.mesh.fsdp=2"]
    status, values, printed = plan(run_python, tmp_path, *arguments)
    assert status == 0 and values["fits"] and "FITS" in printed, printed
    recipe = tiny_recipe.get_config()
    recipe.mesh.update(replica=2, fsdp=2)
    c = config.from_config_dict(recipe)
    # Half of each kernel, everything else replicated, as on real devices, of which this process has too few.
    mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.MESH_AXES)
    abstract = state.abstract(c, optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c)), mesh)
    held = sum(
        leaf.dtype.itemsize * jax.numpy.prod(jax.numpy.array(leaf.sharding.shard_shape(leaf.shape), int)).item()
        for leaf in jax.tree.leaves(abstract.params)
    )
    assert values["hbm_gib_by_kind"]["parameters"] * 2**30 == held
    assert values["hbm_gib_by_kind"]["moving average"] * 2**30 == held
    assert 0 < values["hbm_gib_per_chip"] < 1 < values["hbm_limit_gib"]
    assert values["model_flops_per_step"] == flops.train_step_flops(c)
    # Recomputation adds operations; the pixel gradient, part of three forward passes, is not computed.
    patches = c.batch_size * flops.forward(c.model, batch_size=c.batch_size).image_encoder
    assert (
        -patches < values["executed_flops_per_step"] - values["model_flops_per_step"] < values["model_flops_per_step"]
    )
    moved = values["collective_bytes_per_chip"]
    assert moved["all-gather"] > 0 and moved["all-reduce"] > 0  # parameters over fsdp, gradients over replicas
    assert values["hbm_bytes_per_chip"] > held
    assert values["loops_of_unknown_length"] == 0 and values["uncounted"] == []
    assert 0 < values["mfu"] < 1 and values["step_seconds"] > 0 and values["chip_hours"] > 0
    assert values["compile_seconds"] > 1


def test_a_plan_that_does_not_fit_reports_the_missing_gib(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    status, values, printed = plan(run_python, tmp_path, "--config.batch_size=33554432")
    assert status == 3 and not values["fits"], printed
    assert values["hbm_gib_per_chip"] > values["hbm_limit_gib"]
    assert values["hbm_missing_gib"] == pytest.approx(values["hbm_gib_per_chip"] - values["hbm_limit_gib"])
    assert f"{values['hbm_missing_gib']:.2f} GiB more" in printed in printed
    wanted = re.search(r"--config\.microbatches=(\d+)", printed)
    assert wanted, printed
    ratio = values["hbm_gib_per_chip"] / values["hbm_limit_gib"]
    assert int(wanted[1]) / 2 < ratio <= int(wanted[1])
