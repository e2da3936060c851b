"""Reader processes that are killed, stopped or raise, and the end of a process that has readers. Real signals."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from coca_jax import config
from coca_jax.config import ConfigError
from tests import conftest, pairs

# Readers import the main module: it must be a file, and guarded. Prints what each of the cases raises, as JSON.
PROGRAM = """
import dataclasses, json, os, signal, sys, time
from coca_jax import config
from coca_jax.data import pipeline
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer


class Faulty:
    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        if name == "source":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 5 and os.path.exists(sys.argv[3] + ".wait"):
            time.sleep(1000)
        if index == 6 and os.path.exists(sys.argv[3] + ".raise"):
            raise KeyError("no such field")
        return self.source[index]


def main():
    source, tokenizer = Faulty(open_source(sys.argv[1])), Tokenizer(sys.argv[2])
    data = config.Data(workers=2, threads=1, worker_timeout=20.0)
    for case in sys.argv[4:]:
        faults = sys.argv[3] + "." + case
        options = dict(image_size=16, length=8, batch_size=2, seed=0)
        iterator = iter(pipeline.train_loader(source, tokenizer, data, **options))
        for _ in range(6):
            next(iterator)
        readers = [page[0] for page in iterator._pages()]
        if case in ("wait", "raise"):
            open(faults, "w").close()
        elif case == "parent":
            print(json.dumps(readers), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(readers[1], getattr(signal, case))
        try:
            for _ in range(1000):
                next(iterator)
            said = "nothing"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        iterator.close()
        if os.path.exists(faults):
            os.remove(faults)
        print(json.dumps([said, readers[1]]), flush=True)


if __name__ == "__main__":
    main()
"""


def lives(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_reader_that_fails_is_named_and_none_outlives_the_run(tmp_path: pathlib.Path) -> None:
    source, tokenizer = pairs.write(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    cases = ["SIGKILL", "SIGSTOP", "wait", "raise", "parent"]
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", str(source), str(tokenizer), tmp_path / "fault", *cases],
        env=os.environ | conftest.BYTECODE | {"PYTHONPATH": str(conftest.REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    *told, readers = (json.loads(line) for line in done.stdout.splitlines())
    said = {case: text for case, (text, _) in zip(cases, told, strict=False)}
    assert all("\n" not in text for text, _ in told), told
    for case, (text, process) in zip(cases[:2], told, strict=False):
        assert text.startswith(f"ReaderLost: reader 1 of 2 (process {process}) "), (case, text)
    assert "was ended by SIGKILL" in said["SIGKILL"] and "memory" in said["SIGKILL"]
    assert "config.data.workers" in said["SIGKILL"]
    assert re.search("has answered nothing for [0-9]+ s", said["SIGSTOP"]) and "it is stopped (T)" in said["SIGSTOP"]
    assert "config.data.worker_timeout" in said["SIGSTOP"]
    assert "ReaderLost" in said["wait"] and "record 5 since" in said["wait"]  # what it reads, not what it has read
    assert "DataError: a reader process failed: KeyError: 'no such field' (" in said["raise"]

    deadline = time.monotonic() + 60
    while any(map(lives, readers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, readers))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_timeout_of_readers_is_checked(value: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.worker_timeout"):
        config.check(config.Config(data=config.Data(worker_timeout=value)))
