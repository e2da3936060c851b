"""Interrupted at any moment, a conversion goes on; nothing half-written is ever taken for whole."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath

from coca_jax.data.prepare import shards
from coca_jax.data.prepare.convert import convert
from coca_jax.data.prepare.plan import Plan
from coca_jax.data.records import DataError
from tests.conftest import REPOSITORY
from tests.data.prepare import sets

SETTINGS = {"name": "set", "records_per_shard": 20, "max_bad": 0.2}


def converted(source: str, out: pathlib.Path, **settings) -> dict:
    return convert(source, out, **{"workers": 1, "progress": False} | SETTINGS | settings)


def start(source: str, out: pathlib.Path, *more: str, **options) -> subprocess.Popen:
    """The same in a process of its own."""
    arguments = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "coca_jax.data.prepare",
            "convert",
            f"--source={source}",
            f"--out={out}",
            *arguments,
            *more,
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options,
    )


def wait_for_shards(process: subprocess.Popen, out: pathlib.Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob(".prepare/set-*.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_run_again(tmp_path):
    source = sets.write_long(tmp_path / "source", 160)
    out = tmp_path / "out"
    process = start(source, out, "--workers=1")
    wait_for_shards(process, out, 3)
    kill(process)
    # Nobody takes a part for the whole: it is not there yet.
    assert [path.name for path in out.iterdir()] == [".prepare"]
    done = sorted(out.glob(".prepare/*.array_record"))
    assert 3 <= len(done) < 8
    # One of those that were finished is damaged behind its back, one loses its note: both are written again.
    damaged, lost, kept = done[:3]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (out / ".prepare" / f"{lost.stem}.json").write_text("{")
    before = kept.stat()
    (out / ".prepare" / "set-00007-of-00008.array_record.abc.tmp").write_bytes(b"half of it")
    converted(source, out)
    after = (out / kept.name).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    converted(source, tmp_path / "whole")
    assert sets.contents(out) == sets.contents(tmp_path / "whole")
    # Run once more, it only looks.
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    converted(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.slow
def test_killed_at_any_moment_with_workers(tmp_path):
    source = sets.write_long(tmp_path / "source", 400)
    out = tmp_path / "out"
    rng = random.Random(0)
    for _ in range(3):
        process = start(source, out, "--workers=2", "--vocab_size=300")
        children = []
        deadline = time.monotonic() + rng.uniform(4, 9)
        while time.monotonic() < deadline and process.poll() is None:
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            time.sleep(0.05)
        kill(process)
        wait_for_end(children)  # they would wait for their parent forever
    converted(source, out, vocab_size=300)
    converted(source, tmp_path / "whole", vocab_size=300)
    assert sets.contents(out) == sets.contents(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    """It reaches all processes of a terminal: the conversion says one line and leaves no process."""
    source = sets.write_long(tmp_path / "source", 1600)  # seconds of work left when two of 80 shards are there
    # What a shell starts in the background ignores SIGINT, and so does all that is started by it, these tests perhaps.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(source, tmp_path / "out", "--workers=2", start_new_session=True, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    wait_for_shards(process, tmp_path / "out", 2)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = error.decode().replace("\r", "\n").split("\n")
    assert "interrupted: the same command goes on where it was" in lines and "Traceback" not in lines
    wait_for_end(children)
    assert converted(source, tmp_path / "out")["records"] == 1600


# A process that is interrupted while it has the locks of all futures.
_INTERRUPTED = """
import concurrent.futures._base, os, signal, sys
from coca_jax.data.prepare.command import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has ignored
enter = concurrent.futures._base._AcquireFutures.__enter__

def locked(self):
    enter(self)
    if len(self.futures) > 1:  # shards; a source is opened before
        os.kill(os.getpid(), signal.SIGINT)

concurrent.futures._base._AcquireFutures.__enter__ = locked
sys.exit(main())
"""


def test_ctrl_c_while_futures_are_locked(tmp_path: pathlib.Path, run_python: Callable[..., Any]) -> None:
    source = sets.write_long(tmp_path / "source", 60)
    arguments = [f"--{name}={value}" for name, value in SETTINGS.items()]
    arguments += [f"--source={source}", f"--out={tmp_path / 'out'}", "--workers=2"]
    done = run_python(["-c", _INTERRUPTED, "convert", *arguments], timeout=100, check=False)
    assert done.returncode == 130, done
    assert done.stderr.splitlines()[-1] == "interrupted: the same command goes on where it was"
    assert converted(source, tmp_path / "out")["records"] == 60


def wait_for_end(children: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(_lives(child) for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


def _lives(pid: str) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupted_between_the_last_steps(mixed, tmp_path, monkeypatch):
    """The shards are there, and it ends while they take their places; then while the work folder is removed."""
    out = tmp_path / "out"
    staged = Plan.staged

    def fail_at_the_second(plan: Plan, shard: int) -> epath.Path:
        if shard and (out / "dropped.jsonl").exists():
            raise KeyboardInterrupt
        return staged(plan, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "staged", fail_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            converted(mixed, out)
    assert {path.name for path in out.iterdir()} == {".prepare", "dropped.jsonl", "set-00000-of-00002.array_record"}
    with monkeypatch.context() as patch:
        patch.setattr(shards.records, "write", _interrupt)  # no shard is written again
        manifest = converted(mixed, out)
    (out / ".prepare").mkdir()
    (out / ".prepare" / "set-00000-of-00002.json").write_text("{}")
    assert converted(mixed, out) == manifest
    converted(mixed, tmp_path / "whole")
    assert sets.contents(out) == sets.contents(tmp_path / "whole")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_side": 50}, "max_side: 0 there, 50 now"),
        ({"records_per_shard": 10}, "records_per_shard: 20 there, 10 now"),
        ({"seed": 1, "shuffle": True}, "shuffle: False there, True now; seed: 0 there, 1 now"),
    ],
)
def test_other_settings_are_refused(mixed, tmp_path, settings, said):
    out = tmp_path / "out"
    with pytest.raises(DataError):
        converted(mixed, out, bad="stop")  # begins, and leaves its work folder
    before = sets.contents(out)
    with pytest.raises(DataError, match=said):
        converted(mixed, out, **settings)
    assert sets.contents(out) == before
    converted(mixed, out)
    with pytest.raises(DataError, match=said):
        converted(mixed, out, **settings)


def test_a_vocabulary_that_failed_does_not_cost_the_shards(mixed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="vocab_size=261"):
        converted(mixed, out, vocab_size=261)
    with monkeypatch.context() as patch:
        patch.setattr(shards.records, "write", _interrupt)
        converted(mixed, out, vocab_size=330)
    converted(mixed, tmp_path / "whole", vocab_size=330)
    assert sets.contents(out) == sets.contents(tmp_path / "whole")
    with pytest.raises(DataError, match="vocab_size: 330 there, 340 now"):
        converted(mixed, out, vocab_size=340)


def test_another_source_is_refused(mixed, tmp_path):
    source = sets.write_long(tmp_path / "a", 3)
    converted(source, tmp_path / "out")
    sets.write_long(tmp_path / "a", 4)
    from coca_jax.data.prepare.inputs import open_inputs

    open_inputs.cache_clear()  # as in another process
    with pytest.raises(DataError, match=r"another conversion's \(fingerprint: .* records: 3 there, 4 now"):
        converted(source, tmp_path / "out")


def test_a_folder_with_other_things_is_refused(mixed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        converted(mixed, out)
    (out / "thesis.tex").unlink()
    (out / "manifest.json").write_text(json.dumps({"name": "emoji"}))
    with pytest.raises(DataError, match="holds something else"):
        converted(mixed, out)
    with pytest.raises(DataError, match="is a file"):
        converted(mixed, out / "manifest.json")


def test_two_at_a_time_are_refused(mixed, tmp_path):
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    with (out / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another conversion is writing there"):
            converted(mixed, out)
    converted(mixed, out)


def test_a_folder_that_cannot_be_written(mixed, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", pathlib.Path("/proc/out")):
        with pytest.raises(DataError, match=rf"{out} cannot be written"):
            converted(mixed, out)


def test_a_full_disk(tmp_path):
    """No file may grow past a limit, which the system reports where it would report a full disk."""
    source = sets.write_long(tmp_path / "source", 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"set-00000-of-00001.array_record cannot be written: .*too large.*run the"):
            converted(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").rglob("*.array_record"))
    assert converted(source, tmp_path / "out")["records"] == 20
