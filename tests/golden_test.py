"""What nobody should change without noticing: every recipe, the shapes of the parameters, the first steps' figures.

The figures are in tests/golden/. A change that is meant is recorded by `python -m tests.golden_test --record`, and
reviewed as a difference of those files.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import runpy
from typing import Any

import jax
import numpy as np
import pytest

from coca_jax import config
from coca_jax.sharding import path_of
from coca_jax.train import guard, optimizer, state
from coca_jax.train.step import train_step
from tests import tiny

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
RECORD = "if that is meant: python -m tests.golden_test --record"

SHAPES_OF = ("coca_base", "coca_large", "coca_giant", "quickstart")
# Of the steps' figures, relative: float32 sums in another order, by another jax or processor. The compiler's optimiser
# being on or off makes 2e-6.
TOLERANCE = 2e-4
# Image encoder and text decoder, paper (Yu et al. 2022), table 1.
PAPER = {"coca_base": (86e6, 297e6), "coca_large": (303e6, 484e6), "coca_giant": (1.0e9, 1.1e9)}


def recipe(name: str) -> config.Config:
    return config.from_config_dict(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())


def recipes() -> dict[str, Any]:
    """Recipe -> its whole configuration."""
    return {file.stem: json.loads(config.to_json(recipe(file.stem))) for file in sorted(CONFIGS.glob("*.py"))}


@functools.cache
def shapes(name: str) -> dict[str, str]:
    """Path -> shape and dtype of every parameter of a recipe; nothing is allocated."""
    leaves = jax.tree_util.tree_leaves_with_path(state.abstract_parameters(recipe(name)))
    return {path_of(path): f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {leaf.dtype}" for path, leaf in leaves}


def first_steps() -> dict[str, Any]:
    """The figures of the small model's first two steps. Parameters and batches are NumPy's: the same everywhere."""
    c = tiny.CONFIG
    params = tiny.parameters(c.model)
    tx = optimizer.make_optimizer(c.optimizer, c.steps, params)
    now = state.TrainState(
        np.zeros((), np.int32), params, jax.jit(tx.init)(params), None, jax.random.key(0), guard.fresh()
    )
    step = jax.jit(lambda now, batch: train_step(c, tx, now, batch))
    found = {}
    for number in (1, 2):
        now, metrics = step(now, tiny.batch(c.model, [9, 8, 7, 6, 5, 4, 3, 2], seed=number))
        found[f"step {number}"] = {name: float(value) for name, value in sorted(metrics.items())}
    return found


def drift(recorded: Any, found: Any, where: str, tolerance: float = 0.0) -> list[str]:
    """One line for each value that is not what was recorded."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        return [
            line
            for key in [*recorded, *(key for key in found if key not in recorded)]
            for line in drift(recorded.get(key, "nothing"), found.get(key, "nothing"), f"{where}/{key}", tolerance)
        ]
    close = recorded == found or (
        tolerance > 0
        and isinstance(recorded, float)
        and isinstance(found, float)
        and math.isclose(recorded, found, rel_tol=tolerance, abs_tol=1e-7)
    )
    return [] if close else [f"{where} was {recorded!r} and is {found!r}"]


def compare(file: str, found: Any, tolerance: float = 0.0) -> None:
    lines = drift(json.loads((GOLDEN / file).read_text()), found, file, tolerance)
    if lines:
        pytest.fail("\n".join([*lines[:40], f"{len(lines)} in all; {RECORD}"]), pytrace=False)


def parameter_counts(name: str) -> tuple[int, int]:
    """Of the image encoder and the text decoder."""
    totals = {"image_encoder": 0, "text_decoder": 0}
    for path, shape in shapes(name).items():
        part = path.split("/")[0]
        if part in totals:
            totals[part] += math.prod(int(size) for size in shape.split()[0].split("x"))
    return totals["image_encoder"], totals["text_decoder"]


def test_recipes() -> None:
    compare("recipes.json", recipes())


def test_parameter_shapes() -> None:
    compare("shapes.json", {name: shapes(name) for name in SHAPES_OF})


def test_first_steps() -> None:
    compare("first_steps.json", first_steps(), TOLERANCE)


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(name: str) -> None:
    for found, wanted in zip(parameter_counts(name), PAPER[name], strict=True):
        assert abs(found / wanted - 1) < 0.02, f"{name}: {found / 1e6:.1f}M where the paper has {wanted / 1e6:.0f}M"


def test_drift_is_named() -> None:
    lines = drift({"a": {"b": 1, "c": 2.0}, "d": 0}, {"a": {"b": 3, "c": 2.00001}, "e": 0}, "file", 1e-4)
    assert lines == ["file/a/b was 1 and is 3", "file/d was 0 and is 'nothing'", "file/e was 'nothing' and is 0"]
    assert drift({"c": 2.0}, {"c": 2.00001}, "file") == ["file/c was 2.0 and is 2.00001"]
    assert drift({"c": 2.0}, {"c": float("nan")}, "file", 1e-4)
    with pytest.raises(
        pytest.fail.Exception, match=r"peak_lr was [^\n]*\n1 in all; if that is meant: python -m tests\.golden"
    ):
        changed = recipes()
        changed["coca_base"]["optimizer"]["peak_lr"] *= 2
        compare("recipes.json", changed)


def record() -> None:
    for file, values in (
        ("recipes.json", recipes()),
        ("shapes.json", {name: shapes(name) for name in SHAPES_OF}),
        ("first_steps.json", first_steps()),
    ):
        path = GOLDEN / file
        before = json.loads(path.read_text()) if path.exists() else {}
        values = json.loads(json.dumps(values))
        lines = drift(before, values, file, TOLERANCE if file == "first_steps.json" else 0.0)
        if lines:  # a figure within the tolerance keeps its recorded digits
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values, indent=1) + "\n")
        print(*(lines if before else []), f"{path}: {len(lines)} values changed", sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", required=True, help="write what is now into tests/golden/")
    parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    record()
