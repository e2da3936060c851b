"""Starts the processes of a run on this machine, and starts all of them again when one is lost.

    python -m coca_jax.supervise --processes=4 -- --config=configs/debug.py --workdir=runs/mine
    python -m coca_jax.supervise -- --config=configs/quickstart.py --workdir=runs/quickstart

What stands after -- goes to coca_jax.main, which takes up from the newest checkpoint. A process that was killed, that
crashed, was asked to end (143) or has lost another one (75, or ended by JAX) is a reason to start again; one that ends
with status 1 has said what is to be mended, and nothing is started again. One that gives no sign of life is killed.
After --restarts starts in a row that brought no newer checkpoint it gives up. SIGTERM, Ctrl-C and the loss of the
terminal (but for nohup) are passed on, and end the supervisor too. Of a run on several machines each has its own
supervisor (launch/on_worker), and all start again. Standard library alone: it outlives whatever happens to JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from types import FrameType

from coca_jax import parent

FINAL = (0, 1, 2)  # complete; an error that names what to mend; a command line that cannot be read
LONGEST_PAUSE = 300.0
BEAT_FILE = "COCA_JAX_BEAT"  # variable: the file in which a process beats
BEAT = 2.0  # seconds between its beats


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns what to exit with: 0 when all processes ended so, else the status of the first that did not."""
    parser = argparse.ArgumentParser(
        prog="python -m coca_jax.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=_positive, default=1, help="on this machine (default: 1)")
    parser.add_argument(
        "--restarts", type=int, default=5, help="how often in a row without a newer checkpoint (default: 5)"
    )
    parser.add_argument(
        "--grace", type=float, default=300.0, help="seconds to save in, between SIGTERM and SIGKILL (default: 300)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        help="seconds that the others have, when one is lost, to find it out by themselves (default: 120)",
    )
    parser.add_argument(
        "--frozen",
        type=float,
        default=300.0,
        help="seconds without a sign of life after which a process is killed; 0: never (default: 300)",
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=5.0,
        help=f"seconds before a new start, doubled to {LONGEST_PAUSE:.0f} while no checkpoint is newer (default: 5)",
    )
    parser.add_argument("main", nargs="*", metavar="-- ARGUMENT", help="of coca_jax.main")
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "coca_jax.main", *options.main]
    job = Job(command, options.processes, options.grace, options.patience, options.frozen)
    lost_terminal = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else []  # not under nohup
    for name in (signal.SIGTERM, signal.SIGINT, *lost_terminal):
        signal.signal(name, job.stop)
    newest, futile = -1, 0
    while True:
        status = job.run()
        if job.step > newest:  # it began with a newer checkpoint than those before it
            newest, futile = job.step, 0
        if job.stopping or status in FINAL:
            return status
        if futile >= options.restarts:
            say(f"gives up: no newer checkpoint in {futile + 1} starts; the last status is {status}")
            return status
        pause = min(options.pause * 2**futile, LONGEST_PAUSE)
        futile += 1
        left = options.restarts - futile
        say(f"starts again in {pause:g} s, from the newest checkpoint; without a newer one {left} times more")
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline:
            if job.stopping:
                return status
            time.sleep(0.1)


class Job:
    """The processes of one run: all start together, and where one is lost all end."""

    def __init__(
        self, command: Sequence[str], processes: int, grace: float, patience: float, frozen: float = 0.0
    ) -> None:
        self.stopping = False
        self.step = -1  # that the processes went on from when they were last started; -1: they did not say
        self._command, self._count, self._grace, self._patience = list(command), processes, grace, patience
        self._frozen = frozen
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Starts them and waits for all. Returns 0, or the first other status; of a signal 128 + N."""
        with tempfile.TemporaryDirectory(prefix="coca_jax_beat_") as folder:
            return self._run([pathlib.Path(folder) / str(index) for index in range(self._count)])

    def _run(self, files: Sequence[pathlib.Path]) -> int:
        for file in files:
            file.touch(0o600)
        several: list[list[str]] = [[]]
        if self._count > 1:
            shared = [f"--coordinator=localhost:{free_port()}", f"--num_processes={self._count}"]
            several = [[*shared, f"--process_id={index}"] for index in range(self._count)]
        self._running = [
            subprocess.Popen([*self._command, *flags], env=os.environ | parent.environment() | {BEAT_FILE: str(file)})
            for flags, file in zip(several, files, strict=True)
        ]
        if self.stopping:  # asked between two starts
            self._send(signal.SIGTERM)
        hearts = [_Heart(file) for file in files]
        first, deadline, killed = 0, None, False
        ended: set[int] = set()
        frozen: set[int] = set()
        looked = time.monotonic()
        while len(ended) < self._count:
            for index, process in enumerate(self._running):
                code = process.poll()
                if code is None or index in ended:
                    continue
                ended.add(index)
                status = code if code >= 0 else 128 - code
                if status and not first:
                    first = status
                    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                    say(f"process {index} of {self._count} {how}")
                    # The others find out by themselves, and say so; whoever is frozen does not.
                    deadline = time.monotonic() + self._patience
            if self.stopping and deadline is None:
                deadline = time.monotonic() + self._grace
            if deadline is not None and time.monotonic() > deadline and not killed:
                late = [str(i) for i in range(self._count) if i not in ended]
                if late:
                    say(f"process {', '.join(late)} of {self._count} did not end in time: SIGKILL")
                self._send(signal.SIGKILL)
                killed, first = True, first or 128 + signal.SIGKILL
            if time.monotonic() - looked > BEAT:  # this process stood still itself: it has seen nothing
                hearts = [_Heart(file) for file in files]
            looked = time.monotonic()
            for index, heart in enumerate(hearts):
                quiet = heart.quiet()
                if 0 < self._frozen < quiet and index not in ended | frozen:
                    frozen.add(index)
                    say(f"process {index} of {self._count} has given no sign of life for {quiet:.0f} s: SIGKILL")
                    self._running[index].kill()
            time.sleep(0.1)
        self.step = max((heart.step() for heart in hearts), default=-1)
        return first

    def stop(self, _: int, __: FrameType | None) -> None:
        """SIGTERM, Ctrl-C or a lost terminal: passed on, as SIGTERM.

        A terminal has sent Ctrl-C to all of them itself, where a SIGTERM after it changes nothing; `kill -INT` has not.
        """
        self.stopping = True
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


class _Heart:
    """What a process wrote into its file, as the supervisor sees it. No clocks are compared."""

    def __init__(self, file: pathlib.Path) -> None:
        self._file, self._seen, self._at = file, "", time.monotonic()

    def quiet(self) -> float:
        """Seconds since the last beat was seen; 0 before the first."""
        now = self._read()
        if now != self._seen:
            self._seen, self._at = now, time.monotonic()
        return time.monotonic() - self._at if self._seen else 0.0

    def step(self) -> int:
        words = self._read().split()
        return int(words[1]) if len(words) == 2 else -1

    def _read(self) -> str:
        try:
            return self._file.read_text()
        except OSError:
            return ""


class Beating:
    """The process's side: shows a supervisor, where there is one, that the process lives, until it ends.

    A thread of it beats, so that what is frozen (stopped, or stuck holding Python's lock) is silent. What only waits,
    for data or for a lost process, is not: of that the watchdog and peers.py speak.
    """

    def __init__(self) -> None:
        self._path = os.environ.get(BEAT_FILE, "")
        self._count, self._step, self._lock = 0, -1, threading.Lock()
        if self._path:
            self._beat()
            threading.Thread(target=self._run, name="beat", daemon=True).start()

    def goes_on_from(self, step: int) -> None:
        """Says which checkpoint the run begins with; 0: none."""
        self._step = step
        self._beat()

    def _run(self) -> None:
        while True:
            time.sleep(BEAT)
            self._beat()

    def _beat(self) -> None:
        if not self._path:
            return
        with self._lock, contextlib.suppress(OSError):  # the supervisor may be gone, and its folder
            self._count += 1
            handle = os.open(self._path, os.O_WRONLY)
            try:
                os.pwrite(handle, b"%12d %12d" % (self._count, self._step), 0)  # always as long: never half of it
            finally:
                os.close(handle)


def end_with_supervisor(grace: float) -> None:
    """Asks this process to end (SIGTERM) when its supervisor has ended without doing so, and sees that it does.

    Args:
      grace: seconds that it has to save in.
    """

    def end() -> None:
        say("the supervisor is gone: this run saves and ends, so that another can take its place")
        if file := os.environ.get(BEAT_FILE):  # nobody else removes it and its folder; a last beat makes neither anew
            with contextlib.suppress(OSError):
                os.unlink(file)
                os.rmdir(os.path.dirname(file))  # by the last of the processes
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    parent.follow(end)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
