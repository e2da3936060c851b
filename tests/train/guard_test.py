"""Numbers gone bad: what the compiled step leaves out, what it costs, and what a run does about it."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import runpy
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from coca_jax import config, run, sharding
from coca_jax.data import records
from coca_jax.data.records import Record
from coca_jax.data.sources.array_record import ArrayRecords
from coca_jax.train import guard as guards
from coca_jax.train import loop, optimizer, state
from coca_jax.train import step as steps
from coca_jax.train.checkpoint import Checkpoints
from coca_jax.train.metrics import read_lines
from tests import pairs, saved, tiny

LENGTHS = [9, 8, 7, 6, 5, 4, 3, 2]
MESH = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
# Half of the model, which compiles in half the time.
C = tiny.replace(tiny.CONFIG, loss__lambda_cap=0.0, optimizer__ema_decay=0.9)


def judged(c: config.Guard, values: list[tuple[float, float]]) -> tuple[guards.Guard, list[bool]]:
    """The guard after steps with these losses and gradient norms, and which of them were accepted."""
    judge = jax.jit(lambda guard, loss, norm: guards.judge(c, guard, loss, norm)[:2])
    guard, accepted = guards.fresh(), []
    for loss, norm in values:
        guard, ok = judge(guard, jnp.float32(loss), jnp.float32(norm))
        accepted.append(bool(ok))
    return guard, accepted


def even(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Steps as they mostly are: the logarithm of the norm has a deviation of 0.3 and falls slowly."""
    noise = np.random.default_rng(seed).normal(size=count)
    return [(1.0, float(np.exp(0.3 * z - 0.002 * i))) for i, z in enumerate(noise)]


def test_what_is_not_finite_and_what_is_a_spike() -> None:
    c = config.Guard(spike=8.0, after=50)
    before, _ = judged(c, even(200))
    bad = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, 200.0)]
    after, accepted = judged(c, even(200) + bad)
    assert accepted == [True] * 200 + [False] * 5
    assert (int(after.skipped), int(after.in_a_row), int(after.accepted)) == (5, 5, 200)
    for name in ("mean", "deviation"):  # to the bit: what was skipped is in no statistic
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert abs(float(before.mean) + 0.3) < 0.2 and abs(float(before.deviation) - 0.24) < 0.1
    more, accepted = judged(c, even(200) + bad + even(5, seed=1))
    assert all(accepted[-5:]) and int(more.in_a_row) == 0 and int(more.skipped) == 5
    # Off, and before there are enough steps, only what is not finite counts.
    assert all(judged(dataclasses.replace(c, spike=0.0), [*even(200), (1.0, 1e6)])[1])
    assert judged(c, [*even(20), (1.0, 1e6), (1.0, math.nan)])[1][-2:] == [True, False]
    # Looked for from the first step on, there is still nothing that the first could be a spike beside.
    assert judged(dataclasses.replace(c, after=0), [(1.0, 1e4), (1.0, 1.1e4), (1.0, 1e9)])[1] == [True, True, False]


def test_an_uneven_run_is_left_alone() -> None:
    """No step of 4,000 with twice the usual noise is taken for a spike, nor a change of level for good."""
    c = config.Guard()
    noise = np.random.default_rng(3).normal(size=4_000) * 0.5
    level = np.where(np.arange(4_000) > 2_000, 1.5, 0.0)  # 4.5 times the norm from one step to the next, for good
    judge = jax.jit(
        lambda norms: jax.lax.scan(lambda g, n: guards.judge(c, g, jnp.float32(1.0), n)[:2], guards.fresh(), norms)
    )
    guard, accepted = judge(jnp.exp(jnp.asarray(noise + level, jnp.float32)))
    assert bool(accepted.all()) and int(guard.skipped) == 0


def test_from_the_limit_on_nothing_is_accepted() -> None:
    c = config.Guard(max_in_a_row=3, max_skipped=5)
    _, accepted = judged(c, [(1.0, 1.0), *[(math.nan, 1.0)] * 3, (1.0, 1.0)])
    assert accepted == [True, False, False, False, False]
    _, accepted = judged(c, [*[(math.nan, 1.0), (math.nan, 1.0), (1.0, 1.0)] * 2, (math.nan, 1.0), (1.0, 1.0)])
    assert accepted == [False, False, True, False, False, True, False, False]


def started(c: config.Config) -> tuple[Any, Any]:
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    now = state.real(c, tx, MESH)
    return now, steps.compile_step(c, tx, MESH, now)


@pytest.mark.parametrize(("name", "microbatches"), [("adamw", 1), pytest.param("adafactor", 2, marks=pytest.mark.slow)])
def test_an_injected_nan_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, name: str, microbatches: int
) -> None:
    """The step that meets it is as if it had not been: the steps after it give the bits of a run without it."""
    whole = steps.gradients_of

    def poisoned(c: config.Config, params: Any, batch: Any, *rest: Any) -> Any:
        gradients, metrics = whole(c, params, batch, *rest)
        poison = jnp.where(batch["tokens"][0, 0] == 1, jnp.nan, 1.0)
        path = gradients["image_encoder"]["patch_embedding"]["kernel"]
        gradients["image_encoder"]["patch_embedding"]["kernel"] = path.at[0, 0, 0, 0].multiply(poison)  # one element
        return gradients, metrics

    monkeypatch.setattr(steps, "gradients_of", poisoned)
    c = tiny.replace(C, microbatches=microbatches, optimizer__name=name)
    good = [tiny.batch(c.model, LENGTHS, seed) for seed in range(3)]
    bad = tiny.batch(c.model, LENGTHS, 9)
    bad["tokens"][0, 0] = 1
    ends: list[state.TrainState] = []
    seen: list[dict[str, float]] = []
    with jax.set_mesh(MESH):
        now, step = started(c)
        for batches in ([good[0], good[1], good[2]], [good[0], bad, bad, good[1], good[2]]):
            now = started(c)[0] if ends else now
            for batch in batches:
                now, metrics = step(now, batch)
                seen.append({k: float(v) for k, v in metrics.items()})
            ends.append(now)
    assert step._cache_size() == 1
    kept = [(s.params, s.opt_state, s.ema, s.guard.mean, s.guard.deviation, s.guard.accepted) for s in ends]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    assert [int(s.step) for s in ends] == [3, 5] and int(ends[1].guard.skipped) == 2
    assert all(bool(guards.finite(part)) for part in kept)
    assert [m["guard/in_a_row"] for m in seen[3:]] == [0, 1, 2, 0, 0]
    assert seen[4]["update_norm"] == 0.0 and math.isnan(seen[4]["gradient_norm"]) and math.isfinite(seen[4]["loss"])
    # So is the learning rate: that of updates made.
    assert seen[4]["learning_rate"] == seen[6]["learning_rate"] == seen[1]["learning_rate"]


@pytest.mark.slow
def test_its_cost_is_negligible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the compiled program of the small model, in which parameters weigh more than in any real one."""

    def costs() -> tuple[dict[str, float], int]:
        tx = optimizer.make_optimizer(C.optimizer, C.steps, state.abstract_parameters(C))
        with jax.set_mesh(MESH):
            abstract = state.abstract(C, tx, MESH)
            shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny.batch(C.model, LENGTHS).items()}
            compiled = steps.compile_step(C, tx, MESH, abstract).lower(abstract, shapes).compile()  # type: ignore
        found, memory = compiled.cost_analysis(), compiled.memory_analysis()
        sizes = {"temporary": memory.temp_size_in_bytes, "kept": memory.output_size_in_bytes}
        counted = {"flops": found["flops"], "bytes": found["bytes accessed"]}
        return sizes | counted, state.parameter_count(abstract.params)

    guarded, parameters = costs()
    monkeypatch.setattr(guards, "choose", lambda accepted, after, before: after)
    bare, _ = costs()
    # 16 operations a parameter: four trees, and what XLA computes twice to fuse them. A step makes 6 a parameter for
    # every token of its batch.
    assert guarded["flops"] - bare["flops"] <= 20 * parameters
    assert guarded["bytes"] <= 1.10 * bare["bytes"]
    assert guarded["temporary"] <= 1.05 * bare["temporary"]
    assert guarded["kept"] == bare["kept"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe over black pictures, normalised so that the one that is not black overflows: real files, really decoded.
    Most runs here compile its program."""
    folder = tmp_path_factory.mktemp("poisoned")
    _, tokenizer = pairs.write(folder)
    black = np.zeros((24, 24, 3), np.uint8)
    packed = []
    for number, example in enumerate(pairs.examples() * 3):
        pixels = pairs.picture(*example) if number == 29 else black
        record = Record(f"record-{number}", pairs.png(pixels), (pairs.caption(*example),), label=example[1])
        packed.append(records.pack(record, 24, 24))
    records.write(folder / "poisoned.array_record", packed)
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer = f"array_record:{folder}/poisoned.array_record", str(tokenizer)
    c.data.update(color_jitter=0.0, rotate=0.0, mean=(0.0, 0.0, 0.0), std=(1e-36, 1e-36, 1e-36), crop_area=(1.0, 1.0))
    c.checkpoint.every, c.evaluate.captions = 1, 0
    c.loss.lambda_cap = 0.0
    return c


@pytest.mark.slow
def test_a_poisoned_record_stops_a_run_that_names_it(poisoned: Any, tmp_path: pathlib.Path) -> None:
    c = poisoned.copy_and_resolve_references()
    going_on = tmp_path / "going on"  # one epoch and a half: it comes once, or twice, and the run goes on
    assert run.run(c, str(going_on)) == 0
    lines = [line for line in read_lines(going_on / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    bad = [line["step"] for line in lines if line["loss"] is None or line["gradient_norm"] is None]
    assert 1 <= len(bad) <= 2 and lines[-1]["guard/skipped"] == len(bad)
    listed = read_lines(going_on / "skipped_steps.jsonl")
    assert [line["step"] for line in listed] == bad
    for line in listed:
        ((_, numbers),) = line["records"].items()
        assert 29 in numbers and len(numbers) == 8

    c.guard.max_skipped = 1
    stopped = tmp_path / "stopped"
    said = str(run.run(c, str(stopped)))
    assert said.startswith(f"error: step {bad[0]}: ") and "config.guard.max_skipped=1" in said and "\n" not in said
    batch = [json.loads(line) for line in (stopped / f"diverged/batch-{bad[0]}-00000.jsonl").read_text().splitlines()]
    assert (29, "record-29") in [(line["record"], line["key"]) for line in batch] and len(batch) == 8
    with Checkpoints(stopped) as mine, Checkpoints(stopped / "diverged") as kept:
        last = mine.latest() or 0
        assert last < bad[0] and f"the last checkpoint is step {last or None}" in said
        assert kept.latest() is not None
        parameters = kept.restore_parameters(state.abstract_parameters(config.from_config_dict(c)))[0]
        assert bool(guards.finite(parameters))


def test_a_state_that_is_not_finite_is_never_saved(
    poisoned: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of the moving average, which no loss and no gradient shows: found when it is to be saved."""
    whole = loop.compile_step

    def spoiling(*arguments: Any) -> Callable[..., Any]:
        step = whole(*arguments)

        def call(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            if int(state.step) == 6:
                leaves, tree = jax.tree.flatten(state.ema)
                leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].set(jnp.inf)
                state = state.replace(ema=jax.tree.unflatten(tree, leaves))
            return state, metrics

        return call

    c, workdir = poisoned.copy_and_resolve_references(), tmp_path / "run"
    c.checkpoint.every = 4
    monkeypatch.setattr(loop, "compile_step", spoiling)
    said = str(run.run(c, str(workdir)))
    assert said.startswith("error: step 8: parameters or optimiser are not finite any more"), said
    assert said.endswith("the last checkpoint is step 4") and "\n" not in said
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4"]
    assert all(np.isfinite(value).all() for value in saved.arrays(workdir, 4).values() if value.dtype.kind == "f")


def test_a_step_that_does_not_end_shows_where_everybody_is(
    poisoned: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, workdir = poisoned.copy_and_resolve_references(), tmp_path / "run"
    c.checkpoint.every, c.guard.stall, c.guard.stall_seconds = (
        12,
        5.0,
        3.0,
    )  # others may keep a step waiting for a second
    whole, reads, lock = ArrayRecords.__getitem__, [0], threading.Lock()

    def a_disk_that_does_not_answer() -> None:
        for _ in range(600):
            if list((workdir / "stalled").glob("*.txt")):
                return
            threading.Event().wait(0.1)

    def read(self: ArrayRecords, index: Any) -> Record:
        with lock:
            reads[0] += 1
            stuck = reads[0] == 70  # of 96: steps before it have a median
        if stuck:
            a_disk_that_does_not_answer()
        return whole(self, index)

    monkeypatch.setattr(ArrayRecords, "__getitem__", read)
    assert run.run(c, str(workdir)) == 0
    (file,) = (workdir / "stalled").iterdir()
    step = int(file.name.split("-")[1])
    text = file.read_text()
    assert text.startswith(f"step {step} has taken ") and "where steps take" in text.splitlines()[0]
    assert 4 <= step <= 10 and file.name == f"step-{step}-00000.txt"
    # The thread that waits for the disk, and the loop, which waits for the batch.
    assert "in a_disk_that_does_not_answer" in text and "coca_jax/train/loop.py" in text and " in train" in text
    assert [line["step"] for line in read_lines(epath.Path(workdir) / "metrics.jsonl") if "loss" in line] == list(
        range(1, 13)
    )


@pytest.mark.slow
def test_a_spike_is_left_out_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    """Black pictures with one caption, from which nothing is to be learned, so that gradients are what rounding leaves
    of them; and a white one with another caption, to which training comes in step 2."""
    _, tokenizer = pairs.write(tmp_path)
    packed = []
    for number in range(48):
        pixels = np.full((24, 24, 3), 255 * (number == 21), np.uint8)
        caption = pairs.caption("red", "cross") if number == 21 else pairs.caption("black", "dot")
        packed.append(records.pack(Record(f"record-{number}", pairs.png(pixels), (caption,)), 24, 24))
    records.write(tmp_path / "odd.array_record", packed)
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.data.train, c.data.tokenizer = f"array_record:{tmp_path}/odd.array_record", str(tokenizer)
    c.data.update(color_jitter=0.0, rotate=0.0, crop_area=(1.0, 1.0))
    c.checkpoint.update(every=1, keep=5)
    c.steps, c.evaluate.captions, c.loss.lambda_cap, c.guard.after = 5, 0, 0.0, 1
    workdir = tmp_path / "run"
    assert run.run(c, str(workdir)) == 0
    lines = [line for line in read_lines(epath.Path(workdir) / "metrics.jsonl") if "loss" in line]
    assert [line["guard/skipped"] for line in lines] == [0, 1, 1, 1, 1]
    assert [line["guard/in_a_row"] for line in lines] == [0, 1, 0, 0, 0]
    (listed,) = read_lines(epath.Path(workdir) / "skipped_steps.jsonl")
    assert listed["step"] == 2 and "is a spike, above" in listed["reason"]
    assert listed["gradient_norm"] > 1000 * listed["bound"] > 0
    ((_, numbers),) = listed["records"].items()
    assert 21 in numbers and len(numbers) == 8
    before, after = saved.arrays(workdir, 1), saved.arrays(workdir, 2)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    # Parameters, moments, moving average and statistics keep their bits; what counts has counted.
    assert changed == {"['step']", "['guard']['skipped']", "['guard']['in_a_row']"}, changed
    assert any(
        not np.array_equal(after[name], value) for name, value in saved.arrays(workdir, 3).items() if "params" in name
    )
