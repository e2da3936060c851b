"""A run that begins with a vision transformer's weights, through the real program."""

from __future__ import annotations

import json
import pathlib
import runpy
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from coca_jax import config, run
from coca_jax.interop import vision
from coca_jax.train import state as states
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import read_lines
from tests import pairs
from tests.distributed_test import finish, launch  # noqa: F401  (a fixture)


def timm_file(path: pathlib.Path) -> pathlib.Path:
    """For tests/tiny_recipe.py: timm's names, with a class token, which that recipe's encoder does not have."""
    d, f, rng = 16, 16, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        **{"cls_token": (1, 1, d), "pos_embed": (1, 5, d), "norm.weight": (d,), "norm.bias": (d,)},
        **{"patch_embed.proj.weight": (d, 3, 8, 8), "patch_embed.proj.bias": (d,)},
        **{"blocks.0.norm1.weight": (d,), "blocks.0.norm1.bias": (d,), "blocks.0.norm2.weight": (d,)},
        **{"blocks.0.norm2.bias": (d,), "blocks.0.attn.qkv.weight": (3 * d, d), "blocks.0.attn.qkv.bias": (3 * d,)},
        **{"blocks.0.attn.proj.weight": (d, d), "blocks.0.attn.proj.bias": (d,), "blocks.0.mlp.fc1.weight": (f, d)},
        **{"blocks.0.mlp.fc1.bias": (f,), "blocks.0.mlp.fc2.weight": (d, f), "blocks.0.mlp.fc2.bias": (d,)},
    }
    tensors = {name: (rng.normal(size=shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture
def recipe(tmp_path: pathlib.Path) -> Any:
    source, tokenizer = pairs.write(tmp_path)
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.steps, c.checkpoint.every, c.loss.lambda_cap = 2, 1, 0.0
    c.optimizer.update(ema_decay=0.0, freeze=("image_encoder/.*",))
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    c.init.image_encoder = str(timm_file(tmp_path / "vit.safetensors"))
    return c


def wanted(values: Any) -> Mapping[str, np.ndarray]:
    """What the file has for the encoder, by path."""
    c = config.from_config_dict(values)
    encoder = states.abstract_parameters(c)["image_encoder"]
    return flat(vision.load_encoder(c.init.image_encoder, c.model, encoder)[0])


def trained(values: Any, workdir: pathlib.Path) -> Mapping[str, np.ndarray]:
    with Checkpoints(workdir) as checkpoints:
        params, step = checkpoints.restore_parameters(states.abstract_parameters(config.from_config_dict(values)))
    assert step == values["steps"]
    return flat(params)


def flat(tree: Any) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def same(encoder: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]) -> list[bool]:
    return [np.array_equal(leaf, params[f"image_encoder/{path}"]) for path, leaf in encoder.items()]


def test_a_run_begins_with_the_weights_and_goes_on_without_the_file(
    recipe: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, workdir = wanted(recipe), tmp_path / "run"
    assert len(encoder) == 19
    assert run.run(recipe, str(workdir)) == 0
    whole = trained(recipe, workdir)
    assert all(same(encoder, whole))  # frozen, so to the bit
    printed = capsys.readouterr().out
    assert "vit.safetensors (timm): 19 parameters loaded" in printed
    assert "skipped: cls_token: the class token: config.model.image.class_token=False" in printed
    written = json.loads((workdir / "init.json").read_text())
    assert written["layout"] == "timm" and len(written["lines"]) == 19 + 3

    # Where it goes on, the file is not looked at.
    pathlib.Path(recipe.init.image_encoder).unlink()
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert run.run(recipe, str(workdir)) == 0
    again = trained(recipe, workdir)
    assert all(np.array_equal(again[path], leaf) for path, leaf in whole.items())
    assert "parameters loaded" not in capsys.readouterr().out


def test_what_cannot_be_used_is_said_before_a_workdir_is_made(recipe: Any, tmp_path: pathlib.Path) -> None:
    recipe.model.image.width, recipe.model.image.heads = 32, 4
    said = str(run.run(recipe, str(tmp_path / "run")))
    assert said.startswith(f"error: config.init.image_encoder='{recipe.init.image_encoder}': ")
    assert "config.model.image.width=32: this file has 16: config.model.image.width=16" in said
    recipe.init.image_encoder = str(tmp_path / "typo.npz")
    assert "typo.npz: no such file or folder" in str(run.run(recipe, str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def arguments(values: Any, workdir: pathlib.Path, **changes: str) -> list[str]:
    said = {
        **{"data.train": values.data.train, "data.tokenizer": values.data.tokenizer, "steps": "3"},
        **{"init.image_encoder": values.init.image_encoder, "loss.lambda_cap": "0.0"},
        **changes,
    }
    told = [f"--config.{key}={value}" for key, value in said.items()]
    return ["-m", "coca_jax.main", "--config=tests/tiny_recipe.py", f"--workdir={workdir}", *told]


@pytest.mark.slow
def test_devices_and_processes_make_no_difference(
    recipe: Any,
    tmp_path: pathlib.Path,
    launch: Callable[..., list[subprocess.Popen[str]]],  # noqa: F811
) -> None:
    for name, count, devices in (("one", 1, 1), ("eight", 1, 8), ("two processes", 2, 1)):
        said = finish(launch(arguments(recipe, tmp_path / name), count, devices=devices))
        assert ["19 parameters loaded" in text for text in said] == [True] + [False] * (count - 1), said
    lines = {
        name: [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("one", "eight", "two processes")
    }
    assert len(lines["one"]) == 3
    for name in ("eight", "two processes"):
        # The encoder is bit for bit the file's; float32 sums over the batch come in another order.
        np.testing.assert_allclose(lines[name], lines["one"], rtol=1e-5)


# Each process reads the file of that name in a folder of its own.
_APART = """
import os, sys, jax
from coca_jax import config, distributed, sharding, start
distributed.initialize()
mesh = sharding.make_mesh((1, 2, 1))
c = config.from_config_dict({"model": {"image": {
    "size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 16
}}, "init": {"image_encoder": "vit.safetensors"}})
os.chdir(os.path.join(sys.argv[1], str(jax.process_index())))
try:
    start.read(c, os.path.join(sys.argv[1], "run"), mesh)
except (config.ConfigError, distributed.DistributedError) as error:
    distributed.leave(f"error: {error}", patience=60)
"""


@pytest.mark.slow
def test_processes_with_different_files_say_so(
    tmp_path: pathlib.Path,
    launch: Callable[..., list[subprocess.Popen[str]]],  # noqa: F811
) -> None:
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        tensors = safetensors.numpy.load_file(timm_file(tmp_path / "vit.safetensors"))
        tensors["blocks.0.norm1.bias"] += index
        safetensors.numpy.save_file(tensors, tmp_path / str(index) / "vit.safetensors")
    for said in finish(launch(["-c", _APART, str(tmp_path)], 2), expected=1):
        assert "the checksum of config.init.image_encoder='vit.safetensors' is" in said, said
    (tmp_path / "1" / "vit.safetensors").unlink()
    for said in finish(launch(["-c", _APART, str(tmp_path)], 2), expected=1):
        assert "config.init.image_encoder='vit.safetensors' in process 1: vit.safetensors: no such file" in said, said
