from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from coca_jax.train.checkpoint import lock
from coca_jax.train.checkpoint.lock import Lock, Locked, Owner


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "STALE", 0.5)
    monkeypatch.setattr(lock, "_SETTLE", 0.1)


def write(workdir: pathlib.Path, owner: Owner, beat: int = 0) -> None:
    partial = workdir / "partial"
    partial.write_text(json.dumps(dataclasses.asdict(owner) | {"beat": beat}))
    partial.replace(workdir / lock.FILE)


def test_the_second_run_is_refused_and_told_of_the_first(tmp_path: pathlib.Path) -> None:
    workdir = epath.Path(tmp_path)
    with Lock(workdir):
        with pytest.raises(Locked) as refused, Lock(workdir):
            pass
        me = Owner.me()
        assert f"is in use by another run (host {me.host}, pid {me.pid}, started 20" in str(refused.value)
        assert "another --workdir" in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    with Lock(workdir):
        assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_a_process_that_was_killed_does_not_hold_it(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        alive = dataclasses.replace(
            Owner.me(), pid=process.pid, process_started=lock._process_started(process.pid), token="other"
        )
        write(tmp_path, alive)
        with pytest.raises(Locked, match=f"pid {process.pid}"), Lock(epath.Path(tmp_path)):
            pass
        # Its number is another process's now.
        write(tmp_path, dataclasses.replace(alive, process_started="1"))
        with Lock(epath.Path(tmp_path)):
            pass
        write(tmp_path, alive)
        process.send_signal(signal.SIGKILL)
        while lock._process_started(process.pid) not in ("", "dead"):
            time.sleep(0.01)
        started = time.monotonic()
        with Lock(epath.Path(tmp_path)):  # though its parent has not collected it
            assert time.monotonic() - started < 2
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("bucket", [False, True])
def test_on_another_machine_the_heart_tells(
    bucket: bool, tmp_path: pathlib.Path, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "is_bucket", lambda path: bucket)
    far = dataclasses.replace(Owner.me(), host="far", machine="another boot", token="far")
    write(tmp_path, far)
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.1):
            count += 1
            write(tmp_path, far, count)

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(Locked, match="host far"), Lock(epath.Path(tmp_path)):
        pass
    done.set()
    heart.join()
    with Lock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / lock.FILE).read_text())["host"] == Owner.me().host
    assert "waiting up to" in caplog.text and "no sign of life" in caplog.text


def test_a_heart_that_beats_and_a_run_that_was_replaced(tmp_path: pathlib.Path, quick: None) -> None:
    lost: list[str] = []
    with Lock(epath.Path(tmp_path), lost.append):
        beats = []
        for _ in range(2):
            beats.append(json.loads((tmp_path / lock.FILE).read_text())["beat"])
            time.sleep(0.5)
        assert beats[1] > beats[0]
        other = dataclasses.replace(Owner.me(), host="far", token="far")
        write(tmp_path, other)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "was taken by another run (host far" in lost[0] and "writes nothing more" in lost[0]
    assert json.loads((tmp_path / lock.FILE).read_text())["token"] == "far"  # it is left to its owner


def test_a_lock_that_a_crash_has_cut(tmp_path: pathlib.Path) -> None:
    (tmp_path / lock.FILE).write_text('{"host": "a')
    with Lock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"]


def test_of_many_that_begin_at_once_one_has_it(tmp_path: pathlib.Path) -> None:
    held, refused = [], []
    barrier, done = threading.Barrier(8), threading.Event()

    def begin() -> None:
        barrier.wait()
        try:
            with Lock(epath.Path(tmp_path)):
                held.append(1)
                done.wait(30)
        except Locked as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(refused) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7
