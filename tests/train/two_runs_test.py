"""Two real runs in one workdir: the second is refused and told of the first, and a kill does not lock anyone out."""

from __future__ import annotations

import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from coca_jax import run
from coca_jax.train.metrics import read_lines
from tests import conftest, pairs


def start(folder: pathlib.Path, workdir: pathlib.Path, source: str, tokenizer: pathlib.Path) -> subprocess.Popen[str]:
    environment = os.environ | conftest.STRICT | conftest.BYTECODE
    environment |= {"PYTHONPATH": str(conftest.REPOSITORY), "COCA_JAX_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "coca_jax.main", "--config=tests/tiny_recipe.py", f"--workdir={workdir}"]
    command += [f"--config.data.train={source}", f"--config.data.tokenizer={tokenizer}"]
    return subprocess.Popen(
        command, cwd=conftest.REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen[str], workdir: pathlib.Path, step: int) -> None:
    """Until the run says that it has made a step."""
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}:\n{process.communicate()[0]}")
        if any(line["step"] >= step for line in read_lines(epath.Path(workdir / "metrics.jsonl"))):
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} in time")


@pytest.mark.slow
def test_the_second_run_is_refused_until_the_first_is_dead(tmp_path: pathlib.Path) -> None:
    source, tokenizer = pairs.write(tmp_path)
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    workdir = tmp_path / "run"
    first = start(tmp_path, workdir, source, tokenizer)
    try:
        wait_for_step(first, workdir, 1)
        first.send_signal(signal.SIGSTOP)  # it still has its workdir
        said = str(run.run(c, str(workdir)))
        assert said.startswith(f"error: --workdir={workdir} is in use by another run (host {socket.gethostname()}"), (
            said
        )
        assert f", pid {first.pid}, started 20" in said
        assert "in use" not in str(run.run(c, str(workdir), evaluate_only=True))
    finally:
        first.kill()
        first.communicate()
    assert run.run(c, str(workdir)) == 0
    assert not (workdir / "run.lock").exists()
