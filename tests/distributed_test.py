"""Several processes: how they are told of each other, that they give what one gives, and how they end together."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pytest
from etils import epath

from coca_jax import distributed
from coca_jax.distributed import DistributedError, Job
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import read_lines
from tests import conftest, pairs

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# ---------------------------------------------------------------------------------------------------------------------
# What the flags and the environment say

ADDRESS, COUNT, INDEX = distributed.FLAGS


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        ({}, {}, None),
        ({ADDRESS: "", COUNT: "", INDEX: ""}, {"PATH": "/bin"}, None),
        ({ADDRESS: "n0:1234", COUNT: "4", INDEX: "3"}, {}, Job("n0:1234", 4, 3, ADDRESS)),
        ({ADDRESS: "[::1]:1234", COUNT: "2", INDEX: "0"}, {}, Job("[::1]:1234", 2, 0, ADDRESS)),
        ({COUNT: "1"}, {}, None),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "n0:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Job("n0:1", 2, 1, "JAX_COORDINATOR_ADDRESS"),
        ),
        (
            {},
            {
                **{"JAX_COORDINATOR_ADDRESS": "n0", "JAX_COORDINATOR_PORT": "77"},
                **{"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            },
            Job("n0:77", 2, 1, "JAX_COORDINATOR_ADDRESS"),
        ),
        (
            {},
            {"MASTER_ADDR": "n0", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9"},
            Job("n0:29500", 16, 9, "MASTER_ADDR"),
        ),
        # torchrun with eight processes a host, which listens at its port itself.
        (
            {},
            {
                **{"MASTER_ADDR": "n0", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9"},
                **{"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            },
            Job("n0:29501", 16, 9, "MASTER_ADDR", [1]),
        ),
        ({}, {"WORLD_SIZE": "1", "RANK": "0"}, None),
        # Flags come before variables.
        (
            {ADDRESS: "n0:1", COUNT: "2", INDEX: "1"},
            {"MASTER_ADDR": "n9", "MASTER_PORT": "9", "WORLD_SIZE": "9", "RANK": "8"},
            Job("n0:1", 2, 1, ADDRESS),
        ),
    ],
)
def test_a_job_is_found(flags: dict[str, str], environment: dict[str, str], wanted: Job | None) -> None:
    assert distributed.find_job(flags, environment) == wanted


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        ({ADDRESS: "n0:1"}, {}, "--coordinator=n0:1 but no --num_processes and no --process_id: give all of"),
        ({ADDRESS: "n0:1", COUNT: "two", INDEX: "0"}, {}, "--num_processes='two' is not a number of 1 or more"),
        ({ADDRESS: "n0:1", COUNT: "0", INDEX: "0"}, {}, "--num_processes='0' is not a number of 1 or more"),
        ({ADDRESS: "n0:1", COUNT: "4", INDEX: "-1"}, {}, "--process_id='-1' is not a number of 0 or more"),
        ({ADDRESS: "n0:1", COUNT: "4", INDEX: "4"}, {}, "--process_id=4 is out of range for --num_processes=4"),
        ({ADDRESS: "n0", COUNT: "2", INDEX: "0"}, {}, "--coordinator=n0: write it host:port, e.g. --coordinator="),
        ({ADDRESS: "n0:99999", COUNT: "2", INDEX: "0"}, {}, "--coordinator=n0:99999: write it host:port"),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "n0:1", "JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES=2 but no JAX_PROCESS_ID",
        ),
        ({}, {"MASTER_ADDR": "n0"}, "MASTER_ADDR=n0 but no WORLD_SIZE and no RANK"),
        ({}, {"MASTER_ADDR": "n0", "WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR=n0 but no MASTER_PORT"),
        ({}, {"WORLD_SIZE": "8", "RANK": "0"}, "WORLD_SIZE=8, RANK=0 but no MASTER_ADDR"),
        (
            {},
            {
                **{"MASTER_ADDR": "n0", "MASTER_PORT": "9", "WORLD_SIZE": "8", "RANK": "0"},
                **{"LOCAL_WORLD_SIZE": "8"},
            },
            "LOCAL_RANK='' is not a number",
        ),
    ],
)
def test_what_is_wrong_is_said(flags: dict[str, str], environment: dict[str, str], wanted: str) -> None:
    with pytest.raises(DistributedError) as error:
        distributed.find_job(flags, environment)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_an_address_alone_is_left_to_the_cluster() -> None:
    environment = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}  # as many batch scripts export
    assert distributed.find_job({}, environment, in_cluster=True) is None


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of other processes."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "MASTER_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_is_left_alone(bare: pytest.MonkeyPatch) -> None:
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.leave("error: here") == "error: here"
    assert distributed.gather({"a": (1,)}) == [{"a": (1,)}]
    distributed.check_same({"a": 1})


def test_slurm_without_srun(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("SLURM_NTASKS", "8")
    bare.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(DistributedError, match=r"SLURM_NTASKS=8.*SLURM_STEP_NODELIST is not set.*srun python"):
        distributed.initialize()
    bare.setenv("SLURM_NTASKS", "all")
    with pytest.raises(DistributedError, match=r"SLURM_NTASKS='all' is not a number"):
        distributed.initialize()


def test_a_coordinator_that_does_not_answer(bare: pytest.MonkeyPatch) -> None:
    address = f"localhost:{free_port()}"
    started = time.monotonic()
    with pytest.raises(DistributedError, match=rf"--coordinator={address} did not answer process 1 within 0\.5 s"):
        distributed.initialize({ADDRESS: address, COUNT: "2", INDEX: "1"}, timeout=0.5)
    assert time.monotonic() - started < 30
    with pytest.raises(DistributedError, match=r"nowhere\.invalid:1 did not answer process 1"):
        distributed.initialize({ADDRESS: "nowhere.invalid:1", COUNT: "2", INDEX: "1"}, timeout=0.5)


def test_a_port_that_is_taken(bare: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(DistributedError, match=rf"{address}: process 0 cannot listen.*choose a free port"):
            distributed.initialize({ADDRESS: address, COUNT: "2", INDEX: "0"})


def test_others_that_do_not_come(run_python: RunPython) -> None:
    arguments = ["-m", "coca_jax.main", "--config=configs/debug.py", "--workdir=/nowhere", "--coordinator_timeout=1"]
    address = f"localhost:{free_port()}"
    done = run_python([*arguments, f"{ADDRESS}={address}", f"{COUNT}=2", f"{INDEX}=0"], devices=1, check=False)
    assert done.returncode == distributed.EXIT_LOST and not done.stdout
    wanted = f"error: process 0 of 2 has waited 1 s for the others at --coordinator={address}"
    assert done.stderr.startswith(wanted) and len(done.stderr.splitlines()) == 1, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Real processes on this machine


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`launch(arguments, count, devices)` starts the processes of one job; those that are left at the end are killed.

    `{index}` in an argument is the number of the process.
    """
    started: list[subprocess.Popen[str]] = []

    def start(arguments: Sequence[str], count: int, devices: int = 1) -> list[subprocess.Popen[str]]:
        environment = os.environ | conftest.STRICT | conftest.BYTECODE
        environment |= {
            "PYTHONPATH": str(conftest.REPOSITORY),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            # One compilation for all that compute the same.
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "PJRT_NPROC": "8",
        }
        port = free_port()
        job = []
        for index in range(count):
            # By flags and by variables: both are only ways to say the same.
            told = [f"{ADDRESS}=localhost:{port}", f"{COUNT}={count}", f"{INDEX}={index}"]
            variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
            by_flags = count > 1 and index % 2 == 0 and "-m" in arguments
            if count > 1 and not by_flags:
                environment |= variables | {"RANK": str(index)}
            job.append(
                subprocess.Popen(
                    [sys.executable, *(a.replace("{index}", str(index)) for a in arguments), *told[: 3 * by_flags]],
                    cwd=conftest.REPOSITORY,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        started.extend(job)
        return job

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(job: list[subprocess.Popen[str]], expected: int = 0) -> list[str]:
    """What the processes said, once all have ended as expected."""
    said = [process.communicate(timeout=900)[0] for process in job]
    codes = [process.returncode for process in job]
    assert codes == [expected] * len(job), "\n----\n".join(
        f"{code}: {text}" for code, text in zip(codes, said, strict=True)
    )
    return said


def wait_until(job: list[subprocess.Popen[str]], happened: Callable[..., bool], *arguments: object) -> None:
    deadline = time.monotonic() + 900
    while not happened(*arguments):
        ended = [process for process in job if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


TALK = """
import jax, sys
from coca_jax import distributed
distributed.initialize()
index = jax.process_index()
assert jax.process_count() == 2 and len(jax.devices()) == 2
for value in (index, "ä" * 10 ** (3 * index), {"a": [index, None, 0.1 + 0.2]}, ""):
    print(distributed.gather(value) == [value if i == index else
          {"a": [i, None, 0.1 + 0.2]} if isinstance(value, dict) else
          ("ä" * 10 ** (3 * i) if value else "") if isinstance(value, str) else i for i in range(2)])
distributed.check_same({"same": (1, 2)["ab" == "a"]})
try:
    distributed.check_same({"config.seed": 3 + index, "other": 1})
except distributed.DistributedError as error:
    distributed.leave(f"error: {error}", patience=60)
"""


def test_processes_talk_and_fail_together(launch: Callable[..., list[subprocess.Popen[str]]]) -> None:
    started = time.monotonic()
    for said in finish(launch(["-c", TALK], 2), expected=1):
        assert [line for line in said.splitlines() if line in ("True", "False")] == ["True"] * 4, said
        assert "error: config.seed is 4 in process 1 and 3 in process 0: start all processes with the same" in said
        assert "Traceback" not in said and "Check failure" not in said
    assert time.monotonic() - started < 200


ONE_FAILS = """
import jax
from coca_jax import distributed
distributed.initialize()
if jax.process_index() == 1:
    distributed.leave("error: a broken record", patience=1)
try:
    distributed.gather("here")
except Exception as error:
    distributed.leave(f"error: {error}", patience=1)
"""


@pytest.mark.slow
def test_nobody_waits_for_one_that_failed(launch: Callable[..., list[subprocess.Popen[str]]]) -> None:
    job = launch(["-c", ONE_FAILS], 2)
    said = [process.communicate(timeout=280)[0] for process in job]
    assert job[1].returncode == 1 and "process 1 of 2: error: a broken record" in said[1], said[1]
    assert job[0].returncode == distributed.EXIT_LOST and "Check failure" not in said[0], said[0]
    assert re.search(r"process 0 of 2: process 1 of 2 \(on .*\) has ended: error: a broken record", said[0]), said[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pairs")
    source, tokenizer = pairs.write(folder)
    arguments = ["-m", "coca_jax.main", "--config=tests/tiny_recipe.py"]
    return [*arguments, f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]


def evaluated(recipe: list[str]) -> list[str]:
    """With an evaluation on a set whose size no batch divides: its last batch is filled up."""
    source = recipe[-2].partition("=")[2]
    splits = f"--config.evaluate.splits=({source!r},)"
    return [*recipe, splits, f"--config.evaluate.zero_shot={source}", "--config.evaluate.batch_size=11"]


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """What was measured, but for what a clock says."""
    lines = read_lines(epath.Path(workdir) / "metrics.jsonl")
    clocks = ("second", "tflops", "mfu")
    return [{k: v for k, v in line.items() if not any(clock in k for clock in clocks)} for line in lines]


def has_lines(workdir: pathlib.Path, count: int) -> bool:
    return len(metrics(workdir)) >= count


def newest(workdir: pathlib.Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def has_newer(workdir: pathlib.Path, step: int) -> bool:
    return newest(workdir) > step


def assert_same_metrics(workdir: pathlib.Path, wanted: pathlib.Path, tolerance: float) -> None:
    """Of the steps that both have made."""
    mine, theirs = metrics(workdir), metrics(wanted)
    for line, other in zip(mine, theirs, strict=False):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if value is None or other[name] is None:  # not finite: the guard's bound before there is one
                assert value is other[name], f"{line} {name}"
                continue
            np.testing.assert_allclose(value, other[name], rtol=tolerance, atol=tolerance, err_msg=f"{line} {name}")


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_stop_together(
    tmp_path: pathlib.Path, recipe: list[str], launch: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    # Half of the model, which compiles in half the time: the half in which every example meets all others.
    settings = [*evaluated(recipe), "--config.loss.lambda_cap=0.0", "--config.steps=1000000"]
    settings += ["--config.evaluate.every=4", "--config.checkpoint.every=1000000"]
    settings += ["--config.optimizer.schedule=constant", "--config.optimizer.warmup=0.0"]
    for name, count in (("one", 1), ("two", 2)):
        workdir = tmp_path / name
        job = launch([*settings, f"--workdir={workdir}"], count, devices=2 // count)
        wait_until(job, has_lines, workdir, 7)
        job[-1].send_signal(signal.SIGTERM)  # of two not the first, which coordinates and writes
        said = finish(job, expected=143)
        with Checkpoints(workdir) as checkpoints:
            step = checkpoints.latest()
        assert step is not None and step >= 5 and f"stopped at step {step} of 1000000" in said[0], said[0]
        saved = json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())
        assert saved["position"] == 8 * step  # the batch is 8
    assert not [word for word in ("parameters", "step/s", "examples", "stopped") if word in said[1]], said[1]
    # One addition over two processes has one result, whichever comes first: no tolerance.
    assert_same_metrics(tmp_path / "two", tmp_path / "one", tolerance=0.0)
    assert any("zero_shot/top1" in line for line in metrics(tmp_path / "two")[:7])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_whole_run_of_several_processes(
    tmp_path: pathlib.Path, recipe: list[str], launch: Callable[..., list[subprocess.Popen[str]]], count: int
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    finish(launch([*evaluated(recipe), f"--workdir={one}"], 1, devices=4))
    said = finish(launch([*evaluated(recipe), f"--workdir={several}"], count, devices=4 // count))
    # Four numbers may be added in another order.
    assert_same_metrics(several, one, tolerance=1e-4)
    last = metrics(several)[-1]
    assert last["step"] == 12
    assert {"zero_shot/top1", "shapes/caption_exact_match", "shapes/pixel/image_to_text/r1"} <= last.keys()
    assert "report:" in said[0] and (several / "report.html").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(
    tmp_path: pathlib.Path, recipe: list[str], launch: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    """Killed with four processes, killed again with two, and finished by one: as if one had made it all."""
    settings = [*recipe, "--config.steps=60", "--config.checkpoint.every=10", "--config.loss.lambda_cap=0.0"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(launch([*settings, f"--workdir={whole}"], 1, devices=4))

    begun = 0
    for count in (4, 2):
        job = launch([*settings, f"--workdir={moved}"], count, devices=4 // count)
        wait_until(job, has_newer, moved, begun or 10)  # two checkpoints at first: one is going to be damaged
        for process in reversed(job):  # the first last: the others end when it is gone
            process.kill()
        said = finish(job, expected=-signal.SIGKILL)
        assert ["resumed" in text for text in said] == [begun > 0] + [False] * (count - 1)  # told by one
        assert begun < newest(moved) < 60
        begun = newest(moved)
        if count == 4:  # and a bit of its last checkpoint has flipped: the two processes agree on the one before
            files = [path for path in (moved / "checkpoints" / str(begun)).rglob("*") if path.is_file()]
            file = max(files, key=lambda path: path.stat().st_size)
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert len(list((moved / "checkpoints").glob("*.quarantined-1"))) == 1
    finish(launch([*settings, f"--workdir={moved}"], 1, devices=4))
    done = subprocess.run(
        [sys.executable, "-m", "coca_jax.checkpoint", "verify", str(moved)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(", verified") == 2, done
    assert [line["step"] for line in metrics(moved)] == [line["step"] for line in metrics(whole)]
    assert metrics(moved)[-1]["step"] == 60
    # The order in which four numbers are added differs, and sixty steps carry that on.
    assert_same_metrics(moved, whole, tolerance=1e-4)


@pytest.mark.slow  # it waits half a minute, as for a network folder
def test_a_workdir_that_is_not_shared(
    tmp_path: pathlib.Path, recipe: list[str], launch: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    for said in finish(launch([*recipe, f"--workdir={tmp_path}/{{index}}"], 2), expected=1):
        assert "is not one folder: what process 0 wrote into it is not seen by process 1;" in said, said
        assert "Traceback" not in said
