"""The planner's command line, estimates and search; real compilation is tested in compiled_test.py."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
from collections.abc import Callable

import jax
import numpy as np
import pytest
from etils import epath

from coca_jax import chips, config, sharding
from coca_jax.data import pipeline
from coca_jax.data.sources import open_source
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported
from coca_jax.interop.weights import Weights
from coca_jax.plan import compiled, recipe, report, search, topology
from coca_jax.plan.compiled import GIB, Measured
from coca_jax.plan.estimate import Plan
from coca_jax.train import checkpoint
from coca_jax.train import state as states
from tests import pairs, tiny

# The type of the fixture in tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

DEBUG = "--config=configs/debug.py"
# Simulates a missing libtpu.
WITHOUT_LIBTPU = """
import runpy, sys
sys.modules["libtpu"] = None
sys.argv = ["plan", "--config=configs/debug.py", "--topology=v5e:2x2"]
runpy.run_module("coca_jax.plan", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ([DEBUG], ["--topology=v5e:16x16", "is needed"]),
        ([DEBUG, "--topology=v9:4x4"], ["--topology=v9:4x4", "'v9'", "v4, v5e, v5p, v6e"]),
        ([DEBUG, "--topology=v5e:4x4x4"], ["--topology=v5e:4x4x4", "v5e:AxB"]),
        ([DEBUG, "--topology=v5e:4x4", "--config.mesh.fsdp=3"], ["config.mesh", "fsdp=3", "16"]),
        ([DEBUG, "--topology=v5e:4x4", "--config.model.image.heads=5"], ["config.model.image.heads=5", "near it"]),
        ([DEBUG, "--topology=v5e:4x4", "--efficiency=1.5"], ["--efficiency=1.5", "at most 1"]),
        ([DEBUG, "--topology=v5e:4x4", "--config.loss.lambda_cls=1"], ["config.model.head.classes=0", "not opened"]),
        (
            ["--config=configs/finetune/captioning.py", "--topology=v5e:4x4", "--config.init.checkpoint=no/where"],
            ["config.init.checkpoint='no/where'", "no such file"],
        ),
        (WITHOUT_LIBTPU, ['pip install "coca_jax[plan]"']),
    ],
    ids=[
        *("no topology", "no such chip", "no such slice", "mesh", "configuration", "efficiency", "classes"),
        *("no checkpoint", "no libtpu"),
    ],
)
def test_invalid_input_gives_a_one_line_error(
    run_python: RunPython, program: str | list[str], wanted: list[str]
) -> None:
    arguments = program if isinstance(program, str) else ["-m", "coca_jax.plan", *program]
    done = run_python(arguments, devices=1, check=False)
    output = (done.stdout + done.stderr).strip()
    assert done.returncode == 1, output
    assert output.startswith("error: ") and len(output.splitlines()) == 1, output
    assert [part for part in wanted if part not in output] == [], output


def test_an_unwritable_json_file_is_an_error_before_compiling(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "no_folder" / "plan.json"
    done = run_python(["-m", "coca_jax.plan", DEBUG, "--topology=v5e:2x2", f"--json={path}"], devices=1, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: --json={path} cannot be written: No such file or directory"


def test_a_compilation_is_stopped_at_the_timeout() -> None:
    measured = compiled.measure(tiny.CONFIG, topology.parse_topology("v5e:2x2"), timeout=0.01)
    assert "--timeout" in measured.error
    assert measured.compile_seconds < 30


def test_an_exception_in_the_compiler_process_is_reported(run_python: RunPython, tmp_path: pathlib.Path) -> None:
    """The exception itself, not the last line below its traceback, which is a note by JAX."""
    c = tiny.replace(tiny.CONFIG, loss__lambda_cls=1.0)  # without classes
    request = {"config": json.loads(config.to_json(c)), "topology": "v5e:2x2", "slices": 1}
    program = f"""
import io, sys
from coca_jax import sharding
from coca_jax.plan import compiled
compiled.compile_here = lambda c, topology: compiled.compile_on(c, sharding.make_mesh((1, 1, 1)))  # without libtpu
sys.stdin = io.StringIO({json.dumps(request)!r})
compiled._main({str(tmp_path / "answer.json")!r})
"""
    run_python(program, devices=1)
    assert re.match(r"\w+Error: .", json.loads((tmp_path / "answer.json").read_text())["error"])


def test_the_planned_batch_has_the_pipelines_shapes_and_shardings(tmp_path: pathlib.Path) -> None:
    source, tokenizer = pairs.write(tmp_path)
    c = tiny.replace(tiny.CONFIG, model__text__vocab_size=300, model__text__length=16)
    sizes = {"image_size": c.model.image.size, "length": 16, "batch_size": c.batch_size}
    loader = pipeline.train_loader(open_source(source), Tokenizer(tokenizer), c.data, seed=0, **sizes)
    batch_sharding = sharding.batch_sharding(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    batches = iter(pipeline.place(loader, batch_sharding, c.batch_size))
    real = {k: (v.shape, v.dtype, v.sharding) for k, v in next(batches).items() if k not in pipeline.HOST_KEYS}
    batches.close()
    planned = compiled.abstract_batch(c, batch_sharding)
    assert {k: (v.shape, v.dtype, v.sharding) for k, v in planned.items()} == real


@pytest.mark.parametrize("kind", ["workdir", "export"])
def test_a_run_from_a_checkpoint_is_planned_with_its_model(tmp_path: pathlib.Path, kind: str) -> None:
    """With the recipe's image size and remat policies."""
    if kind == "workdir":
        (tmp_path / "checkpoints").mkdir()
        checkpoint.keep_config(epath.Path(tmp_path), tiny.CONFIG)
        path = tmp_path
    else:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), states.abstract_parameters(tiny.CONFIG))
        exported.write(Weights(tiny.CONFIG, zeros, None), path := tmp_path / "export")
    doubled = 2 * tiny.CONFIG.model.image.size
    recipe_config = config.Config(init=config.Init(checkpoint=str(path), model="checkpoint", image_size=doubled))
    recipe_config = tiny.replace(recipe_config, model__text__remat="everything")
    wanted = tiny.replace(recipe_config, model=tiny.CONFIG.model, data=tiny.CONFIG.data)
    wanted = tiny.replace(wanted, model__image__size=doubled, model__text__remat="everything")
    assert recipe.resolve(recipe_config) == wanted
    without_model = tiny.replace(recipe_config, init=config.Init(checkpoint=str(path)))
    assert recipe.resolve(without_model) == without_model  # a run uses the recipe's model as well


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 30.75G hbm. Exceeded hbm", 40.5),
        ("Used 512.00M of 15.75G hbm. Exceeded hbm capacity by 1K", 0.5),
        ("the total memory required for HLO temporaries (240.00G) exceeds available HBM (15.75G). HLO module", 240.0),
    ],
)
def test_the_needed_memory_is_parsed_from_the_compilers_message(message: str, gib: float) -> None:
    needed = compiled.out_of_memory_bytes(message)
    assert needed is not None and needed / GIB == gib
    assert compiled.out_of_memory_bytes("INVALID_ARGUMENT: something else") is None


C = tiny.replace(tiny.CONFIG, batch_size=64, steps=1000, mesh=config.Mesh(replica=2, fsdp=8))
SLICE = topology.parse_topology("v5e:4x4")
MEASURED = Measured(
    memory={"parameters": 1.0 * GIB, "temporaries": 9.0 * GIB},
    needed=10.0 * GIB,
    executed_flops=197e12 * 0.5 * 3,  # three seconds at half of the peak
    collectives={"all-gather": 200e9 * 2, "all-reduce": 200e9 * 1},
    exposed=200e9 * 1,
    hbm=819e9 * 2.5,
    hbm_apart=819e9 * 0.5,
    product_cycles=2.0 * 197e12 / 2**17,  # two seconds
    compile_seconds=60.0,
)


def test_the_estimate_adds_exposed_traffic_to_the_slowest_overlapping_part() -> None:
    plan = Plan(C, SLICE, MEASURED, efficiency=0.5)
    assert plan.fits and plan.missing_gib == 0
    assert plan.seconds == pytest.approx(
        {
            "products": 3.0,
            "memory_apart": 0.5,
            "memory": 2.5,
            "interconnect_overlapped": 2.0,
            "interconnect_exposed": 1.0,
        }
    )
    assert plan.step_seconds == pytest.approx(4.5)
    assert plan.mfu == pytest.approx(plan.model_flops / (4.5 * 16 * 197e12))
    values = json.loads(json.dumps(plan.to_json()))
    assert values["chip_hours"] == pytest.approx(4.5 * 1000 / 3600 * 16)
    assert values["hbm_gib_per_chip"] == 10.0 and values["hbm_limit_gib"] == 15.75
    assert values["executed_flops_per_step"] == pytest.approx(16 * MEASURED.executed_flops)
    assert sum(values["collective_bytes_per_chip"].values()) == 600e9
    slower = dataclasses.replace(MEASURED, product_cycles=8 * 197e12 / 2**17)  # longer than the FLOPs take
    assert Plan(C, SLICE, slower, efficiency=0.5).step_seconds == pytest.approx(9.5)
    memory_bound = Plan(C, SLICE, dataclasses.replace(MEASURED, hbm=819e9 * 30))
    assert memory_bound.step_seconds == pytest.approx(31.0)
    page = report.page(plan, "tiny.py")
    assert "ESTIMATE, not a measurement" in page and "FITS: 10.00 of the 15.75 GiB" in page


def test_a_plan_that_is_too_large_says_by_how_much_and_what_to_change() -> None:
    error = "RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm."
    plan = Plan(C, SLICE, Measured(needed=20.0 * GIB, error=error))
    page = report.page(plan, "tiny.py")
    assert "DOES NOT FIT: 20.00 GiB is 4.25 GiB more than the 15.75 GiB" in page
    for flag in ("--config.model.image.remat=everything", "--config.microbatches=2", "--config.mesh.replica=1"):
        assert flag in page
    values = plan.to_json()
    assert values["fits"] is False and values["hbm_missing_gib"] == pytest.approx(4.25)
    assert values["step_seconds"] is values["mfu"] is values["chip_hours"] is None
    # A program that compiles may still be too large for a chip together with its arguments.
    assert not Plan(C, SLICE, dataclasses.replace(MEASURED, needed=16.0 * GIB)).fits
    unknown = Plan(C, SLICE, Measured(error="INTERNAL: no idea"))
    assert "NOT COMPILED: INTERNAL: no idea" in report.page(unknown, "tiny.py")
    assert "INTERNAL: no idea" in report.table([unknown]) and unknown.to_json()["hbm_gib_per_chip"] is None


def test_advice_asks_for_as_many_microbatches_as_needed() -> None:
    def advice(needed: float) -> str:
        return " ".join(Plan(C, SLICE, Measured(needed=needed * GIB, error="too large")).advice())

    assert "--config.microbatches=2 " in advice(16.0) and "--config.microbatches=4 " in advice(50.0)
    assert "--config.microbatches=4 " in advice(1000.0)  # 64 rows over 16 shards allow no more


@pytest.mark.parametrize(
    ("name", "slices", "mesh"),
    [
        ("v5e:4x4", 1, config.Mesh(replica=2, fsdp=8)),
        ("v5e:4x4", 2, config.Mesh(replica=-1, fsdp=4, dcn_replica=-1)),
        ("v5e:4x4", 2, config.Mesh(replica=4, fsdp=-1, dcn_fsdp=2)),
        ("v4:2x2x3", 1, config.Mesh(replica=3, fsdp=4)),
    ],
    ids=["a slice", "slices of copies", "a copy over slices", "three copies"],
)
def test_advised_flags_give_valid_configurations(name: str, slices: int, mesh: config.Mesh) -> None:
    c, chips_ = tiny.replace(C, batch_size=192, mesh=mesh), topology.parse_topology(name, slices)
    config.check(c, chips_.chips, slice_count=slices, platform="tpu")
    plan = Plan(c, chips_, Measured(needed=20.0 * GIB, error="too large"))
    *advice, _ = plan.advice()
    assert any("mesh.fsdp" in flags for flags in advice)
    for flags in advice:
        changed = c
        for flag in flags.split():
            key, value = flag.removeprefix("--config.").split("=")
            config.check_key(key)
            changed = tiny.replace(changed, **{key.replace(".", "__"): int(value) if value.isdigit() else value})
        config.check(changed, chips_.chips, slice_count=slices, platform="tpu")
        assert changed != c


def test_the_printed_mesh_over_slices_can_be_configured() -> None:
    c = tiny.replace(C, mesh=config.Mesh(replica=-1, fsdp=4, dcn_replica=-1))
    plan = Plan(c, two := topology.parse_topology("v5e:4x4", 2), MEASURED)
    printed = report.choice(plan)
    assert "mesh replica=8 fsdp=4 tensor=1 (in each slice replica=4 fsdp=4)" in printed
    configured = tiny.replace(c, mesh__replica=4, mesh__fsdp=4)
    assert Plan(configured, two, MEASURED).mesh == plan.mesh
    assert "in each slice" not in report.choice(Plan(C, SLICE, MEASURED))


def size(c: config.Config) -> float:
    """GiB of an invented program: activations that depend on policy and microbatches, plus the sharded state."""
    activations = {"none": 40, "attention": 30, "dots": 20, "qkv": 14, "outputs": 8, "everything": 4}
    return activations[c.model.image.remat] / c.microbatches + 32 / c.mesh.fsdp / c.mesh.tensor


def fake_plan(c: config.Config) -> Plan:
    recomputed = list(config.REMAT).index(c.model.image.remat) + (5 if c.microbatches > 1 else 0) + c.mesh.tensor
    needed = size(c) * GIB
    error = f"Used {size(c):.2f}G" if size(c) > 15.75 else ""
    return Plan(c, SLICE, Measured(needed=needed, executed_flops=1e12 * recomputed, error=error))


def test_the_search_finds_the_fastest_plan_that_fits() -> None:
    wide = tiny.replace(C, mesh=config.Mesh(replica=-1, fsdp=8))
    plans = search.search(wide, SLICE, fake_plan)
    best = min((p for p in plans if p.fits), key=lambda p: p.step_seconds or 0)
    # 14 + 4 GiB is too much, 8 + 4 fits; microbatches would cost more than the recomputation they avoid.
    assert (best.mesh, best.c.microbatches, best.c.model.image.remat) == ((2, 8, 1), 1, "outputs")
    assert len({(p.mesh, p.c.microbatches, p.c.model.image.remat) for p in plans}) == len(plans)
    assert {p.mesh for p in plans} >= {(2, 8, 1), (1, 16, 1), (1, 8, 2)}
    table = report.table(plans)
    assert table.index("remat outputs") < table.index("does not fit")


def test_the_search_is_no_worse_than_the_recipes_microbatches() -> None:
    """12 microbatches fit, and no power of two does."""
    recipe_config = tiny.replace(C, batch_size=192, microbatches=12, mesh=config.Mesh(replica=2, fsdp=8))
    recipe_config = tiny.replace(recipe_config, model__image__remat="dots", model__text__remat="dots")

    def fake(c: config.Config) -> Plan:
        fits = c.microbatches == 12
        return Plan(c, SLICE, Measured(needed=(10 if fits else 20) * GIB, executed_flops=1e12))

    plans = search.search(recipe_config, SLICE, fake)
    assert plans[0].c == recipe_config and plans[0].fits
    # Lighter policies are tried with them once the best mesh is known.
    assert {p.c.model.image.remat for p in plans if p.c.microbatches == 12 and p.fits} >= {"none", "attention", "dots"}
    left = iter(range(1))
    assert [p.c for p in search.search(recipe_config, SLICE, lambda c: fake(c) if next(left, 1) == 0 else None)] == [
        recipe_config
    ]


@pytest.mark.parametrize(
    ("measured", "status", "output"),
    [
        ([MEASURED], 0, "FITS"),
        ([Measured(needed=20.0 * GIB, error="Used 20.00G of 15.75G hbm.")], 3, "DOES NOT FIT"),
        ([Measured(error="compilation exceeded --timeout=1500 s")], 4, "NOT COMPILED"),
        ([Measured(error="INTERNAL: no idea"), MEASURED], 0, ""),
        ([Measured(error="INTERNAL: no idea"), Measured(needed=20.0 * GIB, error="too large")], 4, ""),
        ([Measured(needed=20.0 * GIB), Measured(needed=20.0 * GIB, error="too large")], 3, ""),
    ],
    ids=["fits", "too large", "too slow", "one fits", "one may fit", "none fits"],
)
def test_the_exit_status_separates_too_large_from_unknown(measured: list[Measured], status: int, output: str) -> None:
    plans = [Plan(C, SLICE, one) for one in measured]
    assert report.status(plans) == status
    if output:
        assert output in report.page(plans[0], "tiny.py")
    table = report.table(plans)
    assert table.count("not compiled: ") == sum(not p.fits and not p.missing_gib for p in plans)
    assert table.count("does not fit: ") == sum(p.missing_gib > 0 for p in plans)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v5e:2x2", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]),
        (
            "v5e:2x4",
            [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2), (1, 2, 4), (2, 1, 4)],
        ),
    ],
)
def test_small_slices_have_meshes_to_try(name: str, wanted: list[tuple[int, int, int]]) -> None:
    assert list(search.meshes(topology.parse_topology(name))) == wanted
    assert next(search.meshes(topology.parse_topology("v4:8x16x16"))) == (256, 8, 1)  # promising ones first


def test_figures_keep_significant_digits() -> None:
    assert [report.figure(x) for x in (95806.6, 999.0, 0.337, 0.0, 0.00042)] == [
        *("95,807", "999.000", "0.337", "0.000", "4.2e-04"),
    ]


def test_the_search_uses_microbatches_when_nothing_else_fits_and_respects_its_budget() -> None:
    def larger(c: config.Config) -> Plan:
        plan = fake_plan(c)
        needed = plan.measured.needed * 4
        error = "too large" if needed > 15.75 * GIB else ""
        return dataclasses.replace(plan, measured=dataclasses.replace(plan.measured, needed=needed, error=error))

    plans = search.search(tiny.replace(C, mesh=config.Mesh(replica=1, fsdp=-1)), SLICE, larger)
    assert any(p.fits and p.c.microbatches > 1 for p in plans)
    left = iter(range(3))
    few = search.search(C, SLICE, lambda c: larger(c) if next(left, None) is not None else None)
    assert len(few) == 3


def test_chips_are_found_by_their_jax_device_kind() -> None:
    names = [chip.name for chip in chips.CHIPS]
    assert len(set(names)) == len(names)
    # JAX's names: TPUs by libtpu 0.0.52, GPUs by NVIDIA's driver.
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    kinds |= {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80"}
    for kind, name in kinds.items():
        chip = chips.from_device_kind(kind)
        assert chip is not None and chip.name == name
    for kind in ("cpu", "TPU v7", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB"):
        assert chips.from_device_kind(kind) is None
    assert all(chip.usable_gib <= chip.hbm_gib * 1.01 and chip.source.startswith("https://") for chip in chips.CHIPS)


def test_topologies_are_parsed_with_their_options() -> None:
    pod = topology.parse_topology("v4:8x16x16")
    assert pod.chips == 2048 and pod.options()["chip_config_name"] == "megacore"
    two = topology.parse_topology("v5e:16x16", slices=2)
    assert two.chips == 512 and two.options()["num_slices"] == 2
    assert str(two) == "2 slices of v5e:16x16"


def test_an_unreadable_program_names_the_libtpu_version_to_install() -> None:
    """libtpu 0.0.52 compiles coca_base for v5p to a program that jaxlib 0.10.2 cannot read."""
    pytest.importorskip("libtpu", reason="names its version")
    output = compiled.unreadable(jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n\nmore"))
    assert re.search(r"jaxlib [\d.]+ and libtpu [\d.]+ .*\(INTERNAL: RET_CHECK failure\)", output)
    assert re.search(r"pip install 'libtpu==[\d.]+\*'", output)
