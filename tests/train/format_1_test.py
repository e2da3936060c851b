"""A workdir that was written before there were manifests (format_1.tar.xz) goes on, to the last bit.

Written by version 0.1.0 of 2026-11-25, two CPU devices, tests/tiny_recipe.py with a width of 4, no captioning half and
no moving average: its step 8 of 12, the metrics of all 12, its data, and the digests of that version's state then.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tarfile

import jax
import pytest
from etils import epath

from coca_jax import config, run, sharding
from coca_jax.data import pipeline
from coca_jax.data.mixture import open_mixture
from coca_jax.train import optimizer, state
from coca_jax.train.checkpoint import Checkpoints, digest, manifest, read_config
from coca_jax.train.checkpoint import tree as trees
from coca_jax.train.metrics import read_lines

# What clocks say, and what later versions measure beside.
OTHER = ("second", "tflops", "mfu", "data/", "guard/")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(pathlib.Path(__file__).with_name("format_1.tar.xz")) as file:
        file.extractall(folder, filter="data")
    path = folder / "run" / "config.json"  # its data are here now
    written = json.loads(path.read_text())
    written["data"]["train"] = f"array_record:{folder}/shapes.array_record"
    written["data"]["tokenizer"] = str(folder / "run" / "tokenizer.model")
    path.write_text(json.dumps(written))
    return folder


def losses(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    lines = [line for line in read_lines(epath.Path(workdir) / "metrics.jsonl") if "loss" in line]
    return {line["step"]: {k: v for k, v in line.items() if not any(c in k for c in OTHER)} for line in lines}


def test_it_is_restored_and_goes_on(
    stored: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = json.loads((stored / "run" / "config.json").read_text())
    workdir = pathlib.Path(shutil.copytree(stored / "run", tmp_path / "old"))
    c = read_config(workdir)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    identity = pipeline.position_key(open_mixture(c.data.train), seed=c.seed)
    with jax.set_mesh(mesh), Checkpoints(workdir, c.checkpoint) as checkpoints:
        found = checkpoints.restore(state.abstract(c, tx, mesh), identity)
    assert found and int(found[0].step) == 8 and found[1]["position"] == 64
    assert "was saved before there were manifests: it is restored unverified" in caplog.text

    # The bits that the version that wrote it had: recorded with it, in the process that wrote it.
    recorded = json.loads((stored / "digests.json").read_text())
    digests = {path: digest.text(sums[0]) for path, sums in digest.of_process(trees.raw_key(found[0])).items()}
    assert {path: digests[path] for path in recorded} == recorded and len(recorded) > 100

    # The same state saved anew, in today's form: both resume alike, bit for bit, and as that version did.
    again = pathlib.Path(shutil.copytree(stored / "run", tmp_path / "new"))
    shutil.rmtree(again / "checkpoints")
    with jax.set_mesh(mesh), Checkpoints(again, config.Checkpoint()) as checkpoints:
        checkpoints.save(found[0], found[1], identity)
        checkpoints.wait()
    assert (again / "checkpoints" / "8" / manifest.FILE).exists()
    assert run.run(values, str(workdir)) == 0 and run.run(values, str(again)) == 0
    old, new, wanted = losses(workdir), losses(again), losses(stored / "run")
    assert list(wanted) == list(range(1, 13))
    assert old == new and list(old) == list(range(1, 13))
    # Step 9 is computed from the restored bits: only the order of sums may differ. AdamW divides each gradient by its
    # own size, also those that are nothing but rounding (biases of keys): its updates, and all later steps, differ by
    # up to 4e-4 between processors (AVX2 and AVX-512).
    for step, line in wanted.items():
        exact = {k for k in line if step <= 9 and (step <= 8 or k != "update_norm")}
        assert {k: old[step][k] for k in exact} == pytest.approx({k: line[k] for k in exact}, rel=1e-5), step
        assert {k: old[step][k] for k in line} == pytest.approx(line, rel=1e-3, abs=1e-5), step
    texts = [json.loads((w / "checkpoints" / "12" / manifest.FILE).read_text())["leaves"] for w in (workdir, again)]
    assert texts[0] == texts[1] and len(texts[0]) > 100
