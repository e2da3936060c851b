"""The same shards by Apache Beam."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from coca_jax.data.prepare import beam
from coca_jax.data.prepare.convert import convert
from coca_jax.data.prepare.inputs import open_inputs
from coca_jax.data.prepare.plan import make
from coca_jax.data.records import DataError
from tests.conftest import REPOSITORY
from tests.data.prepare import sets

SETTINGS = {"name": "set", "records_per_shard": 12, "max_bad": 0.2}
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="needs an environment of its own with pip install 'coca_jax[beam]'",
)


def test_without_beam(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # importing it fails
    with pytest.raises(DataError, match=r"--runner=FlinkRunner needs Apache Beam .*pip install 'coca_jax\[beam\]'"):
        convert(mixed, tmp_path / "out", runner="FlinkRunner", **SETTINGS)


def test_what_a_machine_does(mixed, tmp_path):
    """Beam hands out text and numbers; an error of the data comes back as a file."""
    plan = make(
        mixed,
        str(tmp_path / "out"),
        name="set",
        records_per_shard=12,
        shard_size=0,
        max_side=0,
        quality=92,
        shuffle=False,
        seed=0,
        vocab_size=0,
        sample=10,
        tokenizer="",
        length=64,
    )
    plan.work.mkdir(parents=True)
    assert beam.process(plan.to_json(), "drop", 2) == 2
    assert plan.staged(2).is_file() and not plan.path(2).exists()
    beam.process(plan.to_json(), "stop", 0)
    (error,) = plan.work.glob("error-*")
    assert "record 7: truncated" in error.read_text() and not plan.staged(0).exists()


@needs_beam
@pytest.mark.slow
def test_direct_runner_writes_the_same_bytes(mixed, tmp_path):
    arguments = [f"--{name}={value}" for name, value in SETTINGS.items()]
    run = [sys.executable, "-m", "coca_jax.data.prepare", "convert", f"--source={mixed}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for args in ("", "--direct_running_mode=multi_processing --direct_num_workers=2"):
        out = tmp_path / f"beam{len(args)}"
        subprocess.run(
            [*run, f"--out={out}", "--runner=DirectRunner", f"--beam_args={args}"],
            env=environment,
            check=True,
            timeout=200,
        )
        open_inputs.cache_clear()
        convert(mixed, tmp_path / "local", workers=1, progress=False, **SETTINGS)
        assert sets.contents(out) == sets.contents(tmp_path / "local")
    # What goes wrong with the data is one line here, too.
    failed = subprocess.run(
        [*run, f"--out={tmp_path / 'stop'}", "--runner=DirectRunner", "--bad=stop"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: record 7: truncated: ")
