"""One whole run through every room, and what can be done with its workdir."""

from __future__ import annotations

import json
import pathlib
import resource
import runpy
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import coca_jax
from coca_jax import config, evaluation, run
from coca_jax.config import ConfigError
from coca_jax.data import sources
from coca_jax.evaluate import suite
from coca_jax.interop.weights import ConversionError
from coca_jax.model import flops
from coca_jax.model.coca import CoCa
from coca_jax.train import checkpoint
from coca_jax.train.checkpoint import CheckpointError
from coca_jax.train.metrics import read_lines
from tests import pairs, saved


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source, tokenizer = pairs.write(tmp_path_factory.mktemp("pairs"))
    c = runpy.run_path("tests/tiny_recipe.py")["get_config"]()
    c.steps = 6
    c.checkpoint.every = 2
    c.data.train, c.data.tokenizer = source, str(tokenizer)
    c.evaluate.splits, c.evaluate.zero_shot = (source,), source
    c.evaluate.update(every=3, best="shapes/image_to_text/r1")
    return c


@pytest.fixture(scope="module")
def workdir(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    assert run.run(recipe, str(folder), profile="5:5") == 0
    return folder


def test_a_run_says_how_fast_it_was_and_leaves_the_trace_asked_for(recipe: Any, workdir: pathlib.Path) -> None:
    last = [line for line in read_lines(workdir / "metrics.jsonl") if "loss" in line][-1]
    assert last["images_per_second_per_device"] == last["examples_per_second"] / jax.device_count() > 0
    per_step = flops.train_step_flops(config.from_config_dict(recipe))
    steps_per_second = last["examples_per_second"] / recipe.batch_size
    assert last["model_tflops_per_device"] * 1e12 * jax.device_count() == pytest.approx(per_step * steps_per_second)
    assert "mfu" not in last  # what a CPU could do is not known
    assert len(list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    assert "--profile=5:7 goes beyond the run" in str(run.run(recipe, str(workdir), profile="5:7"))


def test_a_run_leaves_metrics_checkpoints_and_a_report(workdir: pathlib.Path) -> None:
    lines = read_lines(workdir / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6] and all(np.isfinite(list(losses.values())))
    evaluated = [line for line in lines if "shapes/image_to_text/r1" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    wanted = ("text_to_image/median_rank", "chance/r1", "pixel/image_to_text/r1", "caption_loss", "perplexity")
    assert all(f"shapes/{name}" in evaluated[-1] for name in wanted)
    assert "zero_shot/top1" in evaluated[-1]
    assert list((workdir / "tensorboard").glob("events*"))
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert steps[-2:] == [4, 6] and len(steps) <= 3  # two newest, and the best
    page = (workdir / "report.html").read_text()
    assert "a red dot" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_started_again_it_says_that_it_is_complete(
    recipe: Any, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run.run(recipe, str(workdir)) == 0
    assert "complete" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_was_made_longer_has_the_bits_of_one_that_was_so_long(recipe: Any, tmp_path: pathlib.Path) -> None:
    longer = recipe.copy_and_resolve_references()
    longer.evaluate.update(splits=(), zero_shot="", every=0, best="", captions=0)
    longer.steps = 5
    longer.optimizer.update(schedule="constant", warmup=0.4)
    shorter = longer.copy_and_resolve_references()
    shorter.steps = 3
    assert run.run(shorter, str(tmp_path / "longer")) == 0
    assert "keep the warm-up at 1 steps, --config.optimizer.warmup=0.2" in str(
        run.run(longer, str(tmp_path / "longer"))
    )
    longer.optimizer.warmup = 0.2
    assert [run.run(longer, str(tmp_path / folder)) for folder in ("at once", "longer")] == [0, 0]
    leaves = [saved.arrays(tmp_path / folder, 5) for folder in ("at once", "longer")]
    jax.tree.map(np.testing.assert_array_equal, *leaves)
    steps = [line["step"] for line in read_lines(tmp_path / "longer/metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 5


def test_a_start_that_cannot_write_leaves_what_is_there(
    recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The vocabulary is written where it is missing, and nothing else has it."""
    used = shutil.copytree(workdir, tmp_path / "used")
    vocabulary = (used / "tokenizer.model").stat().st_size
    (used / "tokenizer.model").unlink()
    before = {path.name: path.read_bytes() for path in used.iterdir() if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = len(before["config.json"]) + 1000
    assert most < vocabulary
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        said = str(run.run(recipe, str(used)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"--workdir={used} cannot be made or written: " in said and "File too large" in said
    assert {path.name: path.read_bytes() for path in used.iterdir() if path.is_file()} == before


def test_another_configuration_in_a_used_workdir_is_refused(recipe: Any, workdir: pathlib.Path) -> None:
    other = recipe.copy_and_resolve_references()
    other.optimizer.peak_lr = 1.0
    said = str(run.run(other, str(workdir)))
    assert "config.optimizer.peak_lr=1.0" in said and "0.003" in said and "--workdir" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"data.train": "folder:/nowhere"}, ("config.data.train='folder:/nowhere'", "no folder /nowhere")),
        ({"data.train": "emjoi:train"}, ("config.data.train='emjoi:train'", "array_record")),
        (
            {"evaluate.splits": ("array_record:/nowhere/*",)},
            ("config.evaluate.splits='array_record:/nowhere/*'", "no file matches"),
        ),
        ({"evaluate.zero_shot": "folder:/nowhere"}, ("config.evaluate.zero_shot='folder:/nowhere'",)),
        (
            {"evaluate.reference_style": "ink"},
            ("config.evaluate.reference_style='ink'", "are none; --config.evaluate.reference_style= takes all"),
        ),
        ({"optimizer.freeze": ("poolre/.*",)}, ("config.optimizer.freeze: 'poolre/.*' matches no parameter",)),
        ({"model.text.vocab_size": 100}, ("config.model.text.vocab_size=100", "283 pieces")),
        ({"data.tokenizer": ""}, ("config.data.tokenizer is empty", "data.prepare convert with --vocab_size=N")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_only_the_data_can_tell_is_said_before_there_is_a_workdir(
    recipe: Any, tmp_path: pathlib.Path, changes: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    c = recipe.copy_and_resolve_references()
    c.update_from_flattened_dict(changes)
    said = str(run.run(c, str(tmp_path / "run")))
    assert said.startswith("error: ") and "\n" not in said
    assert [part for part in wanted if part not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_encodes_and_captions(workdir: pathlib.Path) -> None:
    coca = coca_jax.load(workdir)
    pictures = [pairs.picture(*e) for e in pairs.examples()[:3]]
    images, texts = coca.encode_image(pictures), coca.encode_text(["a red dot", "a blue cross"])
    assert images.shape == (3, 8) and texts.shape == (2, 8) and coca.step == 6
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1.0, rtol=1e-5)
    captions = coca.caption(pictures)
    assert len(captions) == 3 and all(isinstance(c, str) for c in captions)
    # However many come together, each gets what it gets alone.
    np.testing.assert_allclose(coca.encode_image(pictures[1]), images[1:2], atol=1e-5)
    np.testing.assert_allclose(coca.encode_image(pictures, batch_size=2), images, atol=1e-5)
    assert coca.encode_text("a red dot").shape == (1, 8)
    # The moving average is what was evaluated, so it is what is loaded.
    assert not jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), coca.params, coca_jax.load(workdir, step=4).params)
    )


def test_a_workdir_may_be_named_from_where_one_stands(
    recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workdir, "runs/mine")
    assert coca_jax.load("runs/mine").step == 6
    shutil.rmtree("runs/mine/checkpoints/6")
    assert run.run(recipe, "runs/mine") == 0  # it goes on from step 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert coca_jax.load("~/runs/mine").step == 6
    assert str(checkpoint.absolute("gs://bucket/run")) == "gs://bucket/run"


def test_a_model_loads_at_another_resolution(workdir: pathlib.Path) -> None:
    coca = coca_jax.load(workdir, image_size=32)
    assert coca.params["image_encoder"]["position_embedding"].shape == (16, 16)
    assert np.isfinite(coca.encode_image(pairs.picture("red", "dot"))).all()
    with pytest.raises(ConfigError, match="not divisible"):
        coca_jax.load(workdir, image_size=30)


def test_a_workdir_is_converted_and_computes_the_same(
    workdir: pathlib.Path, tmp_path: pathlib.Path, run_python: Callable[..., Any]
) -> None:
    done = run_python(["-m", "coca_jax.convert", f"--input={workdir}", f"--output={tmp_path}/out"], devices=1)
    assert "step 6; tokenizer: 283 pieces (tokenizer.model)" in done.stdout and "model.safetensors" in done.stdout
    before, after = coca_jax.load(workdir), coca_jax.load(tmp_path / "out")
    assert (before.step, before.preprocessor) == (after.step, after.preprocessor)
    picture, caption = pairs.picture("red", "dot"), "a red dot"
    np.testing.assert_array_equal(before.encode_image(picture), after.encode_image(picture))
    np.testing.assert_array_equal(before.encode_text(caption), after.encode_text(caption))
    assert before.caption(picture) == after.caption(picture)
    shutil.rmtree(tmp_path / "out")
    # The older checkpoint, and one that is not there.
    arguments = ["-m", "coca_jax.convert", f"--input={workdir}", f"--output={tmp_path}/out", "--step=77"]
    failed = run_python(arguments, devices=1, check=False)
    assert failed.returncode == 1 and "error: " in failed.stderr and "no checkpoint of step 77" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_what_cannot_be_loaded_says_why(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match=r"open_clip_config\.json"):
        coca_jax.load(tmp_path)
    with pytest.raises(ConversionError, match="no such file or directory"):
        coca_jax.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint of step 77"):
        coca_jax.load(workdir, step=77)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        coca_jax.load(tmp_path)
    for text, said in (
        ("{", "is damaged"),
        ("[1]", r"is of another version, or was changed since: config=\[1\]"),
        (
            '{"stepz": 3}',
            "is of another version, or was changed since: config.stepz is not a key; near it: config.steps",
        ),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json {said}"):
            coca_jax.load(tmp_path)


def test_evaluation_alone_gives_the_same_figures(recipe: Any, workdir: pathlib.Path) -> None:
    from coca_jax.config import from_config_dict

    last = [line for line in read_lines(workdir / "metrics.jsonl") if "zero_shot/top1" in line][-1]
    (workdir / "report.html").unlink()
    assert run.run(recipe, str(workdir), evaluate_only=True) == 0
    assert (workdir / "report.html").exists()
    assert last["step"] == from_config_dict(recipe).steps


def test_evaluation_alone_makes_no_workdir_and_changes_none(
    recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A run may be under way in it, whose configuration, mesh and length are its own."""
    other = recipe.copy_and_resolve_references()
    other.evaluate.update(splits=(), zero_shot="", best="", captions=0)
    other.log_every = 7
    used = shutil.copytree(workdir, tmp_path / "used")
    kept = [used / name for name in ("config.json", "tokenizer.model")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    assert run.run(other, str(used), evaluate_only=True) == 0
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept] == before
    assert "is not a workdir: it has no config.json" in str(run.run(other, str(tmp_path / "none"), evaluate_only=True))
    assert not (tmp_path / "none").exists()


def test_a_captioner_has_no_contrastive_half(recipe: Any, tmp_path: pathlib.Path) -> None:
    c = recipe.copy_and_resolve_references()
    c.steps, c.loss.lambda_con, c.evaluate.every, c.evaluate.best = 1, 0.0, 0, ""
    assert run.run(c, str(tmp_path / "run")) == 0
    coca = coca_jax.load(tmp_path / "run")
    assert len(coca.caption(pairs.picture("red", "dot"))) == 1
    with pytest.raises(ValueError, match="lambda_con=0"):
        coca.encode_text("a red dot")


@pytest.mark.slow
def test_captions_of_every_kind_with_their_scores(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coca = coca_jax.load(workdir)
    passes, pool = [], CoCa._pool

    def counted(*args: Any) -> Any:  # called when a program is traced
        passes.append("image")
        return pool(*args)

    monkeypatch.setattr(CoCa, "_pool", counted)
    pictures = [pairs.picture("red", "dot"), pairs.picture("blue", "cross"), pairs.picture("green", "bar on top")]
    best = coca.captions(pictures, method="beam", beams=4, returns=3, length=8)
    assert [len(found) for found in best] == [3, 3, 3]
    assert passes == ["image"], "captions and their similarities come from one pass over the picture"
    for found in best:
        assert all(c.similarity is not None and -1 <= c.similarity <= 1 and c.log_prob < 0 for c in found)
    again = coca.captions(pictures, method="beam", beams=4, returns=3, length=8, rerank=True)
    for found, ranked in zip(best, again, strict=True):
        similarities = [c.similarity or 0.0 for c in ranked]
        assert similarities == sorted(similarities, reverse=True)
        assert {c.text for c in ranked} == {c.text for c in found}
    # The similarities are those of the features that are computed alone.
    pixels = coca.preprocessor.pixels(pictures)
    made, similarity = coca._apply.captions(coca.params, pixels)
    features = coca._apply.encode_text(coca.params, made.tokens[:, 0])
    np.testing.assert_allclose(similarity[:, 0], (coca.encode_image(pictures) * features).sum(axis=1), atol=1e-5)
    sampled = [
        coca.captions(p, method="sample", top_p=0.9, returns=2, seed=3, length=8)[0] for p in (pictures, pictures[:1])
    ]
    assert sampled[0][0].text == sampled[1][0].text
    assert all(text.startswith("a red") for text in coca.caption(pictures, "a red", length=8))
    with pytest.raises(ValueError, match="beamz is no option"):
        coca.caption(pictures, beamz=3)
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        coca.captions(pictures, ["a", "b"])
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        coca.encode_image(pictures, batch_size=0)


def test_a_checkpoint_is_evaluated_by_itself(
    workdir: pathlib.Path, tmp_path: pathlib.Path, run_python: Callable[..., Any]
) -> None:
    out = tmp_path / "results"
    command = ["-m", "coca_jax.evaluate", f"--checkpoint={workdir}", f"--output={out}"]
    done = run_python(command, devices=1)
    assert "shapes         image_to_text model" in done.stdout and "zero-shot      top-1" in done.stdout
    found = json.loads((out / "results.json").read_text())
    assert all(isinstance(note, str) for note in found.pop("notes"))
    last = [line for line in read_lines(workdir / "metrics.jsonl") if "zero_shot/top1" in line][-1]
    assert found.keys() == {key for key in last if key in found and "/pixel/" not in key}
    for key, value in found.items():  # another program, compiled for another number of devices
        assert value == pytest.approx(last[key], abs=0.02), key
    assert {"shapes/image_to_text/r1", "zero_shot/top1", "shapes/caption_loss"} <= found.keys()
    assert "<html" in (out / "shapes" / "report.html").read_text()

    # Started again nothing is computed: what stands in the file is what is told.
    kept = json.loads((out / "shapes" / "results.json").read_text())
    kept["metrics"]["shapes/image_to_text/r1"] = 0.123
    (out / "shapes" / "results.json").write_text(json.dumps(kept))
    assert evaluation.run(None, str(workdir), str(out)) == 0
    assert json.loads((out / "results.json").read_text())["shapes/image_to_text/r1"] == 0.123
    # Half a file is what a kill may leave.
    (out / "shapes" / "results.json").write_text(json.dumps(kept)[:100])
    assert evaluation.run(None, str(workdir), str(out)) == 0
    again = json.loads((out / "results.json").read_text())
    assert again["shapes/image_to_text/r1"] == found["shapes/image_to_text/r1"]


def test_a_workdir_is_evaluated_on_other_devices_than_it_was_trained_on(
    workdir: pathlib.Path, tmp_path: pathlib.Path, run_python: Callable[..., Any]
) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    values = json.loads((workdir / "config.json").read_text())
    values["mesh"]["fsdp"], values["microbatches"], values["evaluate"]["captions"] = 8, 8, 0
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    command = ["-m", "coca_jax.evaluate", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    run_python(command, devices=3)  # neither as many as the mesh names, nor such as divide the batch of 8
    assert ", batch 8<" in (tmp_path / "out" / "shapes" / "report.html").read_text()


def test_every_caption_is_scored(recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    c = recipe.copy_and_resolve_references()
    c.evaluate.update(score_captions=True, likelihood=6)
    assert evaluation.run(c, str(workdir), str(tmp_path), step=4) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    classes = json.loads((tmp_path / "shapes" / "results.json").read_text())["classes"]
    assert sum(one["pictures"] for one in classes.values()) == found["zero_shot/images"]
    # Both ways to classify stand in the table, and in the page with pictures.
    table, page = (tmp_path / "results.txt").read_text(), (tmp_path / "shapes" / "report.html").read_text()
    assert "caption likelihood, log P(prompt | image): top-1" in table and "cider" in table and "nats" in table
    for words in ("Retrieval by caption likelihood", "CoCa, contrastive", "caption likelihood, less", "CIDEr"):
        assert words in page, words
    assert "Zero-shot accuracy within each of the" in page and "the first five classes" in page
    assert not (tmp_path / "shapes" / "pieces").exists()
    assert 0 <= found["shapes/captions/bleu_4"] <= 1
    assert {"shapes/captions/cider", "shapes/captions/rouge_l"} <= found.keys()
    # The likelihoods are those of Python's own call.
    coca = coca_jax.load(workdir, step=4)
    source = sources.open_source(c.evaluate.splits[0])
    assert found["shapes/likelihood/images"] == found["zero_shot/likelihood/images"] == 6
    records = [source[i] for i in suite.spread(len(source), 6)]
    matrix = coca.log_likelihood([r.image for r in records], [r.captions[0] for r in records], batch_size=4)
    assert found["shapes/likelihood/log_prob"] == pytest.approx(np.diag(matrix).mean(), rel=1e-3)
    with pytest.raises(ValueError, match="no text was given"):
        coca.log_likelihood(records[0].image, [])


def test_what_cannot_be_evaluated_is_said(recipe: Any, workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    c = recipe.copy_and_resolve_references()
    c.evaluate.update(splits=(), zero_shot="")
    assert "name what to evaluate on" in str(evaluation.run(c, str(workdir), str(tmp_path)))
    assert "no such file or directory" in str(evaluation.run(c, str(tmp_path / "none"), str(tmp_path)))
    # The second of two, before the first is evaluated.
    c.evaluate.splits = (recipe.evaluate.splits[0], "folder:/nowhere")
    said = str(evaluation.run(c, str(workdir), str(tmp_path / "out")))
    assert "config.evaluate.splits='folder:/nowhere': " in said and not (tmp_path / "out").exists()
