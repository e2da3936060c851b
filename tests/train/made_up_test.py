"""An evaluation that a run was stopped in is made by the next start, and kept with the step it is of."""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath

from coca_jax import run
from coca_jax.evaluator import Evaluator
from coca_jax.train.checkpoint.folder import EVALUATION, read_metrics, read_place
from coca_jax.train.metrics import read_lines
from coca_jax.train.stopping import EXIT_STOPPED, Interrupted
from tests import pairs

BEST = "shapes/image_to_text/r1"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, tokenizer = pairs.write(tmp_path_factory.mktemp("pairs"))
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer, c.loss.lambda_cap = source, str(tokenizer), 0.0
    c.steps = 6
    c.checkpoint.update(every=1, keep=1)
    c.evaluate.update(splits=(source,), every=2, captions=0, best=BEST)
    return c


def steps(workdir: pathlib.Path) -> list[epath.Path]:
    folders = (workdir / "checkpoints").iterdir()
    return [epath.Path(path) for path in sorted(folders, key=lambda path: int(path.name))]


@pytest.mark.slow
def test_the_next_start_keeps_what_it_gives_with_the_step(
    recipe: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    evaluate = Evaluator.__call__
    stopped_at = {2, 6}

    def scored(self: Evaluator, state: Any, poll: Callable[[], None]) -> dict[str, float]:
        step = int(state.step)
        if step in stopped_at and tmp_path / "stopped" == pathlib.Path(self._workdir):
            stopped_at.remove(step)
            raise Interrupted
        made.append(step)
        return evaluate(self, state, poll) | {BEST: 1.0 / step}  # the first is the best

    monkeypatch.setattr(Evaluator, "__call__", scored)
    assert run.run(recipe, str(tmp_path / "whole")) == 0
    assert made == [2, 4, 6]
    made.clear()

    stopped = tmp_path / "stopped"
    assert run.run(recipe, str(stopped)) == EXIT_STOPPED
    (step,) = steps(stopped)
    assert step.name == "2" and read_place(step)["evaluated"] is False and read_metrics(step) is None
    assert run.run(recipe, str(stopped)) == EXIT_STOPPED  # makes up for step 2, and is stopped in step 6's
    assert made == [2, 4]
    best, newest = steps(stopped)
    assert (best.name, newest.name) == ("2", "6")  # and not 4
    found = read_metrics(best)
    assert found and found[BEST] == 0.5 and "evaluated" not in read_place(best)
    assert read_place(newest)["evaluated"] is False
    assert run.run(recipe, str(stopped)) == 0
    assert made == [2, 4, 6]
    for one, other in zip(steps(stopped), steps(tmp_path / "whole"), strict=True):
        assert one.name == other.name and (one / EVALUATION).exists() and not (other / EVALUATION).exists()
        assert read_place(one) == read_place(other) and read_metrics(one) == read_metrics(other)
    lines = [
        [line for line in read_lines(epath.Path(path / "metrics.jsonl")) if BEST in line]
        for path in (stopped, tmp_path / "whole")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 6]
    assert run.run(recipe, str(stopped)) == 0 and made == [2, 4, 6]  # nothing is left to make


def test_of_a_damaged_file_the_evaluation_is_made_again(tmp_path: pathlib.Path) -> None:
    folder = epath.Path(tmp_path)
    (folder / "data").mkdir()
    (folder / "data" / "metadata").write_text('{"position": 8, "evaluated": false}')
    for damaged in ("", "[1", '"text"', "3", "[" * 100_000):
        (folder / EVALUATION).write_text(damaged)
        assert read_metrics(folder) is None and read_place(folder)["evaluated"] is False
    (folder / EVALUATION).write_text("{}")
    assert read_place(folder) == {"position": 8}
