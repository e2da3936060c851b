from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from etils import epath

from coca_jax import config, sharding
from coca_jax.config import ConfigError
from coca_jax.train import checkpoint, optimizer, state
from coca_jax.train.checkpoint import CheckpointError, Checkpoints
from tests import tiny

MESH = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
C = tiny.replace(tiny.CONFIG, model__text__vocab_size=300, optimizer__ema_decay=0.9)
TX = optimizer.make_optimizer(C.optimizer, C.steps, state.abstract_parameters(C))


@pytest.fixture(scope="module")
def fresh() -> state.TrainState:
    with jax.set_mesh(MESH):
        return state.real(C, TX, MESH)


def at(fresh: state.TrainState, step: int, shift: float = 0.0) -> state.TrainState:
    params = jax.tree.map(lambda x: x + shift, fresh.params)
    return dataclasses.replace(fresh, step=jax.numpy.asarray(step), params=params)


def test_everything_comes_back_to_the_bit(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    identity = {"source": "abc", "seed": 2}
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        checkpoints.save(at(fresh, 3), {"position": 3 * 2**40, "schedule": [[0, [1.0]]]}, identity)
        checkpoints.wait()
        found = checkpoints.restore(state.abstract(C, TX, MESH), identity)
    assert found is not None
    restored, place = found
    assert int(restored.step) == 3 and place == {"position": 3 * 2**40, "schedule": [[0, [1.0]]]}
    raw = [dataclasses.replace(s, rng=jax.random.key_data(s.rng)) for s in (restored, at(fresh, 3))]
    jax.tree.map(np.testing.assert_array_equal, *raw)


def test_other_data_is_refused(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        assert checkpoints.restore(state.abstract(C, TX, MESH), {"seed": 0}) is None
        checkpoints.save(at(fresh, 1), {"position": 8}, {"seed": 0})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match="seed was 0 when it was saved and is 2 now"):
            checkpoints.restore(state.abstract(C, TX, MESH), {"seed": 2})


def test_a_position_of_an_earlier_version_is_refused(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        checkpoints.save(at(fresh, 1), {"position": 8}, {})
        checkpoints.wait()
    # As it was written, one file a process, and no manifest.
    step = tmp_path / "checkpoints" / "1"
    (step / "manifest.json").unlink()
    (step / "data" / "metadata").rename(step / "data" / "process_0-of-1.json")
    (step / "identity").mkdir()
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        with pytest.raises(CheckpointError, match=r"checkpoints/1: .*earlier coca_jax.*another --workdir"):
            checkpoints.restore(state.abstract(C, TX, MESH), {})
        assert checkpoints.restore_parameters(state.abstract_parameters(C))[1] == 1


def test_another_architecture_is_refused_leaf_by_leaf(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        checkpoints.save(at(fresh, 1), {"position": 0}, {})
        checkpoints.wait()
        other = tiny.replace(C, model__image__mlp_dim=48, model__text__tie_embeddings=True)
        tx = optimizer.make_optimizer(other.optimizer, other.steps, state.abstract_parameters(other))
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(state.abstract(other, tx, MESH), {})
        assert "lm_head/kernel is unknown" in str(error.value)
        assert "mlp/up/kernel is (2, 16, 32) there and (2, 16, 48) here" in str(error.value)


def test_the_newest_and_the_best_are_kept(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    c = config.Checkpoint(keep=2, keep_best=1)
    with Checkpoints(tmp_path, c, best="seen/r1") as checkpoints:
        for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, None)):
            checkpoints.save(at(fresh, step), {"position": 0}, {}, None if score is None else {"seen/r1": score})
        checkpoints.wait()
        assert checkpoints.latest() == 5
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [2, 4, 5]


def test_less_is_better_for_losses(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    with Checkpoints(tmp_path, config.Checkpoint(keep=1), best="seen/caption_loss") as checkpoints:
        for step, loss in ((1, 0.5), (2, 0.2), (3, 0.4)):
            checkpoints.save(at(fresh, step), {"position": 0}, {}, {"seen/caption_loss": loss})
        checkpoints.wait()
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [2, 3]


def test_parameters_alone_come_from_the_moving_average(tmp_path: pathlib.Path, fresh: state.TrainState) -> None:
    with Checkpoints(tmp_path, config.Checkpoint()) as checkpoints:
        checkpoints.save(at(fresh, 7, shift=1.0), {"position": 0}, {})
        checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        params, step = checkpoints.restore_parameters(state.abstract_parameters(C))
        assert step == 7
        jax.tree.map(np.testing.assert_array_equal, params, fresh.ema)
        with pytest.raises(CheckpointError, match="holds no checkpoint of step 8"):
            checkpoints.restore_parameters(state.abstract_parameters(C), 8)


def test_a_used_workdir_keeps_its_configuration(tmp_path: pathlib.Path) -> None:
    workdir = epath.Path(tmp_path)
    checkpoint.keep_config(workdir, C)
    assert checkpoint.read_config(workdir) == C
    checkpoint.keep_config(workdir, tiny.replace(C, log_every=7, mesh__fsdp=1))  # how, not what
    # Files by their content, which contents.py compares, not by their place.
    checkpoint.keep_config(workdir, tiny.replace(C, data__tokenizer="/moved.model", data__classes="/moved.txt"))
    with pytest.raises(ConfigError, match=r"config\.seed=9, but .*config\.json was begun with 1"):
        checkpoint.keep_config(workdir, tiny.replace(C, seed=9))


@pytest.mark.parametrize("schedule", ["constant", "rsqrt", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("steps", [10, 20, 40])
def test_a_run_becomes_longer_where_its_steps_would_have_been_the_same(
    tmp_path: pathlib.Path, schedule: str, warmup: float, steps: int
) -> None:
    """And what is refused says how it could go on, in a way that is taken."""
    workdir = epath.Path(tmp_path)
    begun = tiny.replace(C, steps=20, optimizer__schedule=schedule, optimizer__warmup=warmup)
    checkpoint.keep_config(workdir, begun)

    def same(c: config.Config) -> bool:
        before, after = (optimizer.schedule(one.optimizer, one.steps) for one in (begun, c))
        return all(float(before(step)) == float(after(step)) for step in range(20))

    asked = tiny.replace(begun, steps=steps)
    if steps >= 20 and same(asked):
        checkpoint.keep_config(workdir, asked)
        assert checkpoint.read_config(workdir) == asked
        return
    with pytest.raises(ConfigError, match=rf"config\.steps={steps}, but .*--config\.init\.checkpoint=") as refused:
        checkpoint.keep_config(workdir, asked)
    assert checkpoint.read_config(workdir) == begun
    if found := re.search(r"--config\.optimizer\.warmup=(\S+),", str(refused.value)):
        followed = tiny.replace(asked, optimizer__warmup=float(found[1]))
        assert same(followed)
        checkpoint.keep_config(workdir, followed)
    else:
        assert steps < 20 or schedule in ("linear", "cosine")
        assert ("constant and rsqrt" in str(refused.value)) == (steps > 20)
