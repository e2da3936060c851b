"""The relatives of CoCa are configurations of the one trainer: configs/relatives/."""

from __future__ import annotations

import json
import pathlib
import runpy
from typing import Any

import numpy as np
import pytest
from flax import traverse_util

import coca_jax
from coca_jax import config, run
from coca_jax.interop import exported
from coca_jax.interop.weights import ConversionError
from coca_jax.model import flops
from coca_jax.stored import read_weights
from coca_jax.train import state
from coca_jax.train.metrics import read_lines
from tests import pairs

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALONE = ("clip", "siglip", "captioner")  # those that begin with nothing
RELATIVES = (*ALONE, "lit", "bridge_stage_one", "bridge_stage_two")


def recipe(name: str) -> Any:
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def parameters(c: config.Config) -> dict[str, Any]:
    return traverse_util.flatten_dict(state.abstract_parameters(c), sep="/")


def test_there_are_no_others() -> None:
    assert {file.stem for file in (ROOT / "configs" / "relatives").glob("*.py")} == set(RELATIVES)


@pytest.mark.parametrize("name", ALONE)
def test_a_relative_has_those_of_cocas_parameters_that_its_objective_needs(name: str) -> None:
    coca, c = (config.from_config_dict(recipe(n)) for n in ("quickstart", f"relatives/{name}"))
    config.check(c)
    whole, own = parameters(coca), parameters(c)
    assert {path: leaf.shape for path, leaf in own.items() if path != "logit_bias"}.items() <= {
        path: leaf.shape for path, leaf in whole.items()
    }.items()
    gone = whole.keys() - own.keys()
    captioning = {
        p for p in whole if p.startswith(("generative_pooler/", "text_decoder/multi", "text_decoder/lm_head"))
    }
    contrastive = {p for p in whole if p.startswith(("contrastive_pooler/", "image_proj", "text_proj"))}
    assert gone >= (contrastive if name == "captioner" else captioning)
    assert not gone & (captioning if name == "captioner" else contrastive)
    assert ("logit_bias" in own) == (name == "siglip")
    assert flops.train_step_flops(c) < flops.train_step_flops(coca)


def shrunk(name: str, pretrained: pathlib.Path | None, source: str, tokenizer: pathlib.Path) -> Any:
    """A recipe at the smallest sizes, for three steps."""
    c = recipe(name)
    c.steps, c.batch_size, c.log_every = 3, 8, 1
    c.model.embed_dim = 8
    c.model.image.update(size=16, patch=8, width=16, depth=1, heads=2, mlp_dim=16)
    c.model.text.update(vocab_size=320, length=16, width=16, heads=2, mlp_dim=16)
    c.model.pooler.update(queries=2, heads=2)
    c.model.bridge.update(width=16, heads=2, mlp_dim=16)
    c.optimizer.name = "adamw"  # Muon takes seconds more to compile
    c.data.train, c.data.tokenizer = source, "" if pretrained else str(tokenizer)
    c.init.checkpoint = str(pretrained or "")
    c.evaluate.update(splits=(source,), zero_shot="", reference_style="", captions=0, batch_size=16)
    return c


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    return pairs.write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def coca(data: tuple[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir of the quickstart's recipe."""
    workdir = tmp_path_factory.mktemp("coca")
    c = shrunk("quickstart", None, *data)
    c.evaluate.splits = ()
    assert run.run(c, str(workdir)) == 0
    return workdir


def leaves(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(read_weights(workdir).params, sep="/")
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


@pytest.mark.soak
@pytest.mark.parametrize("name", ALONE)
def test_a_relative_trains_is_evaluated_and_loads(
    name: str, data: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    assert run.run(shrunk(f"relatives/{name}", None, *data), str(tmp_path)) == 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()
    evaluated = lines[-1]
    assert ("shapes/image_to_text/r1" in evaluated) == (name != "captioner")
    assert ("shapes/caption_loss" in evaluated) == (name == "captioner")
    if name != "captioner":
        loaded = coca_jax.load(tmp_path)
        assert loaded.encode_image(pairs.picture("red", "dot")).shape == loaded.encode_text("a red dot").shape == (1, 8)


@pytest.mark.soak
def test_lit_keeps_every_bit_of_the_image_tower(
    data: tuple[str, pathlib.Path], coca: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert run.run(shrunk("relatives/lit", coca, *data), str(tmp_path)) == 0
    before, after = leaves(coca), leaves(tmp_path)
    locked = [p for p in after if p.startswith(("image_encoder/", "contrastive_pooler/", "image_projection/"))]
    assert len(locked) > 10 and all(after[path].tobytes() == before[path].tobytes() for path in locked)
    # All else is the text tower, from the seed.
    moved = [p for p in after if p not in locked and p.endswith("kernel")]
    assert moved and not any(np.array_equal(after[path], before[path]) for path in moved)


@pytest.mark.slow
def test_a_bridge_is_trained_in_two_stages_between_frozen_parts(
    data: tuple[str, pathlib.Path], coca: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert run.run(shrunk("relatives/bridge_stage_one", coca, *data), str(tmp_path / "one")) == 0
    assert run.run(shrunk("relatives/bridge_stage_two", tmp_path / "one", *data), str(tmp_path / "two")) == 0
    before, one, two = leaves(coca), leaves(tmp_path / "one"), leaves(tmp_path / "two")
    for after in (one, two):
        frozen = [p for p in after if p.startswith(("image_encoder/", "text_decoder/"))]
        assert len(frozen) > 20 and all(after[path].tobytes() == before[path].tobytes() for path in frozen)
        assert {path for path in after if path not in frozen} >= {p for p in after if p.startswith("bridge/")} > set()
    # The second stage goes on from the first one's queries, and moves them.
    learned = json.loads((tmp_path / "two" / "init.json").read_text())
    loaded = {line["name"] for line in learned["lines"] if line["status"] == "loaded"}
    assert {"bridge/query_tokens", "bridge/blocks/reading/cross_attention/key/kernel"} <= loaded
    assert not np.array_equal(one["bridge/query_tokens"], two["bridge/query_tokens"])
    first, second = (read_lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two"))
    for name in ("image_to_text/r1", "text_to_image/r1", "caption_loss"):
        assert np.isfinite(first[f"shapes/{name}"])
    assert np.isfinite(second["shapes/caption_loss"]) and "shapes/image_to_text/r1" not in second

    picture = pairs.picture("red", "dot")
    stage_one, stage_two = coca_jax.load(tmp_path / "one"), coca_jax.load(tmp_path / "two")
    assert stage_one.encode_image(picture).shape == (1, 32, 8) and stage_one.encode_text("a red dot").shape == (1, 8)
    with pytest.raises(ValueError, match="stage one of a bridge"):
        stage_one.caption(picture)
    assert isinstance(stage_two.caption(picture)[0], str)
    with pytest.raises(ConversionError, match="has a bridge"):
        exported.write(read_weights(tmp_path / "two"), tmp_path / "out")
