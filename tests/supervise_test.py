"""The supervisor, with small processes in the place of coca_jax.main: real signals, nothing of JAX."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest

# In the place of coca_jax.main: writes its number, and does what its argument says at its first start.
MAIN = """
import os, pathlib, signal, sys, time
from coca_jax import supervise
flags = dict(a[2:].split("=") for a in sys.argv[1:] if a.startswith("--"))
index, count, folder = flags.get("process_id", "0"), int(flags.get("num_processes", "1")), pathlib.Path(flags["folder"])
log = folder / f"starts-{index}"
with log.open("a") as file:
    file.write(flags.get("coordinator", "-") + "\\n")
number = len(log.read_text().splitlines())
first, beating = number == 1, supervise.Beating()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
how = flags["how"]
if how == "orphan":
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch())  # and it does not end
    supervise.end_with_supervisor(1.0)
    time.sleep(0.2)
    while True:
        time.sleep(60)
if first and index == str(count - 1) and how != "progress":
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "wait":
        time.sleep(60)
    sys.exit(int(how))
if first and count > 1:
    time.sleep(60)  # does not find out by itself
if how == "progress":  # the third start finds a newer checkpoint
    beating.goes_on_from((0, 4, 8, 8)[number - 1])
    sys.exit(75)
"""


def supervise(folder: pathlib.Path, how: str, processes: int = 1, *options: str) -> subprocess.Popen[str]:
    (folder / "coca_jax").mkdir()
    (folder / "coca_jax/__init__.py").touch()
    (folder / "coca_jax/main.py").write_text(MAIN)
    for name in ("supervise", "parent"):
        (folder / f"coca_jax/{name}.py").write_text((conftest.REPOSITORY / f"coca_jax/{name}.py").read_text())
    command = [sys.executable, "-m", "coca_jax.supervise", f"--processes={processes}", "--pause=0.1", *options]
    return subprocess.Popen(
        [*command, "--", f"--folder={folder}", f"--how={how}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def starts(folder: pathlib.Path) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(folder.glob("starts-*"))]


@pytest.mark.parametrize("how", ["killed", "143", "75", "134"])
def test_a_lost_process_is_started_again(tmp_path: pathlib.Path, how: str) -> None:
    process = supervise(tmp_path, how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and starts(tmp_path) == [["-", "-"]], said
    assert ("SIGKILL" if how == "killed" else f"status {how}") in said and "starts again" in said


def test_one_of_three_is_killed_and_all_start_again(tmp_path: pathlib.Path) -> None:
    process = supervise(tmp_path, "killed", 3, "--patience=0.5")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert "process 2 of 3 was ended by SIGKILL" in said and "process 0, 1 of 3 did not end in time: SIGKILL" in said
    assert [len(lines) for lines in starts(tmp_path)] == [2, 2, 2]
    assert all("localhost:" in address for lines in starts(tmp_path) for address in lines)


def test_one_that_gives_no_sign_of_life_is_killed(tmp_path: pathlib.Path) -> None:
    process = supervise(tmp_path, "frozen", 2, "--patience=0.5", "--frozen=4.5")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert said.count("process 1 of 2 has given no sign of life for") == 1 and "process 1 of 2 was ended by" in said
    assert [len(lines) for lines in starts(tmp_path)] == [2, 2]  # process 0, asleep, beats


def test_it_gives_up_where_no_checkpoint_is_newer(tmp_path: pathlib.Path) -> None:
    process = supervise(tmp_path, "progress", 1, "--restarts=1")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and len(starts(tmp_path)[0]) == 4, said  # 0, 4, 8 are news, the second 8 is none
    assert said.count("starts again in 0.1 s") == 3 and "gives up: no newer checkpoint in 2 starts" in said


def test_an_error_is_final_and_restarts_end(tmp_path: pathlib.Path) -> None:
    process = supervise(tmp_path, "1")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and starts(tmp_path) == [["-"]] and "starts again" not in said
    (tmp_path / "none").mkdir()
    process = supervise(tmp_path / "none", "killed", 1, "--restarts=0")
    assert process.wait(timeout=60) == 137
    process.communicate()


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_end_it_asks_and_ends(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    process = supervise(tmp_path, "wait", 1, "--grace=20")
    deadline = time.monotonic() + 60
    while not starts(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # until it listens
    process.send_signal(number)  # to it alone
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and starts(tmp_path) == [["-"]], said


def test_the_processes_of_a_supervisor_that_was_killed_save_and_end(tmp_path: pathlib.Path) -> None:
    process = supervise(tmp_path, "orphan")
    deadline = time.monotonic() + 60
    while not starts(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    said = process.communicate(timeout=30)[1]  # ends when its process, which has the same standard error, has ended
    assert "the supervisor is gone: this run saves and ends" in said, said
    assert (tmp_path / "saved").exists()
    assert not list(tmp_path.glob("coca_jax_beat_*"))
