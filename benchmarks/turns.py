"""Several processes that take turns on one machine: how things are timed against each other here.

Each of the things compared lives in a process (and environment) of its own, so that its peak memory is its own, and
waits for its turn: `Worker` is the side that asks, `serve` the side that answers. A message is a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Worker:
    """A process that answers requests; `known` is what it told when it was ready."""

    def __init__(
        self, name: str, python: str, module: str, options: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts it and waits until it has said what it knows.

        Raises:
          SystemExit: it ended instead; what it wrote to standard error is above.
        """
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.known = self.ask(**options)
        print(f"{name} is ready", file=sys.stderr)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no line below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"answer": '):  # libraries print too
                answer: dict[str, Any] = json.loads(line)["answer"]
                return answer
        status = self.close()
        sys.exit(f"error: the process of {self.name!r} ended with status {status}: what it wrote is above")

    def close(self) -> int:
        """Tells it that there are no more requests, and waits for its end; returns its exit status."""
        self._process.communicate()
        return self._process.returncode


def serve(open_worker: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """Reads the options, answers with what `open_worker` knows, then answers requests until there are no more."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps({"answer": answer}), flush=True)

    known, answer = open_worker(json.loads(sys.stdin.readline()))
    say(known)
    for line in sys.stdin:
        say(answer(json.loads(line)))


def take_turns(workers: Sequence[Worker], rounds: int, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """Every worker's answers, one a round; who begins changes from round to round."""
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for round_ in range(rounds):
        for worker in workers if round_ % 2 == 0 else reversed(workers):
            answers[worker.name].append(worker.ask(**request))
    return answers


def platforms() -> str:
    """What JAX may start: what `JAX_PLATFORMS` says, else a GPU where its plugin is, else the CPU. libtpu alone, to
    compile with, is no TPU; on one, set JAX_PLATFORMS=tpu."""
    from coca_jax import compiler  # not in the peer's process

    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked
    return "cuda,cpu" if "gpu" in compiler.found_platforms() else "cpu"


class OtherWork:
    """What share of this machine's cores other processes had since this was made: what is timed beside them is not."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._pids = [os.getpid(), *(worker.pid for worker in workers)]
        self._before = self._ticks()

    def share(self) -> float:
        """0 to 1, what the host of a virtual machine took included; 0 where there is no Linux to tell."""
        whole, idle, own = (now - before for now, before in zip(self._ticks(), self._before, strict=True))
        return max(0.0, (whole - idle - own) / whole) if whole else 0.0

    def _ticks(self) -> tuple[int, int, int]:
        """All of all cores, those in which nothing ran, and those of these processes."""
        try:
            cores = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
            own = 0
            for pid in self._pids:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        except OSError:
            return 0, 0, 0
        return sum(cores), cores[3] + cores[4], own


def peak_memory() -> int:
    """Bytes of memory that this process had at most, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
