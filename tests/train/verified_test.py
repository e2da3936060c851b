"""What is damaged is found, set aside and never taken; what is good is never lost."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from coca_jax import checkpoint as program
from coca_jax import config
from coca_jax.train import guard, state
from coca_jax.train.checkpoint import CheckpointError, Checkpoints, digest, manifest, store, verify

KEEP = config.Checkpoint(keep=5)


@pytest.fixture(scope="module")
def fresh() -> state.TrainState:
    """Few leaves, of the kinds that there are: every one costs Orbax some milliseconds."""
    drawn = np.random.default_rng(0).normal(size=(3, 200, 50)).astype(np.float32)
    params = {"blocks": {"kernel": drawn[0], "scale": drawn[1, 0].astype(jnp.bfloat16)}, "logit_scale": drawn[2, 0, 0]}
    params = jax.device_put(params)
    moments = jax.tree.map(lambda x: x + 1, params)
    return state.TrainState(jnp.int32(0), params, (moments, jnp.int32(0)), None, jax.random.key(0), guard.fresh())


def abstract(fresh: state.TrainState) -> state.TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)


def at(fresh: state.TrainState, step: int) -> state.TrainState:
    params = jax.tree.map(lambda x: x + step, fresh.params)
    return dataclasses.replace(fresh, step=jnp.asarray(step), params=params)


def save(checkpoints: Checkpoints, states: state.TrainState) -> None:
    checkpoints.save(states, {"position": 8 * int(states.step)}, {"seed": 1})
    checkpoints.wait()


def restore(workdir: pathlib.Path, fresh: state.TrainState) -> tuple[state.TrainState, dict[str, Any]] | None:
    with Checkpoints(workdir, KEEP) as checkpoints:
        return checkpoints.restore(abstract(fresh), {"seed": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, fresh: state.TrainState) -> pathlib.Path:
    """A workdir with the steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, KEEP) as checkpoints:
        save(checkpoints, at(fresh, 1))
        save(checkpoints, at(fresh, 2))
    return workdir


@pytest.fixture
def workdir(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def flip(path: pathlib.Path, where: int = -1, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if where < 0 else where] ^= 1 << bit
    path.write_bytes(bytes(data))


def largest(step: pathlib.Path) -> pathlib.Path:
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def another_leaf(step: pathlib.Path) -> None:
    """The files are those of the manifest, and what they hold is not what was to be saved."""
    content = json.loads((step / manifest.FILE).read_text())
    content.pop("sha256")
    content["leaves"]["params/logit_scale"]["digest"] = "0" * 16
    (step / manifest.FILE).write_text(json.dumps(content | {"sha256": manifest._own(content)}))


FAULTS: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "a flipped bit": (lambda step: flip(largest(step)), "changed since it was written|leaf .* is not what was saved"),
    "a cut file": (lambda step: cut(largest(step)), "bytes and had"),
    "a missing file": (lambda step: largest(step).unlink(), "is missing"),
    "no marker": (lambda step: (step / manifest.MARKER).unlink(), "commit_success.txt is missing"),
    "no manifest": (lambda step: (step / manifest.FILE).unlink(), "manifest.json is missing"),
    "a flipped bit in the manifest": (lambda step: flip(step / manifest.FILE), "manifest.json"),
    "a cut manifest": (lambda step: cut(step / manifest.FILE), "manifest.json cannot be read"),
    "a flipped bit in the place in the data": (
        lambda step: flip(step / "data" / "metadata"),
        "data/metadata has changed",
    ),
    "no description of the tree": (lambda step: (step / "state" / "_METADATA").unlink(), "_METADATA is missing"),
    "no state": (lambda step: shutil.rmtree(step / "state"), "is missing"),
    "another leaf": (another_leaf, "leaf params/logit_scale is not what was saved"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_taken(
    fault: str, workdir: pathlib.Path, fresh: state.TrainState, caplog: pytest.LogCaptureFixture
) -> None:
    damage, wanted = FAULTS[fault]
    damage(workdir / "checkpoints" / "2")
    found = restore(workdir, fresh)
    assert found is not None and int(found[0].step) == 1 and found[1] == {"position": 8}
    jax.tree.map(np.testing.assert_array_equal, found[0].params, at(fresh, 1).params)
    said = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(said) == 1 and "/2 is damaged, and is not used; moved to" in said[0] and "\n" not in said[0]
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["1", "2.quarantined-1"]
    reason = (workdir / "checkpoints" / "2.quarantined-1" / "reason.txt").read_text()
    assert re.search(wanted, reason), reason


def test_a_step_that_was_set_aside_is_made_again(workdir: pathlib.Path, fresh: state.TrainState) -> None:
    for number in (1, 2):
        flip(largest(workdir / "checkpoints" / "2"))
        found = restore(workdir, fresh)
        assert found and int(found[0].step) == 1
        assert (workdir / "checkpoints" / f"2.quarantined-{number}").exists()
        with Checkpoints(workdir, KEEP) as checkpoints:
            save(checkpoints, at(fresh, 2))
    again = restore(workdir, fresh)
    assert again and int(again[0].step) == 2


def test_flipped_bits_of_large_files_are_found_in_the_leaves(
    workdir: pathlib.Path, fresh: state.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restoring does not read those twice: what arrives is what was saved, or it is not used."""
    monkeypatch.setattr(manifest, "SMALL", 0)
    draw, step = random.Random(3), workdir / "checkpoints" / "2"
    files = [path for path in sorted((step / "state").rglob("*")) if path.is_file() and path.parent.name == "d"]
    taken = []
    for path in draw.choices(files, [path.stat().st_size for path in files], k=12):
        before = path.read_bytes()
        flip(path, draw.randrange(len(before)), draw.randrange(8))
        found = restore(workdir, fresh)
        assert found
        taken.append(int(found[0].step))
        jax.tree.map(np.testing.assert_array_equal, found[0].params, at(fresh, taken[-1]).params)
        if taken[-1] == 1:
            (aside,) = (workdir / "checkpoints").glob("2.quarantined-*")
            aside.rename(step)
            (step / "reason.txt").unlink()
        path.write_bytes(before)
    assert taken.count(1) > 3  # some bits belong to nothing: Orbax leaves old nodes of its tree in the files


def test_readers_take_the_one_before_and_change_nothing(
    workdir: pathlib.Path, fresh: state.TrainState, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(largest(workdir / "checkpoints" / "2"))
    with Checkpoints(workdir) as checkpoints:
        params, step = checkpoints.restore_parameters(abstract(fresh).params)
        assert step == 1
        jax.tree.map(np.testing.assert_array_equal, params, at(fresh, 1).params)
        with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged: .*take another step"):
            checkpoints.restore_parameters(abstract(fresh).params, 2)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]

    assert program._folder(str(workdir), verify=True) >= 1
    lines = capsys.readouterr().out.splitlines()
    assert "checkpoints/1: " in lines[0] and lines[0].endswith("MB, verified")
    assert all("checkpoints/2: DAMAGED: " in line for line in lines[1:]) and len(lines) >= 2
    assert program._folder(str(workdir / "checkpoints"), verify=False) == 0
    assert program._folder(str(workdir), verify=True, step=1) == 0
    assert program._folder(str(workdir.parent), verify=True) == 1
    assert "no checkpoint" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(workdir: pathlib.Path, fresh: state.TrainState) -> None:
    for step in "12":
        (workdir / "checkpoints" / step / manifest.FILE).unlink()
    for _ in range(2):  # nor the next time, when both are set aside
        with pytest.raises(CheckpointError, match=r"holds no whole checkpoint any more: put a copy.*another --workdir"):
            restore(workdir, fresh)


def test_any_flipped_bit_is_found(workdir: pathlib.Path) -> None:
    """Random bits of all files, weighted by size; with the tests of the kinds above, 60 faults."""
    step, draw = workdir / "checkpoints" / "2", random.Random(7)
    later = ("_CHECKPOINT_METADATA", manifest.MARKER)  # nothing is read from them
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.name not in later]
    written = manifest.read(epath.Path(step))
    for path in [*files, *draw.choices(files, [path.stat().st_size for path in files], k=40)]:
        where, bit, before = draw.randrange(path.stat().st_size), draw.randrange(8), path.read_bytes()
        flip(path, where, bit)
        if path.name == manifest.FILE:
            with pytest.raises(manifest.Damaged):
                manifest.read(epath.Path(step))
        else:
            assert list(manifest.check_files(epath.Path(step), written, whole=True)), f"{path}: byte {where} bit {bit}"
        path.write_bytes(before)
    assert verify.check_step(epath.Path(step)) == []


def test_what_was_written_is_read_back_before_older_steps_go(
    tmp_path: pathlib.Path, fresh: state.TrainState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path, config.Checkpoint(keep=1)) as checkpoints:
        save(checkpoints, at(fresh, 1))
        assert checkpoints.latest() == 1
        real = digest.of_process

        def other(tree: Any) -> Any:  # as if memory had changed between the look and the copy
            monkeypatch.setattr(store.digest, "of_process", real)
            return real(tree) | {"params/logit_scale": {0: 1}}

        monkeypatch.setattr(store.digest, "of_process", other)
        monkeypatch.setattr(store, "FIRST_RETRY", 0.0)
        checkpoints.save(at(fresh, 2), {"position": 16}, {"seed": 1})
        while not checkpoints.due(3):
            pass
        assert "step 2 is NOT saved (leaf params/logit_scale is not what was saved" in caplog.text
        assert "the newest checkpoint is step 1" in caplog.text
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.quarantined-1"]
        checkpoints.save(at(fresh, 3), {"position": 24}, {"seed": 1})
        checkpoints.wait()
        assert not checkpoints.due(4)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2.quarantined-1", "3"]
