from __future__ import annotations

import pathlib
import time

import pytest
from etils import epath

from coca_jax import config
from coca_jax.train import watchdog


@pytest.mark.parametrize("least", [0.0, 0.001, 0.4])
def test_it_sleeps_between_two_looks_and_finds_a_slow_step(tmp_path: pathlib.Path, least: float) -> None:
    said: list[str] = []
    watching = watchdog.Watchdog(config.Guard(stall=20.0, stall_seconds=least), epath.Path(tmp_path), said.append)
    used = time.process_time()
    watching.begin(3, 1000.0)  # seconds that steps take: this one is none of the slow
    time.sleep(1.0)
    used = time.process_time() - used
    watching.begin(4, 0.001)
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
    watching.close()
    assert used < 0.5  # of one second: it took all of it
    assert [line.startswith("step 4 has taken") for line in said] == [True]
    assert [file.name for file in (tmp_path / watchdog.FOLDER).iterdir()] == ["step-4-00000.txt"]
