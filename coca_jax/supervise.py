"""Starts the processes of a run on this machine, and starts all of them again when one is lost.

    python -m coca_jax.supervise --processes=4 -- --config=configs/debug.py --workdir=runs/mine
    python -m coca_jax.supervise -- --config=configs/quickstart.py --workdir=runs/quickstart

What stands after -- goes to coca_jax.main, which takes up from the newest checkpoint. A process that was killed, that
crashed, was asked to end (143) or has lost another one (75, or ended by JAX) is a reason to start again; one that ends
with status 1 has said what is to be mended, and nothing is started again. SIGTERM and Ctrl-C are passed on, and end the
supervisor too. Standard library alone: it outlives whatever happens to JAX.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

FINAL = (0, 1, 2)  # complete; an error that names what to mend; a command line that cannot be read


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns what to exit with: 0 when all processes ended so, else the status of the first that did not."""
    parser = argparse.ArgumentParser(
        prog="python -m coca_jax.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=_positive, default=1, help="on this machine (default: 1)")
    parser.add_argument("--restarts", type=int, default=10, help="how often all are started again (default: 10)")
    parser.add_argument(
        "--grace", type=float, default=300.0, help="seconds to save in, between SIGTERM and SIGKILL (default: 300)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        help="seconds that the others have, when one is lost, to find it out by themselves (default: 120)",
    )
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before a new start (default: 5)")
    parser.add_argument("main", nargs="*", metavar="-- ARGUMENT", help="of coca_jax.main")
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "coca_jax.main", *options.main]
    job = Job(command, options.processes, options.grace, options.patience)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, job.stop)
    for left in range(max(0, options.restarts), -1, -1):
        status = job.run()
        if job.stopping or status in FINAL or not left:
            break
        say(f"starts again in {options.pause:g} s, from the newest checkpoint; {left} left")
        deadline = time.monotonic() + options.pause
        while time.monotonic() < deadline and not job.stopping:
            time.sleep(0.1)
        if job.stopping:
            break
    return status


class Job:
    """The processes of one run: all start together, and where one is lost all end."""

    def __init__(self, command: Sequence[str], processes: int, grace: float, patience: float) -> None:
        self.stopping = False
        self._command, self._count, self._grace, self._patience = list(command), processes, grace, patience
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Starts them and waits for all. Returns 0, or the first other status; of a signal 128 + N."""
        several: list[list[str]] = [[]]
        if self._count > 1:
            shared = [f"--coordinator=localhost:{free_port()}", f"--num_processes={self._count}"]
            several = [[*shared, f"--process_id={index}"] for index in range(self._count)]
        self._running = [subprocess.Popen([*self._command, *flags]) for flags in several]
        if self.stopping:  # asked between two starts
            self._send(signal.SIGTERM)
        first, deadline, killed = 0, None, False
        ended: set[int] = set()
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
            time.sleep(0.1)
        return first

    def stop(self, number: int, _: FrameType | None) -> None:
        """SIGTERM or Ctrl-C: passed on (a terminal has sent Ctrl-C to all of them itself)."""
        self.stopping = True
        if number == signal.SIGTERM:
            self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
