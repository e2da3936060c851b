"""A run that begins with a whole checkpoint, through the real program."""

from __future__ import annotations

import json
import pathlib
import runpy
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

import coca_jax
from coca_jax import config, run, sharding, start
from coca_jax.config import ConfigError
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported, open_clip
from coca_jax.interop.weights import Weights
from coca_jax.model.image_encoder import resize_positions
from coca_jax.stored import read_weights
from tests import pairs, tiny
from tests.interop import open_clip_files_test
from tests.interop.open_clip_rewriting_test import parameters


def flat(tree: Any) -> Mapping[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, tokenizer = pairs.write(tmp_path_factory.mktemp("pairs"))
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.steps = 2
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    c.data.mean = (0.4, 0.5, 0.6)
    return c


@pytest.fixture(scope="module")
def workdir(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pretrained")
    assert run.run(recipe, str(folder)) == 0
    return folder


def finetuning(recipe: Any, checkpoint: pathlib.Path) -> Any:
    """Another resolution, no captioning; the model is not told again."""
    c = config.default()
    c.steps, c.batch_size, c.log_every, c.loss.lambda_cap, c.loss.caption_chunk = 2, 8, 1, 0.0, 0
    c.optimizer.update(name="adamw", peak_lr=3e-3, freeze=("text_decoder/.*",), ema_decay=0.9)
    c.checkpoint.every, c.data.train = 1, recipe.data.train
    c.init.update(checkpoint=str(checkpoint), model="checkpoint", image_size=24)
    return c


@pytest.mark.slow
def test_a_run_begins_with_a_checkpoint_at_another_resolution_and_goes_on_without_it(
    recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(workdir, base)
    c, mine = finetuning(recipe, base), tmp_path / "mine"
    assert run.run(c, str(mine)) == 0
    said = capsys.readouterr().out
    assert f"parameters from {base} (coca_jax): " in said
    assert "resized: image_encoder/position_embedding: from image_encoder" not in said
    assert "resized: image_encoder/position_embedding: from a grid of 2x2 to 3x3" in said
    assert "skipped: generative_pooler/" in said and "this model has none" in said
    rows = json.loads((mine / "init.json").read_text())["lines"]
    before, after = flat(read_weights(base).params), flat(read_weights(mine).params)
    assert {row["name"] for row in rows} == before.keys() | after.keys()
    assert {row["status"] for row in rows} == {"loaded", "resized", "skipped"}

    # What is frozen is the checkpoint's to the bit; the rest has moved, from where the checkpoint was.
    frozen = [path for path in after if path.startswith("text_decoder/")]
    assert frozen and all(before[path].tobytes() == after[path].tobytes() for path in frozen)
    moved = [path for path in after if path.endswith("kernel") and path not in frozen]
    assert moved and not any(np.array_equal(before[path], after[path]) for path in moved)
    assert all(np.abs(before[path] - after[path]).max() < 0.02 for path in moved)
    coca = coca_jax.load(mine)
    assert coca.config.model.image.size == 24 and coca.config.data.mean == (0.4, 0.5, 0.6)
    assert coca.config.model.dtype == "float32" and coca.config.model.text.vocab_size == 320

    shutil.rmtree(base)
    shutil.rmtree(mine / "checkpoints" / "2")
    assert run.run(c, str(mine)) == 0
    assert "parameters from" not in capsys.readouterr().out
    again = flat(read_weights(mine).params)
    assert all(np.array_equal(again[path], leaf) for path, leaf in after.items())
    c.init.image_size = 32
    assert "config.model.image.size=32, but" in str(run.run(c, str(mine)))


def read(c: Any) -> start.Start:
    mesh = sharding.make_mesh((1, jax.device_count(), 1))
    return start.read(config.from_config_dict(c), pathlib.Path("/nowhere/run"), mesh)


def test_an_exported_directory_is_the_same_start(recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = read_weights(workdir)
    exported.write(weights, tmp_path / "exported")
    one, two = read(finetuning(recipe, workdir)), read(finetuning(recipe, tmp_path / "exported"))
    assert one.config.model == two.config.model
    first, second = flat(one.params), flat(two.params)
    assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)
    assert two.tokenizer is not None and two.tokenizer.to_bytes() == Tokenizer(recipe.data.tokenizer).to_bytes()
    table = flat(weights.params)["image_encoder/position_embedding"]
    np.testing.assert_array_equal(
        first["image_encoder/position_embedding"], np.asarray(resize_positions(table, 3, class_token=False))
    )
    # Texts of another length: what both have is kept, and [CLS]'s row, which is the last.
    table = flat(weights.params)["text_decoder/position_embedding"]
    for length in (8, 20):
        c = recipe.copy_and_resolve_references()
        c.init.checkpoint, c.model.text.length = str(workdir), length
        found = flat(read(c).params)["text_decoder/position_embedding"]
        assert found.shape == (length + 1, 16)
        np.testing.assert_array_equal(found[: min(length, 16)], table[: min(length, 16)])
        np.testing.assert_array_equal(found[-1], table[-1])


def test_open_clips_directory_is_a_start(recipe: Any, tmp_path: pathlib.Path) -> None:
    tokenizer = open_clip_files_test.vocabulary()
    model = tiny.replace(
        open_clip_files_test.BASE, text__vocab_size=tokenizer.vocab_size, text__pad_id=tokenizer.pad_id
    )
    weights = Weights(config.Config(model=model), parameters(model), tokenizer)
    open_clip.write(weights, tmp_path / "theirs")
    c = finetuning(recipe, tmp_path / "theirs")
    c.init.image_size = 0
    begun, back = read(c), flat(read_weights(tmp_path / "theirs").params)
    found = flat(begun.params)
    assert begun.config.model.text.cls_mask == model.text.cls_mask and begun.config.model.gelu == model.gelu
    assert found and all(np.array_equal(back[path], leaf) for path, leaf in found.items())
    assert begun.report is not None and not begun.report.of("initialised")


def test_what_does_not_agree_is_said_with_what_to_set(
    recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    c = recipe.copy_and_resolve_references()
    c.init.checkpoint = str(workdir)
    c.model.image.update(width=32, heads=4)
    c.data.mean = (0.5, 0.5, 0.5)
    said = str(run.run(c, str(tmp_path / "run")))
    assert said.startswith(f"error: config.init.checkpoint='{workdir}': does not fit this configuration:")
    assert "config.model.image.width=32 and the checkpoint has 16: config.model.image.width=16, or config.init" in said
    assert "config.data.mean=(0.5, 0.5, 0.5) and the checkpoint wants (0.4, 0.5, 0.6): config.data.mean=" in said
    assert "config.init.skip=('image_encoder/patch_embedding/kernel',)" in said
    assert not (tmp_path / "run").exists()

    # Drawn from the seed, it may be of any size.
    c.init.skip = ("image_encoder/.*", r"\w+_pooler/.*")
    begun = read(c)
    assert begun.params is not None and "image_encoder" not in begun.params and "text_decoder" in begun.params
    c.init.skip = ("image_encodr/.*",)
    assert "config.init.skip: 'image_encodr/.*' matches no parameter" in str(run.run(c, str(tmp_path / "run")))

    c = recipe.copy_and_resolve_references()
    c.init.checkpoint = str(workdir)
    other = tmp_path / "other.model"
    Tokenizer.train(["other words"] * 3, other, vocab_size=270)
    c.data.tokenizer = str(other)
    assert "is another vocabulary than the checkpoint's text decoder knows" in str(run.run(c, str(tmp_path / "run")))
    c.init.checkpoint = str(tmp_path / "typo")
    assert "typo: no such file or directory" in str(run.run(c, str(tmp_path / "run")))
    c.init.checkpoint, c.init.step = str(workdir), 7
    assert "holds no checkpoint of step 7" in str(run.run(c, str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model": "checkpoint"}, "config.init.checkpoint is empty"),
        ({"step": 3}, "config.init.step=3 says nothing without config.init.checkpoint"),
        ({"checkpoint": "a", "image_encoder": "b"}, "a run begins from one of them"),
        ({"checkpoint": "a", "image_size": 32}, "is for config.init.model='checkpoint'"),
        ({"checkpoint": "a", "skip": ("[",)}, "config.init.skip: '[' is not a regular expression"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.check(config.from_config_dict({"init": keys}))
    assert reason in str(error.value)


def test_another_contrastive_loss_has_its_own_bias(recipe: Any, workdir: pathlib.Path) -> None:
    """The bias goes with the loss: SigLIP's, which a checkpoint of the softmax has not, begins as the recipe says."""
    c = finetuning(recipe, workdir)
    c.loss.contrastive, c.model.logit_bias, c.model.temperature = "sigmoid", -10.0, 0.1
    begun = read(c)
    assert begun.config.model.logit_bias == -10.0 and begun.report is not None
    assert [line.name for line in begun.report.of("initialised")] == ["logit_bias"]
    np.testing.assert_array_equal(flat(begun.params)["logit_scale"], flat(read_weights(workdir).params)["logit_scale"])
