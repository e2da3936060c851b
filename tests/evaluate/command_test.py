"""`python -m coca_jax.evaluate` as it is started: on several processes and devices, killed and started again."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest

from coca_jax import config, evaluation
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported
from coca_jax.interop.weights import Weights
from tests import distributed_test, pairs, tiny
from tests.distributed_test import launch  # noqa: F401  (a fixture)

Launch = Callable[..., list[subprocess.Popen[str]]]
PICTURES = 270


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All evaluators on a folder of noisy shapes, two captions each, one picture torn; a model of random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    examples = pairs.examples()
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in examples] * 20, vocab_size=300)
    drawn = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    exported.write(Weights(config.Config(model=drawn), tiny.parameters(drawn), tokenizer, 5), folder / "model")
    (folder / "set").mkdir()
    rng, lines = np.random.default_rng(0), []
    for at in range(PICTURES):
        color, shape = examples[at % len(examples)]
        noisy = pairs.picture(color, shape).astype(int) + rng.integers(-20, 20, (1, 1, 3)) * (at % 7)
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "set" / f"{at}.png")
        captions = [pairs.caption(color, shape), f"{shape} {at}"]
        lines.append({"file_name": f"{at}.png", "captions": captions, "label": shape})
    (folder / "set" / "17.png").write_bytes(b"torn")
    (folder / "set" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = f"folder:{folder}/set"
    arguments = ["-m", "coca_jax.evaluate", f"--checkpoint={folder}/model", "--config=configs/evaluate.py"]
    arguments += [f"--config.evaluate.splits=({source!r},)", f"--config.evaluate.zero_shot={source}"]
    arguments += ["--config.evaluate.prompts=('a {}', '{}')", "--config.evaluate.likelihood=20"]
    return [*arguments, "--config.evaluate.batch_size=8", "--config.evaluate.captions=4"]


@pytest.fixture(scope="module")
def alone(command: list[str], run_python: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What one process with one device finds."""
    output = tmp_path_factory.mktemp("alone")
    run_python([*command, f"--output={output}"], devices=1, timeout=600)
    return output


def found(output: pathlib.Path) -> dict[str, Any]:
    return json.loads((output / "set" / "results.json").read_text())


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["metrics"].keys() == other["metrics"].keys() and one["classes"] == other["classes"]
    for key, value in one["metrics"].items():
        assert other["metrics"][key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=x"], "error: --output=PATH is needed; --help says what it may be"),
        (["--checkpoint=x", "--output=y", "z"], "error: unknown argument 'z'"),
        (
            ["--checkpoint=x", "--output=y", "--config=configs/evaluate.py", "--config.evaluate.likelihood=-1"],
            "error: config.evaluate.likelihood=-1",
        ),
    ],
)
def test_wrong_flags_get_one_line(run_python: Callable[..., Any], arguments: list[str], message: str) -> None:
    done = run_python(["-m", "coca_jax.evaluate", *arguments], devices=1, check=False)
    assert done.returncode == 1 and done.stderr.startswith(message), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_figures_of_another_way_to_read_pictures_are_not_taken_for_these(tmp_path: pathlib.Path) -> None:
    """The directory of a model says how pictures are read: weights and data alone do not make the figures."""
    examples = pairs.examples()[:4]
    tokenizer = Tokenizer.train([pairs.caption(*e) for e in examples] * 20, vocab_size=300)
    drawn = tiny.replace(tiny.MODEL, text__vocab_size=tokenizer.vocab_size)
    exported.write(Weights(config.Config(model=drawn), tiny.parameters(drawn), tokenizer, 5), tmp_path / "model")
    (tmp_path / "set").mkdir()
    lines = []
    for at, example in enumerate(examples):
        PIL.Image.fromarray(pairs.picture(*example)).save(tmp_path / "set" / f"{at}.png")
        lines.append(json.dumps({"file_name": f"{at}.png", "caption": pairs.caption(*example)}))
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    evaluate = {"splits": (f"folder:{tmp_path}/set",), "captions": 0, "batch_size": 8}

    def loss(output: str) -> float:
        assert evaluation.run({"evaluate": evaluate}, str(tmp_path / "model"), str(tmp_path / output)) == 0
        return found(tmp_path / output)["metrics"]["set/caption_loss"]

    before = loss("out")
    path = tmp_path / "model" / "coca_jax.json"
    described = json.loads(path.read_text())
    described["preprocessing"]["crop"] = 0.25
    path.write_text(json.dumps(described))
    after = loss("out")
    assert after == loss("new") != before


@pytest.mark.soak
def test_processes_and_devices_give_what_one_device_gives(
    command: list[str],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
    launch: Launch,  # noqa: F811
) -> None:
    said = {}
    for name, processes, devices in (("two", 2, 1), ("eight", 1, 8)):
        job = launch([*command, f"--output={tmp_path / name}"], processes, devices=devices)
        said[name] = distributed_test.finish(job)
    one = found(alone)
    assert one["metrics"]["set/bad"] == 1 and one["metrics"]["zero_shot/images"] == PICTURES - 1
    assert {"set/captions/cider", "set/likelihood/text_to_image/r1", "zero_shot/likelihood_pmi/top1"} <= set(
        one["metrics"]
    )
    # Sums over another number of rows, and captions of other rows beside them: float32.
    same(one, found(tmp_path / "two"), 1e-5)
    same(one, found(tmp_path / "eight"), 1e-5)
    assert "results:" in said["two"][0] and "results:" not in said["two"][1]
    assert (tmp_path / "two" / "results.txt").read_text() == (alone / "results.txt").read_text()


@pytest.mark.soak
def test_killed_inside_a_source_it_goes_on(
    command: list[str],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
    launch: Launch,  # noqa: F811
) -> None:
    killed = tmp_path / "killed"
    (job,) = launch([*command, f"--output={killed}"], 1)
    deadline = time.monotonic() + 300
    while len(list(killed.glob("set/pieces/pictures-*.npz"))) < 1:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (killed / "results.json").exists()
    before = len(list(killed.glob("set/pieces/*.npz")))
    (said,) = distributed_test.finish(launch([*command, f"--output={killed}"], 1))
    assert f"set: went on from {before} pieces that were kept" in said, said
    same(found(alone), found(killed), 0)
    assert not (killed / "set" / "pieces").exists() and (killed / "results.json").exists()
