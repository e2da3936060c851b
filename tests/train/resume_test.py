"""A run that is killed and stopped at any moment gives the bits of one that never was: real processes, real signals."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import random
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.checkpoint.folder import read_place
from coca_jax.train.metrics import CLOCKS, read_lines
from coca_jax.train.stopping import EXIT_STOPPED
from tests import conftest, pairs, saved

PHASES = ("start", "compile", "data", "step", "evaluate", "save")
STEPS = 9
# From SIGTERM to the end of the process: a step or a batch of the evaluation, and a save; the machine may be loaded.
BOUND = 60.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal, sent when a process begins something for the n-th time, or as it starts where phase is empty.

    `seconds` later than that. `compiles`: with no compiled programs to load, so that the compiler is what is met.
    """

    signal: signal.Signals
    phase: str
    count: int = 1
    seconds: float = 0.0
    compiles: bool = False


class Runs:
    """Runs of one configuration, with 8 devices and asynchronous saves, that share compiled programs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        source, tokenizer = pairs.write(folder)
        self._arguments = [f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]
        self._arguments += [f"--config.evaluate.splits=({source!r},)", "--config.evaluate.every=4"]
        self._arguments += ["--config.evaluate.captions=0", "--config.loss.lambda_cap=0.0"]
        self._arguments += [f"--config.steps={STEPS}", "--config.checkpoint.every=3"]
        self.hit: collections.Counter[str] = collections.Counter()
        self.cache = folder / "cache"
        self.seconds: dict[str, float] = {}  # from SIGTERM to the end, the longest so far by what it met

    def start(self, workdir: pathlib.Path, pipe: int, cache: pathlib.Path) -> subprocess.Popen[bytes]:
        environment = os.environ | conftest.STRICT | conftest.BYTECODE
        environment |= {
            "PYTHONPATH": str(conftest.REPOSITORY),
            "COCA_JAX_CACHE": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "COCA_JAX_MARKS": str(pipe),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "PJRT_NPROC": "64",
        }
        command = [sys.executable, "tests/train/marked.py", "--config=tests/tiny_recipe.py", f"--workdir={workdir}"]
        with (self.folder / "output").open("wb") as output:
            return subprocess.Popen(
                [*command, *self._arguments],
                cwd=conftest.REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[pipe],
            )

    def run(self, workdir: pathlib.Path, fault: Fault | None = None) -> int:
        """Runs until it ends, or until the fault; notes in `hit` what it was really at. Returns the exit status."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        empty = self.folder / f"empty-{sum(self.hit.values())}"
        process = self.start(workdir, write, empty if fault and fault.compiles else self.cache)
        os.close(write)
        try:
            return self._follow(process, read, workdir, fault)
        finally:
            process.kill()
            process.wait()
            os.close(read)

    def _follow(self, process: subprocess.Popen[bytes], read: int, workdir: pathlib.Path, fault: Fault | None) -> int:
        begun, before = time.monotonic(), newest(workdir)
        due = sent = 0.0
        at, marks = "start", list[str]()
        hit: list[str] = []
        while process.poll() is None:
            now = time.monotonic()
            assert now - begun < 280, self.output()
            assert not sent or now - sent < BOUND, f"{fault} {marks[-3:]}\n{self.output()}"
            marks += self._marks(read, min(0.05, max(0.0, due - now)) if due and not sent else 0.05)
            if not fault or sent:
                continue
            if not due and (not fault.phase or marks.count(fault.phase) >= fault.count):
                due = time.monotonic() + fault.seconds
            if not due or time.monotonic() < due:
                continue
            process.send_signal(fault.signal)
            sent = time.monotonic()
            if fault.signal == signal.SIGKILL:
                process.wait()
            marks += self._marks(read, 0.0)
            at = marks[-1] if marks else at
            # A folder that no rename has made whole yet: a save was on its way behind whatever else went on.
            saving = any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
            name = fault.signal.name
            hit = [f"{name} {at}", *([f"{name} save in flight"] if saving or at == "save" else [])]
        said, code = self.output(), process.returncode
        if code == 0:  # all was done before it came, or before it was asked for once more
            return code
        assert fault and sent, f"{code}\n{said}"
        self.hit.update(hit)
        if fault.signal == signal.SIGKILL:
            assert code == -signal.SIGKILL, f"{code}\n{said}"
            return code
        self.seconds[at] = max(self.seconds.get(at, 0.0), round(time.monotonic() - sent, 1))
        assert "Traceback" not in said, said
        if code == -signal.SIGTERM:
            # Before there is a handler (Python starts, imports) the signal itself ends it, and after all is done.
            assert at in ("start", "over"), f"{marks[-3:]}\n{said}"
            return code
        assert code == EXIT_STOPPED, f"{code}\n{said}"
        saved_at = re.search(rf"stopped at step (\d+) of {STEPS}", said)
        assert saved_at or "there is nothing new to save" in said, said
        before = STEPS if "report" in marks else before
        assert verified(workdir) == (int(saved_at[1]) if saved_at else before), said
        return code

    def _marks(self, read: int, seconds: float) -> list[str]:
        if not select.select([read], [], [], seconds)[0]:
            return []
        return os.read(read, 65536).decode().split()

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")


def newest(workdir: pathlib.Path) -> int | None:
    """The step of the newest checkpoint, whole or not."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def verified(workdir: pathlib.Path) -> int | None:
    """The step of the newest checkpoint, when all that there are were read and found whole; None: there is none."""
    if newest(workdir) is None:
        return None
    command = [sys.executable, "-m", "coca_jax.checkpoint", "verify", str(workdir)]
    environment = os.environ | conftest.BYTECODE
    done = subprocess.run(command, cwd=conftest.REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"/{newest(workdir)}:" in done.stdout and "set aside" not in done.stdout, done
    return newest(workdir)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Every figure that was logged, but for what a clock says."""
    lines = read_lines(epath.Path(workdir / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path."""
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == STEPS
    return saved.arrays(workdir, STEPS)


def place(workdir: pathlib.Path) -> dict[str, object]:
    """In the data, as a start from the last checkpoint would read it."""
    return read_place(epath.Path(workdir / f"checkpoints/{STEPS}"))


def assert_same_bits(workdir: pathlib.Path, wanted: pathlib.Path) -> None:
    assert metrics(workdir) == metrics(wanted)
    one, other = final_state(wanted), final_state(workdir)
    assert one.keys() == other.keys()
    for part in ("params", "mu", "nu", "ema", "rng", "guard"):
        assert any(part in name for name in one), part
    for name in one:
        np.testing.assert_array_equal(other[name], one[name], err_msg=name, strict=True)
    assert place(workdir) == place(wanted) and place(wanted)["position"] == STEPS * 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    assert made.run(made.folder / "whole") == 0
    assert list(made.cache.rglob("*-cache"))  # without it every start compiles anew, and takes twice as long
    return made


def check(runs: Runs, workdir: pathlib.Path, faults: list[Fault]) -> None:
    for fault in faults:
        if runs.run(workdir, fault) == 0:
            break  # it was done before the moment came
    assert runs.run(workdir) == 0
    assert_same_bits(workdir, runs.folder / "whole")


KILL, TERM = signal.SIGKILL, signal.SIGTERM
SEEDS = {
    0: [Fault(KILL, "compile"), Fault(KILL, "evaluate", 1, 0.1)],
    1: [Fault(KILL, "save"), Fault(TERM, "evaluate", 3)],  # the last of them
    2: [Fault(KILL, "data", 4), Fault(TERM, "evaluate")],
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_whenever_it_dies_the_bits_are_the_same(runs: Runs, seed: int) -> None:
    check(runs, runs.folder / f"main-{seed}", SEEDS[seed])
    print(dict(runs.hit))


@pytest.mark.slow
def test_asked_to_stop_at_every_moment(runs: Runs) -> None:
    before = runs.hit.copy()
    # In two runs, as a start that has a checkpoint and one that has none have not the same to lose; and the compiler is
    # met where it works for seconds.
    first = [Fault(TERM, "start"), Fault(TERM, "ready"), Fault(TERM, "compile", seconds=3.0, compiles=True)]
    first += [Fault(TERM, moment) for moment in ("data", "evaluate", "restore", "save", "report")]
    check(runs, runs.folder / "asked", first)
    again = [Fault(TERM, "step", 2), Fault(TERM, "compile", seconds=3.0, compiles=True), Fault(TERM, "data", 2)]
    again += [Fault(TERM, "save", seconds=0.3), Fault(TERM, "evaluate", seconds=0.1)]
    check(runs, runs.folder / "asked-again", again)
    hit = runs.hit - before
    print(dict(hit), "seconds until they had ended:", runs.seconds)
    assert sum(count for name, count in hit.items() if "in flight" not in name) == len(first + again), hit
    # What lasts long enough for a signal to meet it wherever the machine is busy.
    assert {"SIGTERM start", "SIGTERM compile", "SIGTERM evaluate", "SIGTERM save in flight"} <= hit.keys(), hit


def drawn(seed: int) -> list[Fault]:
    """A SIGKILL when something begins, mostly at once; and in every third seed one more signal, at any time."""
    rng, phase = random.Random(seed), PHASES[seed // 2 % len(PHASES)]
    count = rng.randint(1, 3)
    if phase in ("start", "compile"):  # once in each process
        count = 1
    faults = [Fault(KILL, phase, count, rng.choice([0.0, 0.0, rng.random()]))]
    if phase == "compile":
        faults = [Fault(KILL, phase, 1, rng.uniform(0.0, 6.0), compiles=True)]
    if seed % 3 == 0:
        faults.append(Fault(rng.choice([KILL, TERM]), "", seconds=rng.uniform(1.0, 12.0)))
    return faults


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(5))
def test_twenty_seeds(runs: Runs, piece: int) -> None:
    """Four of them in each of five tests, which several workers of pytest can share."""
    before = runs.hit.copy()
    for seed in range(piece, 20, 5):
        check(runs, runs.folder / f"drawn-{seed}", drawn(seed))
    hit = runs.hit - before
    print(dict(hit))
    # A fault may come to nothing where it is drawn for later than the run's end; most must not.
    assert sum(count for name, count in hit.items() if "save in flight" not in name) >= 4, hit
