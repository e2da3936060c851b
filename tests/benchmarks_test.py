"""What the benchmarks in benchmarks/ say and are asked; those of the losses and of the data have tests of their own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floor, gpu_program, relatives, scaling, tpu_program, trace, train_step, turns
from coca_jax import config
from coca_jax.model import attention, flops

EVENTS = [trace.Event("a", 0.0, 2.0), trace.Event("b", 1.0, 3.0), trace.Event("c", 5.0, 6.0)]


def test_time_is_shared_by_what_runs_at_once() -> None:
    assert trace.merged(EVENTS) == [(0.0, 3.0), (5.0, 6.0)]
    assert trace.busy(EVENTS) == 4.0
    # a alone for 1 s and with b for 1 s, b alone for 1 s, c alone.
    assert trace.shares(EVENTS, {"a": "one", "b": "two"}) == {"one": 1.5, "two": 1.5, "copies": 1.0}


def test_an_operation_ends_before_it_begins_again() -> None:
    events = [trace.Event("a", 0.0, 2.0), trace.Event("a", 10.0, 11.0), trace.Event("b", 3.0, 4.0)]
    first, second, other = trace.ended(events, {"a": [12.5, 1.5]})
    assert (first.end, second.end, other.end) == (2.0, 12.5, 4.0)


def test_operations_belong_to_parts() -> None:
    program = """
  %dot.1 = f32[2]{0} dot(%x), metadata={op_name="jit(step)/jvp(CoCa.forward)/image_encoder/while/body/dot_general"}
  ROOT %fusion.2 = f32[2]{0} fusion(%y), metadata={op_name="jit(step)/transpose(jvp())/exp"}
  %add = f32[] add(%a, %b), metadata={op_name="jit(step)/mul"}
  %copy.3 = f32[2]{0} copy(%z)
"""
    found = trace.part_names(program)
    assert found == {"dot.1": "image encoder", "fusion.2": "losses", "add": "optimiser", "copy.3": "copies"}


# jaxlib 0.12's type for an event's statistics warns when it is made: as an error, that would abort the process.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_a_trace_of_a_program_is_read() -> None:
    x = jnp.ones((128, 128))
    function = jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x).compile()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(function(x))
        events = trace.read(pathlib.Path(folder))
        parts = trace.parts(pathlib.Path(folder), function.as_text())
    assert {event.name for event in events} <= set(trace.part_names(function.as_text())), events
    assert parts["optimiser"] > 0 == parts["image encoder"]  # products that are no part of the model


def test_no_trace_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no trace under"):
        trace.read(tmp_path)


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(train_step.parse([])) | changes)


def test_variants_change_the_configuration_and_the_environment() -> None:
    values, environment = train_step.configuration(
        options(layers=3), "model.text.scan_unroll=2 optimizer.peak_lr=1 model.attention=flash XLA_FLAGS=--xla_a=b"
    )
    c = config.from_config_dict(values)
    assert (c.model.text.n_uni, c.model.image.depth, c.model.text.scan_unroll) == (3, 3, 2)
    assert (c.optimizer.peak_lr, c.model.attention, environment["XLA_FLAGS"]) == (1.0, "flash", "--xla_a=b")
    for change in ("model.text.nothing=1", "model.text.scan_unroll=many", "depth"):
        with pytest.raises(SystemExit, match=re.escape(change)):
            train_step.configuration(options(), change)


def test_a_process_that_ends_is_named() -> None:
    with pytest.raises(SystemExit, match="'broken' ended with status 1"):
        turns.Worker("broken", sys.executable, "benchmarks.nothing", {})


def test_the_second_objective_is_nearly_free() -> None:
    """At the paper's sizes, in model FLOPs: CoCa is the captioner, or the contrastive model and its decoder's half."""
    for name in ("coca_base", "coca_large", "coca_giant"):
        c = scaling.recipe(f"configs/{name}.py", 1, 1, 1)
        both = flops.forward(c.model, batch_size=0)
        captioner = flops.forward(c.model, batch_size=0, contrastive=False)
        contrastive = flops.forward(c.model, batch_size=0, captioning=False)
        assert both.total <= 1.05 * captioner.total, name
        decoder = both.multimodal + both.softmax + (both.poolers - contrastive.poolers)
        assert both.total == pytest.approx(contrastive.total + decoder, rel=1e-9), name


def test_relatives_have_the_same_budget(tmp_path: pathlib.Path) -> None:
    budget = 1000 * flops.train_step_flops(relatives.recipe("coca"))
    for row, (_, share, begins) in relatives.ROWS.items():
        spent = relatives.steps_of(row, 1000) * flops.train_step_flops(relatives.recipe(row))
        assert spent == pytest.approx(share * budget, rel=0.005), row
        assert begins in ("", *relatives.ROWS)
    assert len(relatives.table(tmp_path, 1000)) == 2  # nothing is there: no rows
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "report.html").touch()
    line = {"step": relatives.steps_of("clip", 1000), "seen/image_to_text/r1": 0.25}
    (tmp_path / "clip" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "| 0.250 |" in relatives.table(tmp_path, 1000)[2]
    with pytest.raises(SystemExit, match="--steps=10 makes"):
        relatives.table(tmp_path, 10)


def test_bytes_sent_as_theory_has_them() -> None:
    assert scaling.theory(10, 4, fsdp=1, replica=1) == 0
    assert scaling.theory(10, 4, fsdp=1, replica=2) == 40  # an all-reduce between two
    assert scaling.theory(16, 4, fsdp=4, replica=1) == 3 * 48


@pytest.mark.slow
def test_a_device_computes_the_same_however_many_there_are(run_python) -> None:
    """Of a larger batch; and sends no more than theory says, but for what is small beside the parameters."""
    lines = {}
    for devices in (1, 2, 8):
        done = run_python(["-m", "benchmarks.scaling", "cpu", f"--child={devices}"], devices=devices)
        lines[devices] = json.loads(done.stdout.splitlines()[-1])
    assert lines[1]["sent_mb"] == 0
    for devices in (2, 8):
        one, more = lines[1], lines[devices]
        # The similarities of a row with the whole batch are all that grows.
        assert more["tflops"] == pytest.approx(one["tflops"], rel=0.01)
        assert more["memory_gib"] < one["memory_gib"]
        assert more["sent_mb"] < 1.5 * more["theory_mb"] + 10


@pytest.mark.slow
def test_the_parts_of_a_step_are_most_of_its_products() -> None:
    """What is left out (pooler, patches, projections, similarities) is 2% of a step of coca_ViT-B-32."""
    c = config.from_config_dict(train_step.configuration(options())[0])
    found = list(floor.parts(c))
    assert len({part.name for part in found}) == len(found)
    assert 0.97 < sum(part.times * part.flops for part in found) / flops.train_step_flops(c) < 1.0
    # Each is a program that runs, and has as many FLOPs as are said of it where it is nothing but a product.
    small = config.from_config_dict(train_step.configuration(options(model="small", layers=2, batch=2))[0])
    for part in floor.parts(small):
        assert floor.timed(part, jnp.float32)() > 0.0
        if part.name.startswith("product"):
            shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in part.shapes]
            compiled = jax.jit(part.function).lower(*shapes).compile()
            assert part.flops <= compiled.cost_analysis()["flops"] < 1.02 * part.flops, part.name


@pytest.mark.skipif(bool(importlib.util.find_spec("jax_cuda12_plugin")), reason="what is said without it")
def test_a_missing_compiler_for_gpus_is_said() -> None:
    with pytest.raises(SystemExit, match=re.escape('pip install "coca_jax[gpu]"')):
        gpu_program.devices()


def test_kernels_are_found_as_often_as_they_are_called() -> None:
    def loss(x: Any) -> Any:
        def layer(x: Any, _: Any) -> Any:
            return attention.attend(x, x, x, implementation="flash"), None

        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0] ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((2, 20, 2, 8))).jaxpr
    calls = [
        (e.params["name"], times, e.params["grid_mapping"].grid) for e, times in tpu_program.pallas_calls(jaxpr, 1)
    ]
    assert calls == [("attention", 3, (2, 1, 1)), ("attention_backward", 3, (2, 1, 1))]  # a call for each row


@pytest.mark.slow
def test_a_step_is_compiled_for_a_tpu_that_is_not_there() -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu: pip install libtpu")
    command = [sys.executable, "-m", "benchmarks.tpu_program", "--config=configs/debug.py", "--batch=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    names = ("state GiB", "program GiB", "TFLOP", "products", "kernels", "rest GB", "rest", "all")
    xla, flash = (dict(zip(names, map(float, row.split()[1:9]), strict=True)) for row in done.stdout.splitlines()[-2:])
    assert xla["kernels"] == 0 < flash["kernels"], done.stdout
    for row in (xla, flash):
        assert row["products"] > 0 and row["rest"] > 0, done.stdout
        assert row["all"] == pytest.approx(row["products"] + row["kernels"] + row["rest"], abs=2e-3)
