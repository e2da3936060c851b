"""Checkpoints from a copy of the state, while the next step is made."""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import run, sharding
from coca_jax.train import loop, optimizer, snapshot, state
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import read_lines
from coca_jax.train.snapshot import Snapshots
from tests import pairs, saved, tiny

MESH = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
C = tiny.replace(tiny.CONFIG, loss__lambda_cap=0.0, optimizer__ema_decay=0.9)


@pytest.fixture(scope="module")
def fresh() -> Any:
    made = optimizer.of_run(C, state.abstract_parameters(C))
    with jax.set_mesh(MESH):
        return state.abstract(C, made, MESH), lambda: state.real(C, made, MESH)


def values(tree: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def test_a_copy_outlives_the_state(fresh: Any) -> None:
    abstract, real = fresh
    with jax.set_mesh(MESH):
        whole, snapshots = real(), Snapshots(abstract)
        snapshots.prepare()
        before, taken = values(whole), snapshots.take(whole)
        assert taken.copied and bool(taken.finite)
        # The next step takes the state's buffers, as the loop's does.
        after = jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(whole)
        jax.block_until_ready(after)
        assert all(np.array_equal(a, b) for a, b in zip(before, values(taken.state), strict=True))
        assert [x.sharding for x in jax.tree.leaves(taken.state)] == [x.sharding for x in jax.tree.leaves(abstract)]
        taken.drop()
        assert all(x.is_deleted() for x in jax.tree.leaves(taken.state))
        assert not any(x.is_deleted() for x in jax.tree.leaves(after))


@pytest.mark.parametrize("part", ["params", "opt_state", "ema"])
def test_one_number_that_is_not_finite_is_found(fresh: Any, part: str) -> None:
    abstract, real = fresh
    with jax.set_mesh(MESH):
        whole = real()
        leaves, tree = jax.tree.flatten(getattr(whole, part))
        at = next(i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32 and leaf.ndim)
        leaves[at] = jax.device_put(leaves[at].at[(0,) * leaves[at].ndim].set(jnp.nan), leaves[at].sharding)
        assert not bool(Snapshots(abstract).take(whole.replace(**{part: jax.tree.unflatten(tree, leaves)})).finite)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data, tokenizer = pairs.write(tmp_path_factory.mktemp("pairs"))
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer = data, str(tokenizer)
    c.steps, c.evaluate.captions, c.loss.lambda_cap = 6, 0, 0.0
    c.checkpoint.update(every=2, keep=5)
    return c


@pytest.mark.slow
def test_the_same_is_saved_without_room_for_a_copy(
    recipe: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy the next step is dispatched before the checkpoint is written, and the device need not wait for it."""
    events: list[str] = []
    take, save, compile_step = Snapshots.take, Checkpoints.save, loop.compile_step

    def noted_take(self: Snapshots, state: Any) -> Any:
        taken = take(self, state)
        events.append("copied" if taken.copied else "not copied")
        return taken

    def noted_save(self: Checkpoints, state: Any, *rest: Any) -> None:
        events.append(f"save {int(state.step)}")
        save(self, state, *rest)

    def noted_step(*arguments: Any) -> Callable[..., Any]:
        step = compile_step(*arguments)

        def call(state: Any, batch: Any) -> Any:
            events.append(f"step {int(state.step) + 1}")
            return step(state, batch)

        return call

    monkeypatch.setattr(Snapshots, "take", noted_take)
    monkeypatch.setattr(Checkpoints, "save", noted_save)
    monkeypatch.setattr(loop, "compile_step", noted_step)
    assert run.run(recipe, str(tmp_path / "beside")) == 0
    assert " ".join(events) == (
        "step 1 step 2 copied step 3 save 2 step 4 copied step 5 save 4 step 6 copied save 6"  # nothing comes after 6
    )
    events.clear()
    monkeypatch.setattr(snapshot, "free_bytes", lambda: 1e4)
    assert run.run(recipe, str(tmp_path / "at once")) == 0
    assert " ".join(events) == (
        "step 1 step 2 not copied save 2 step 3 step 4 not copied save 4 step 5 step 6 not copied save 6"
    )
    for step in (2, 4, 6):
        beside, at_once = (saved.arrays(tmp_path / name, step) for name in ("beside", "at once"))
        assert beside.keys() == at_once.keys() and int(beside["['step']"]) == step
        assert all(np.array_equal(beside[name], at_once[name]) for name in beside)
        files = [tmp_path / name / "checkpoints" / str(step) / "data" / "metadata" for name in ("beside", "at once")]
        assert files[0].read_text() == files[1].read_text()  # the place in the data


def test_a_checkpoint_is_written_where_the_next_step_fails(
    recipe: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.compile_step

    def failing(*arguments: Any) -> Callable[..., Any]:
        step = whole(*arguments)

        def call(state: Any, batch: Any) -> Any:
            if int(state.step) == 4:
                raise MemoryError("step 5")
            return step(state, batch)

        return call

    monkeypatch.setattr(loop, "compile_step", failing)
    with pytest.raises(MemoryError, match="step 5"):
        run.run(recipe, str(tmp_path / "run"))
    with Checkpoints(tmp_path / "run") as found:
        assert found.latest() == 4
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="only Linux tells what the host has")
def test_room_is_what_the_host_has() -> None:
    """No more than half of it, shared by the devices."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    total = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    assert 0 < snapshot.free_bytes() <= total / 2 / jax.local_device_count()
