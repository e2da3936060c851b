"""Disks that are full, read-only, gone or slow: training goes on, says what was not saved, and saves when it can."""

from __future__ import annotations

import functools
import os
import pathlib
import resource
import runpy
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from etils import epath

from coca_jax import config, run, sharding
from coca_jax.train import loop
from coca_jax.train.checkpoint import CheckpointError, Checkpoints, manifest, rehearse, store, verify
from coca_jax.train.metrics import Writer, read_lines
from tests import pairs
from tests.train.verified_test import KEEP, at, fresh, restore  # noqa: F401  (a fixture)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    monkeypatch.setattr(store, "FIRST_RETRY", 0.0)
    monkeypatch.setattr(store, "LAST_RETRY", 0.0)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "coca_jax_test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(
            f"NOT RUN: this user cannot mount a small file system ({done.stderr.strip()}); run the tests as root"
        )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Takes all the room there is."""
    path = folder / "filler"
    handle, size = os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 16
    while size:
        try:
            os.write(handle, bytes(size))
        except OSError:
            size //= 2
    os.close(handle)
    return path


def whole_steps(workdir: pathlib.Path) -> list[int]:
    """Those that are there; each is what was saved."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    for step in steps:
        assert verify.check_step(epath.Path(workdir / "checkpoints" / str(step))) == []
    return steps


def save(checkpoints: Checkpoints, states: Any) -> None:
    checkpoints.save(states, {"position": 8 * int(states.step)}, {"seed": 1})


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


# Each breaks the folder of checkpoints and gives back what mends it. None needs to be root.


def gone(workdir: pathlib.Path) -> Callable[[], Any]:
    """As a mount or a bucket that has vanished: the whole workdir."""
    workdir.rename(workdir.with_name("elsewhere"))
    return lambda: workdir.with_name("elsewhere").rename(workdir)


def replaced(workdir: pathlib.Path) -> Callable[[], Any]:
    """A file is where the folder was: everything under it fails."""
    (workdir / "checkpoints").rename(workdir / "moved")
    (workdir / "checkpoints").write_text("")

    def mend() -> None:
        (workdir / "checkpoints").unlink()
        (workdir / "moved").rename(workdir / "checkpoints")

    return mend


def limited(workdir: pathlib.Path) -> Callable[[], Any]:
    """The kernel refuses to write more than some KB to any file: found while arrays are written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Of the writes that were begun together the others end after Orbax has closed the event loop that waited for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", [gone, replaced, limited])
def test_a_save_that_fails_is_said_and_made_up_for(
    fault: Callable[[pathlib.Path], Callable[[], Any]],
    tmp_path: pathlib.Path,
    fresh: Any,  # noqa: F811
    soon: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    with Checkpoints(workdir, KEEP) as checkpoints:
        save(checkpoints, at(fresh, 1))
        checkpoints.wait()
        assert not checkpoints.due(2)
        mend = fault(workdir)
        try:
            for step in (2, 3):
                save(checkpoints, at(fresh, step))
                until(functools.partial(checkpoints.due, step))
                assert f"step {step} is NOT saved (" in caplog.text
            with pytest.raises(CheckpointError, match=r"step 4 could not be saved in .*start again") as raised:
                save(checkpoints, at(fresh, 4))
                checkpoints.wait(patience=1.5)
        finally:
            mend()
        assert "make room" not in str(raised.value) and "\n" not in str(raised.value)
        assert whole_steps(workdir) == [1]
        save(checkpoints, at(fresh, 5))
        checkpoints.wait()
        assert "step 5 is saved" in caplog.text and not checkpoints.due(6)
    assert whole_steps(workdir) == [1, 5]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "5"}  # nothing half-written is left
    found = restore(workdir, fresh)
    assert found and int(found[0].step) == 5


def test_a_full_disk_is_said_to_be_full(
    small_disk: pathlib.Path,
    fresh: Any,  # noqa: F811
) -> None:
    with Checkpoints(small_disk, KEEP) as checkpoints:
        filler = fill(small_disk)
        save(checkpoints, at(fresh, 1))
        with pytest.raises(CheckpointError, match=r"No space left on device.*: make room, and start again"):
            checkpoints.wait(patience=0)
        filler.unlink()


MESH = sharding.make_mesh(config.mesh_shape(config.Mesh(), jax.device_count()))


def read_only(workdir: pathlib.Path) -> Callable[[], Any]:
    subprocess.run(["mount", "-o", "remount,ro", str(workdir.parent)], check=True)
    return lambda: subprocess.run(["mount", "-o", "remount,rw", str(workdir.parent)], check=True)


def full(workdir: pathlib.Path) -> Callable[[], Any]:
    return fill(workdir.parent).unlink


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (replaced, r"(Not a directory|File exists).*: put that right, or use another --workdir$"),
        (read_only, r"Read-only file system.*: make it writable, or use another --workdir$"),
        (full, r"No space left on device.*: make room, or use another --workdir$"),
    ],
)
def test_a_run_whose_first_save_cannot_succeed_says_so_before_it_trains(
    fault: Callable[[pathlib.Path], Callable[[], Any]],
    said: str,
    small_disk: pathlib.Path,
    fresh: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    workdir = small_disk / "run"
    with Checkpoints(workdir, KEEP) as checkpoints:  # of a run that goes on
        save(checkpoints, at(fresh, 1))
        checkpoints.wait()
    mend = fault(workdir)
    try:
        with pytest.raises(CheckpointError, match=said) as raised:
            rehearse(workdir, MESH)
        assert f"--workdir={workdir} cannot hold checkpoints" in str(raised.value) and "\n" not in str(raised.value)
        assert not [record for record in caplog.records if "coca_jax" in record.pathname]  # once is enough
    finally:
        mend()
    rehearse(workdir, MESH)
    assert os.listdir(workdir / "checkpoints") == ["1"]  # nothing is left
    assert whole_steps(workdir) == [1]


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(small_disk: pathlib.Path) -> None:
    free = shutil.disk_usage(small_disk).free
    rehearse(small_disk / "run", MESH, free // 2)
    with pytest.raises(CheckpointError, match=r"a checkpoint has .* MB are free.*: make room, or use another"):
        rehearse(small_disk / "run", MESH, 2 * free)
    assert os.listdir(small_disk / "run" / "checkpoints") == []


def test_what_failed_saves_leave_late_is_removed_after_the_next_good_one(
    tmp_path: pathlib.Path,
    fresh: Any,  # noqa: F811
) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        for name in ("4.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp"):  # 6: as one that is being written
            (folder / name / "state").mkdir(parents=True)
        save(checkpoints, at(fresh, 5))
        checkpoints.wait()
        assert {path.name for path in folder.iterdir()} == {"5", "6.orbax-checkpoint-tmp"}


def test_the_last_save_of_a_run_waits_for_the_disk(
    tmp_path: pathlib.Path,
    fresh: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        mend = replaced(tmp_path)
        save(checkpoints, at(fresh, 1))
        monkeypatch.setattr(store.time, "sleep", lambda seconds: mend() if (tmp_path / "moved").exists() else None)
        checkpoints.wait()
        monkeypatch.undo()
    assert whole_steps(tmp_path) == [1]


def test_slow_storage_holds_training_up_for_no_longer_than_its_patience(
    tmp_path: pathlib.Path,
    fresh: Any,  # noqa: F811
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    real = manifest.write

    def slow(*arguments: Any) -> None:
        time.sleep(2)
        real(*arguments)

    monkeypatch.setattr(store.manifest, "write", slow)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        save(checkpoints, at(fresh, 1))
        started = time.monotonic()
        save(checkpoints, at(fresh, 2))
        assert time.monotonic() - started < 1
        assert "step 2 is NOT saved (step 1 is still being written after 0 s)" in caplog.text
        until(lambda: checkpoints.due(3))
        save(checkpoints, at(fresh, 3))
        checkpoints.wait()
    assert whole_steps(tmp_path) == [1, 3]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, tokenizer = pairs.write(tmp_path_factory.mktemp("pairs"))
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.loss.lambda_cap, c.optimizer.ema_decay = 0.0, 0.0
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    return c


def hook(monkeypatch: pytest.MonkeyPatch, at_save: Callable[[int], Any], at_failure: Callable[[], Any]) -> None:
    real_save, real_failed = loop.Checkpoints.save, store.Checkpoints._failed

    def save(self: Any, state: Any, *arguments: Any) -> None:
        at_save(int(state.step))
        real_save(self, state, *arguments)

    def failed(self: Any, *arguments: Any) -> None:
        real_failed(self, *arguments)
        at_failure()

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    monkeypatch.setattr(store.Checkpoints, "_failed", failed)


def test_a_run_outlives_a_full_disk(
    recipe: Any,
    small_disk: pathlib.Path,
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk is full from the first save until the second attempt at it has failed."""
    workdir, attempts = small_disk / "run", []

    def at_failure() -> None:
        attempts.append(1)
        if len(attempts) == 2:
            (small_disk / "filler").unlink()

    hook(monkeypatch, lambda step: fill(small_disk) if step == 4 else None, at_failure)
    assert run.run(recipe, str(workdir)) == 0
    assert len(attempts) == 2
    assert caplog.text.count("is NOT saved") == 2 and "No space left on device" in caplog.text
    assert "has checkpoints again" in caplog.text
    assert whole_steps(workdir)[-1] == 12
    lines = [line["step"] for line in read_lines(epath.Path(workdir / "metrics.jsonl")) if "loss" in line]
    assert lines == list(range(1, 13))
    assert (workdir / "report.html").exists()


def test_a_run_whose_workdir_becomes_read_only_says_so_at_its_end(
    recipe: Any, small_disk: pathlib.Path, soon: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = small_disk / "run"

    monkeypatch.setattr(loop.Checkpoints.wait, "__defaults__", (2.0,))
    real = loop.Checkpoints.save

    def save(self: Any, state: Any, *arguments: Any) -> None:
        if int(state.step) == 8:
            self.wait()
            # Over it: the file system itself cannot be made read-only while files in it are open.
            subprocess.run(["mount", "-o", "bind", str(small_disk), str(small_disk)], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", str(small_disk)], check=True)
        real(self, state, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    try:
        said = str(run.run(recipe, str(workdir)))
    finally:
        subprocess.run(["umount", "--lazy", str(small_disk)], check=True)
    assert said.startswith("error: step 12 could not be saved in ") and "Read-only file system" in said, said
    assert "the run goes on from its newest checkpoint (step 4)" in said
    assert "step 8 is NOT saved" in caplog.text
    assert whole_steps(workdir) == [4]
    monkeypatch.undo()
    assert run.run(recipe, str(workdir)) == 0
    assert whole_steps(workdir)[-1] == 12


def test_metrics_wait_for_the_disk(small_disk: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir = epath.Path(small_disk)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1.0}\n')
    writer = Writer(workdir, 1)
    writer.write(2, {"loss": 3.0})
    filler = fill(small_disk)
    for step in range(3, 300):
        writer.write(step, {"loss": float(step), "some long name of a metric that takes up room": 0.1})
    assert caplog.text.count("metrics.jsonl cannot be written ([Errno 28] No space left on device)") in (1, 2, 3)
    filler.unlink()
    writer.close()
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 300)) and lines[1]["loss"] == 3.0
    assert "\n\n" not in (workdir / "metrics.jsonl").read_text()


def test_metrics_without_a_disk_end_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    writer = Writer(epath.Path(tmp_path), 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
