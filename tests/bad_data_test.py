"""A run over data with faults: it goes on, says what it left out, and ends where there is too much of it."""

from __future__ import annotations

import json
import pathlib
import runpy
import signal
from typing import Any

import pytest

from coca_jax import run
from coca_jax.data import records
from coca_jax.data.records import Record
from coca_jax.data.sources import open_source
from coca_jax.train import loop, stopping
from coca_jax.train.metrics import read_lines
from tests import pairs

FAULTS = {3: b"", 7: b"<html>404 Not Found</html>", 11: None}  # None: no caption


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small set, 3 of its 32 records damaged, and a second, sound one of 16."""
    folder = tmp_path_factory.mktemp("faults")
    spec, tokenizer = pairs.write(folder)
    sound = [open_source(spec)[i] for i in range(32)]
    packed = []
    for number, record in enumerate(sound):
        if number in FAULTS:
            image = FAULTS[number]
            record = Record(record.key, record.image if image is None else image, (" ",) if image is None else ("a",))
        packed.append(records.pack(record, 24, 24))
    records.write(folder / "faults.array_record", packed)
    records.write(folder / "sound.array_record", [records.pack(record, 24, 24) for record in sound[:16]])
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.loss.lambda_cap = 0.0  # half of the model compiles in half the time
    c.steps, c.checkpoint.every = 12, 4
    c.data.train, c.data.tokenizer = f"array_record:{folder}/faults.array_record", str(tokenizer)
    c.evaluate.splits = (c.data.train,)
    return c


def changed(recipe: Any, **changes: Any) -> Any:
    c = recipe.copy_and_resolve_references()
    for path, value in changes.items():
        group, _, key = path.rpartition("__")
        (c[group] if group else c)[key] = value
    return c


def test_faults_are_counted_listed_and_replaced(recipe: Any, tmp_path: pathlib.Path) -> None:
    assert run.run(recipe, str(tmp_path)) == 0
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    counts = [line["data/bad"] for line in lines]
    assert counts == sorted(counts)
    # 12 batches of 8 are three epochs of 32.
    assert lines[-1]["data/epochs"] == 3.0 and lines[3]["data/epochs"] == 1.0
    assert counts[3] == 3 and counts[-1] == 9
    reasons = ("empty", "not_a_picture", "no_caption")
    assert [lines[-1][f"data/bad/{reason}"] for reason in reasons] == [3, 3, 3]
    listed = [json.loads(line) for line in (tmp_path / "bad_examples.jsonl").read_text().splitlines()]
    assert {(line["record"], line["reason"]) for line in listed} == set(zip(FAULTS, reasons, strict=True))
    assert all(line["source"] == recipe.data.train and line["key"] for line in listed) and len(listed) == 3
    # Evaluation leaves the two out that have no picture; the third is a picture that nothing asks for.
    (evaluated,) = [line for line in read_lines(tmp_path / "metrics.jsonl") if "faults/images" in line]
    assert evaluated["faults/images"] == 30 and evaluated["faults/bad"] == 2


def test_too_many_faults_end_the_run_with_the_tally(
    recipe: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = str(run.run(changed(recipe, data__max_bad=0.0), str(tmp_path)))
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert "training examples cannot be used, more than config.data.max_bad=0: " in said
    assert f"see {tmp_path}/bad_examples.jsonl" in said and "raise config.data.max_bad" in said
    # What it asks for can be done in the same workdir.
    assert run.run(changed(recipe, data__max_bad=0.5, steps=12), str(tmp_path)) == 0


def test_a_mixture_may_change_its_weights_and_nothing_else(recipe: Any, tmp_path: pathlib.Path) -> None:
    faulty, sound = recipe.data.train, recipe.data.train.replace("faults.", "sound.")
    first = changed(recipe, data__train=f"0.5 * {faulty} + 0.5 * {sound}", evaluate__splits=())
    whole = tmp_path / "whole"
    assert run.run(first, str(whole)) == 0
    last = [line for line in read_lines(whole / "metrics.jsonl") if "loss" in line][-1]
    assert last["data/epochs/0"] == pytest.approx(48 / 32, abs=0.1)
    assert last["data/epochs/1"] == pytest.approx(48 / 16, abs=0.2)

    other = changed(first, data__train=f"{faulty} + {sound.replace('sound', 'faults')}")
    assert "stands there twice" in str(run.run(other, str(whole)))
    other = changed(first, data__train=f"0.5 * {sound} + 0.5 * {faulty}")
    said = str(run.run(other, str(whole)))
    assert "config.data.train=" in said and "was begun with" in said and "put it back" in said


@pytest.mark.slow
def test_weights_that_change_on_the_way_hold_from_there_on(
    recipe: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty, sound = recipe.data.train, recipe.data.train.replace("faults.", "sound.")
    c = changed(recipe, data__train=f"0.5 * {faulty} + 0.5 * {sound}", evaluate__splits=())
    stopped = changed(c, data__max_bad=0.5)
    # Stopped as a user stops it, after the checkpoint of step 4.
    real = loop.Checkpoints.save

    def save(self: Any, state: Any, *arguments: Any) -> None:
        real(self, state, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    assert run.run(stopped, str(tmp_path)) == stopping.EXIT_STOPPED
    monkeypatch.undo()
    begun = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line][-1]
    assert run.run(changed(stopped, data__train=f"0.9 * {faulty} + 0.1 * {sound}"), str(tmp_path)) == 0
    last = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line][-1]
    steps = 12 - begun["step"]
    assert 0 < steps < 9
    assert 32 * (last["data/epochs/0"] - begun["data/epochs/0"]) == pytest.approx(0.9 * 8 * steps, abs=3)
    assert 16 * (last["data/epochs/1"] - begun["data/epochs/1"]) == pytest.approx(0.1 * 8 * steps, abs=3)
