"""How a process learns that another one is lost, and ends: real processes and signals, nothing of JAX (seconds).

With JAX: distributed_test.py and restart_test.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from coca_jax.peers import EXIT_LOST
from tests import conftest

HEARTBEAT = 2.0
# One of several processes: prints what the others need to know of process 0, and does what its input says.
PROGRAM = """
import json, os, sys, time
from coca_jax import peers
index, heartbeat, address = int(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
peers.end_instead_of_abort(f"process {index} of 3")
watcher = peers.Peers(index, ["a", "b", "c"], heartbeat, address)
peers.newest_checkpoint = 400
print(json.dumps(watcher.address), flush=True)
for line in sys.stdin:
    if line.startswith("error"):
        watcher.leave(line.strip())
        time.sleep(1)
        os._exit(1)
    if line.startswith("abort"):
        os.abort()
    break
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Three that know each other."""
    started: list[subprocess.Popen[str]] = []
    address: list[object] = []
    for index in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), str(HEARTBEAT), json.dumps(address)],
            env=os.environ | conftest.BYTECODE | {"PYTHONPATH": str(conftest.REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout
        port, token, _ = json.loads(process.stdout.readline())
        address = [port, token, "localhost"]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


def last_words(process: subprocess.Popen[str], seconds: float) -> str:
    """What it printed when it ended by itself: `communicate` would close its input."""
    process.wait(timeout=seconds)
    assert process.stderr
    return process.stderr.read()


def sends(number: signal.Signals) -> Callable[[subprocess.Popen[str]], None]:
    return lambda process: process.send_signal(number)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("happens", "wanted", "seconds"),
    [
        (sends(signal.SIGKILL), r"is gone: its connection closed at \d\d:\d\d:\d\d without a word", 10),
        (sends(signal.SIGSTOP), r"has given no sign of life for \d+ s, since \d\d:\d\d:\d\d: it is stopped", 20),
        (lambda p: tell(p, "error: the disk is full"), r"has ended: error: the disk is full", 10),
        (lambda p: tell(p, "abort"), r"is gone: its connection closed", 10),
    ],
    ids=["killed", "stopped", "ended with an error", "aborted"],
)
def test_the_others_end_with_a_line_that_names_the_lost_one(
    processes: list[subprocess.Popen[str]],
    lost: int,
    happens: Callable[[subprocess.Popen[str]], None],
    wanted: str,
    seconds: float,
) -> None:
    others = [index for index in range(3) if index != lost]
    happens(processes[lost])
    started = time.monotonic()
    for index in others:
        said = last_words(processes[index], seconds)
        assert processes[index].returncode == EXIT_LOST, said
        assert re.search(rf"^process {index} of 3: process {lost} of 3 \(on {'abc'[lost]}\) {wanted}", said), said
        assert said.count("\n") == 1 and said.rstrip().endswith("they go on from the newest checkpoint, step 400")
    assert time.monotonic() - started < seconds


def test_a_process_that_ends_well_is_not_lost(processes: list[subprocess.Popen[str]]) -> None:
    for index in (1, 0, 2):
        tell(processes[index], "leave")
        assert processes[index].communicate(timeout=10) == ("", "") and processes[index].returncode == 0
        time.sleep(1.2 * HEARTBEAT if index == 0 else 0.3)


def test_an_abort_is_a_line_and_the_same_status(processes: list[subprocess.Popen[str]]) -> None:
    tell(processes[2], "abort")
    said = processes[2].communicate(timeout=10)[1]
    assert processes[2].returncode == EXIT_LOST and said.startswith("process 2 of 3: aborted"), said


def test_a_stranger_at_the_port_changes_nothing(processes: list[subprocess.Popen[str]]) -> None:
    arguments = processes[1].args
    assert isinstance(arguments, list)
    port, token, _ = json.loads(str(arguments[-1]))
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 200_000, b'{"process": 1, "token": "0"}\n', b"[]\n", b"{}\n"):
        with socket.create_connection(("localhost", port)) as stranger, contextlib.suppress(OSError):
            stranger.sendall(sent)
            stranger.settimeout(5)
            stranger.shutdown(socket.SHUT_WR)
            assert token.encode() not in stranger.recv(1000)
    time.sleep(2 * HEARTBEAT)
    assert [process.poll() for process in processes] == [None] * 3
