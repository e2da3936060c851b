"""One process of several is killed, frozen or asked to stop: the others end, all start again, and the bits are those of
a run that never was. Real processes under the real supervisor, real signals, on the loopback of this machine.

That what several have left is taken up by fewer: distributed_test.py."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath

from coca_jax import supervise
from coca_jax.train.metrics import CLOCKS, read_lines
from tests import conftest, pairs, saved

STEPS, EVERY = 24, 8
HEARTBEAT, FROZEN = 10, 15  # seconds: of JAX's service, of the supervisor
# From the signal until the supervisor starts all again: the heartbeat or FROZEN, JAX's own end, and a busy machine.
BOUND = 60.0
# Before they can agree on a step to stop after, all have to compile it: here on one core, and all but process 0 each
# time anew, as on CPUs a key of JAX's cache says which process it is, and process 0 alone writes.
COMPILATION = 120.0


class Supervised:
    """A supervisor, its processes, and what all of them said."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=conftest.REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.append(line)

    def said(self) -> str:
        return "".join(self._lines)

    def until(self, happened: Callable[[], object], seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.said()}"
            time.sleep(0.02)

    def children(self) -> dict[int, int]:
        """Process ids, by the numbers of the processes in their job."""
        found = {}
        for pid in pathlib.Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            number = re.search(r"--process_id=(\d+)", command)
            found[int(number[1]) if number else 0] = int(pid)
        return found

    def finish(self) -> str:
        code = self._process.wait(timeout=200)
        self._reader.join(timeout=60)
        assert code == 0, f"{code}\n{self.said()}"
        return self.said()

    def end(self) -> None:
        if self._process.poll() is None:
            for pid in self.children().values():
                os.kill(pid, signal.SIGKILL)
            self._process.kill()
        self._process.wait()
        self._reader.join(timeout=60)
        if self._process.stdout:
            self._process.stdout.close()


class Runs:
    """Supervised runs of one configuration, that share compiled programs."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path) -> None:
        self.folder, self.cache, self.started = folder, cache, list[Supervised]()
        source, tokenizer = pairs.write(folder)
        self._arguments = ["--config=tests/tiny_recipe.py", f"--heartbeat_timeout={HEARTBEAT}"]
        self._arguments += [f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]
        self._arguments += [f"--config.steps={STEPS}", f"--config.checkpoint.every={EVERY}"]
        self._arguments += ["--config.loss.lambda_cap=0.0", "--config.evaluate.captions=0"]

    def start(self, name: str, processes: int, *told: str, pause: int = 2) -> Supervised:
        environment = os.environ | conftest.STRICT | conftest.BYTECODE
        environment |= {
            "PYTHONPATH": str(conftest.REPOSITORY),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
            "COCA_JAX_CACHE": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "PJRT_NPROC": "8",
        }
        command = [sys.executable, "-m", "coca_jax.supervise", f"--processes={processes}", f"--pause={pause}"]
        command += [f"--frozen={FROZEN}", "--", *self._arguments, f"--workdir={self.folder / name}", *told]
        made = Supervised(command, environment)
        self.started.append(made)
        return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config):
    # Kept for the next session: four processes compile the same program four times.
    made = Runs(tmp_path_factory.mktemp("restarts"), pytestconfig.cache.mkdir("restarts"))
    yield made
    for one in made.started:
        one.end()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> pathlib.Path:
    """The workdir of a run that no signal met: four processes, one device each."""
    said = runs.start("whole", 4).finish()
    assert "starts again" not in said, said
    return runs.folder / "whole"


def verified(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint, when all that there are were read and found whole."""
    command = [sys.executable, "-m", "coca_jax.checkpoint", "verify", str(workdir)]
    environment = os.environ | conftest.BYTECODE
    done = subprocess.run(command, cwd=conftest.REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "set aside" not in done.stdout, done
    return max(int(step) for step in re.findall(r"/checkpoints/(\d+): .*verified", done.stdout))


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint: parameters, optimiser, moving average, key, guard, step; and it is whole."""
    assert verified(workdir) == STEPS
    return saved.arrays(workdir, STEPS)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    lines = read_lines(epath.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def hit(runs: Runs, name: str, number: int, what: signal.Signals) -> str:
    """A run of four, of which one gets a signal when the first checkpoint is there; all that was said."""
    run = runs.start(name, 4)
    run.until((runs.folder / name / f"checkpoints/{EVERY}").exists)
    os.kill(run.children()[number], what)
    sent = time.monotonic()
    run.until(lambda: "starts again in" in run.said())
    print(f"{what.name}: {time.monotonic() - sent:.1f} s until all had ended")
    assert time.monotonic() - sent < BOUND, run.said()
    said = run.finish()
    assert said.count("starts again in 2 s") == 1 and "resumed" in said, said
    # Those that were left ended by themselves, with a line that names the lost one, and not by JAX's abort.
    assert "did not end in time" not in said and "was ended by SIGABRT" not in said, said
    why = "is gone: its connection closed" if what == signal.SIGKILL else "has given no sign of life for"
    assert len(re.findall(rf"process \d of 4: process {number} of 4 \(on .*\) {why}", said)) == 3, said
    return said


def assert_same_bits(workdir: pathlib.Path, wanted: pathlib.Path) -> None:
    assert metrics(workdir) == metrics(wanted) and metrics(workdir)[-1]["step"] == STEPS
    mine, others = arrays(workdir), arrays(wanted)
    assert mine.keys() == others.keys()
    for name in others:
        np.testing.assert_array_equal(mine[name], others[name], err_msg=name, strict=True)


@pytest.mark.slow
def test_one_of_four_is_killed(runs: Runs, whole: pathlib.Path) -> None:
    assert "process 2 of 4 was ended by SIGKILL" in hit(runs, "killed", 2, signal.SIGKILL)
    assert_same_bits(runs.folder / "killed", whole)


@pytest.mark.slow
def test_one_of_four_is_frozen(runs: Runs, whole: pathlib.Path) -> None:
    assert "process 1 of 4 has given no sign of life for" in hit(runs, "frozen", 1, signal.SIGSTOP)
    assert_same_bits(runs.folder / "frozen", whole)


@pytest.mark.slow
def test_one_of_four_is_asked_to_stop(runs: Runs, whole: pathlib.Path) -> None:
    """At the beginning of a start, where it compiles, and later: all stop after the same step, with a checkpoint."""
    workdir = runs.folder / "asked"
    run = runs.start("asked", 4, pause=15)  # in which the checkpoint is looked at
    moments = [
        (3, lambda: "parameters, 4 cpu devices of 4 processes" in run.said(), BOUND + COMPILATION),
        (0, (workdir / f"checkpoints/{EVERY}").exists, BOUND),
    ]

    def starts_again() -> bool:
        return run.said().count("starts again in") == count

    for count, (number, moment, bound) in enumerate(moments, start=1):
        run.until(moment)
        os.kill(run.children()[number], signal.SIGTERM)
        sent = time.monotonic()
        run.until(starts_again, bound)
        print(f"SIGTERM: {time.monotonic() - sent:.1f} s until all had ended")
        stopped = re.findall(rf"stopped at step (\d+) of {STEPS}, saved in", run.said())
        assert len(stopped) == count and verified(workdir) == int(stopped[-1]), run.said()
    said = run.finish()
    assert said.count("ended with status 143") == 2 and "unhealthy" not in said, said
    assert_same_bits(workdir, whole)


@pytest.mark.slow
def test_each_machine_has_its_own_supervisor(runs: Runs, whole: pathlib.Path) -> None:
    """As launch/on_worker starts them on the machines of a cluster: nobody but JAX tells one of the other."""
    port = supervise.free_port()
    pair = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    workdir = runs.folder / "pair"
    both = [runs.start("pair", 1, *pair, f"--process_id={index}") for index in range(2)]
    both[0].until((workdir / f"checkpoints/{EVERY}").exists)
    os.kill(both[1].children()[1], signal.SIGKILL)
    said = [one.finish() for one in both]
    assert "process 0 of 1 was ended by SIGKILL" in said[1] and "starts again" in said[1], said[1]
    assert "starts again" in said[0] and "resumed" in said[0], said[0]
    arrays(workdir)
    # Two devices instead of four: numbers are added in another order, and the steps carry that on.
    for mine, other in zip(metrics(workdir), metrics(whole), strict=True):
        for name in mine:
            if other[name] is not None:  # not finite: the guard's bound before there is one
                np.testing.assert_allclose(mine[name], other[name], 1e-4, 1e-4, err_msg=f"{mine['step']} {name}")
    assert metrics(whole)[-1]["step"] == STEPS
