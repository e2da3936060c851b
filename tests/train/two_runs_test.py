"""Two real runs in one workdir: the second is refused and told of the first, and a kill does not lock anyone out."""

from __future__ import annotations

import pathlib
import runpy
import signal
import socket

from coca_jax import run
from tests import pairs
from tests.train import resume_test


def test_the_second_run_is_refused_until_the_first_is_dead(tmp_path: pathlib.Path) -> None:
    source, tokenizer = pairs.write(tmp_path)
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    workdir = tmp_path / "run"
    first = resume_test.start(tmp_path, workdir, source, tokenizer)
    try:
        resume_test.wait_for_step(first, workdir, 1)
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
