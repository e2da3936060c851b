"""The directory that a model travels in: whole, checked, readable without this package, and by every later version.

`format_1/` was written by the first release, with what its model computes in `expected.npz`; it is never written again.
    python -m tests.interop.exported_test FOLDER
makes such a folder for a new version of the format.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import runpy
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import coca_jax
from coca_jax import config
from coca_jax.data.images import Preprocessor, normalize
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import exported, folders
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model.coca import CoCa
from coca_jax.train import state
from tests import pairs, tiny

DATA = config.Data(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), eval_crop=0.9, interpolation="pillow-bicubic")
MODEL = tiny.replace(tiny.MODEL, text__vocab_size=300)
# The other choice wherever there is one.
OTHER = tiny.replace(
    MODEL,
    norm_eps=1e-5,
    gelu="exact",
    image__class_token=True,
    image__patch_bias=False,
    image__pre_norm=True,
    image__position="sincos",
    pooler__kind="single",
    text__position="sincos",
    text__tie_embeddings=True,
    text__cross_mlp=True,
    text__cross_kv_norm=True,
    text__cls_mask="legacy",
)
MODELS = {"paper's": MODEL, "other": OTHER, "cascade": tiny.replace(MODEL, pooler__kind="cascade")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)


def weights(model: config.Model, tokenizer: Tokenizer | None, **loss: Any) -> Weights:
    c = config.Config(model=model, data=DATA, loss=config.Loss(**loss))
    shapes = state.abstract_parameters(c)
    drawn = tiny.parameters(model)
    flat = traverse_util.flatten_dict(drawn, sep="/")
    kept = {path: flat[path] for path in traverse_util.flatten_dict(shapes, sep="/")}
    return Weights(c, traverse_util.unflatten_dict(kept, sep="/"), tokenizer, step=7)


def bits(params: Any) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: (np.shape(x), str(x.dtype), np.asarray(x).tobytes()) for path, x in flat.items()}


def computed(model: config.Model, params: Any, pixels: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    images = normalize(pixels, DATA.mean, DATA.std)
    output: Any = jax.jit(CoCa(model).apply)({"params": params}, images, ids)
    return {key: np.asarray(getattr(output, key)) for key in ("image_features", "text_features", "logits")}


def inputs(model: config.Model) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(3).integers(0, 256, (3, model.image.size, model.image.size, 3), np.uint8)
    return pixels, tiny.tokens(model, [9, 4, 2], seed=3)


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (MODEL, {}),
        (OTHER, {}),
        (MODEL, {"lambda_cap": 0.0}),
        (MODEL, {"lambda_con": 0.0}),
        (tiny.replace(MODEL, logit_bias=-10.0), {"contrastive": "sigmoid"}),
        (tiny.replace(MODEL, param_dtype="bfloat16", dtype="bfloat16"), {}),
    ],
    ids=["paper's", "other", "contrastive alone", "captions alone", "sigmoid", "bfloat16"],
)
def test_what_is_read_is_what_was_written(
    tmp_path: pathlib.Path, tokenizer: Tokenizer, model: config.Model, loss: dict[str, Any]
) -> None:
    w = weights(model, tokenizer, **loss)
    if model.param_dtype == "bfloat16":
        w = dataclasses.replace(w, params=jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), w.params))
    exported.write(w, tmp_path / "out")
    back = exported.read(tmp_path / "out")
    assert bits(back.params) == bits(w.params)
    assert (back.config, back.step) == (w.config, 7)
    assert back.tokenizer is not None and back.tokenizer.to_bytes() == tokenizer.to_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "coca_jax.json",
        "model.safetensors",
        "out",
        "tokenizer.model",
    ]


def test_what_only_changes_how_it_is_computed_is_not_written(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    fast = tiny.replace(MODEL, attention="cudnn", image__remat="dots", text__scan_unroll=2, text__remat="outputs")
    w = weights(MODEL, tokenizer)
    exported.write(dataclasses.replace(w, config=dataclasses.replace(w.config, model=fast)), tmp_path / "out")
    assert exported.read(tmp_path / "out").config.model == MODEL


def test_a_model_without_a_tokenizer(tmp_path: pathlib.Path) -> None:
    exported.write(weights(MODEL, None), tmp_path / "out")
    coca = coca_jax.load(tmp_path / "out")
    assert coca.encode_image(pairs.picture("red", "dot")).shape == (1, 8)
    with pytest.raises(ValueError, match="without its tokenizer"):
        coca.encode_text("a red dot")
    with pytest.raises(ValueError, match=r"without its tokenizer.* python -m coca_jax\.convert --tokenizer=PATH"):
        coca.caption(pairs.picture("red", "dot"))


def test_a_tokenizer_is_given_to_a_model_without_one(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    exported.write(weights(MODEL, None), tmp_path / "out")
    tokenizer.save(tmp_path / "given.model")
    coca = coca_jax.load(tmp_path / "out", tokenizer=tmp_path / "given.model")
    exported.write(weights(MODEL, tokenizer), tmp_path / "whole")
    whole = coca_jax.load(tmp_path / "whole")
    np.testing.assert_array_equal(coca.encode_text("a red dot"), whole.encode_text("a red dot"))
    assert coca_jax.load(tmp_path / "out", tokenizer="none").tokenizer is None
    (tmp_path / "other").write_text("no vocabulary")
    with pytest.raises(ConversionError, match=r"tokenizer=.*other cannot be used: .*SentencePiece"):
        coca_jax.load(tmp_path / "out", tokenizer=tmp_path / "other")
    with pytest.raises(ConversionError, match="which holds its own: leave it out"):
        coca_jax.load(tmp_path / "whole", tokenizer=tmp_path / "given.model")


def test_load_opens_it(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    w = weights(MODEL, tokenizer)
    exported.write(w, tmp_path / "out")
    coca = coca_jax.load(tmp_path / "out")
    assert coca.step == 7
    assert coca.preprocessor == Preprocessor.from_config(MODEL.image.size, DATA)
    picture = pairs.picture("blue", "cross")
    wanted = CoCa(MODEL).apply({"params": w.params}, coca.preprocessor([picture]), method="encode_image")
    np.testing.assert_allclose(coca.encode_image(picture), wanted.image_features, rtol=0, atol=1e-6)
    assert coca_jax.load(tmp_path / "out", image_size=32).encode_image(picture).shape == (1, 8)
    for argument in ({"step": 3}, {"name": "coca_ViT-B-32"}, {"tokenizer": "t.model"}):
        with pytest.raises(ConversionError, match="leave it out"):
            coca_jax.load(tmp_path / "out", **argument)


@pytest.mark.parametrize("name", MODELS)
def test_numpy_alone_computes_the_same_from_the_files(tmp_path: pathlib.Path, name: str) -> None:
    """float64 against our float32: 1e-5 of the largest is what is lost on the way."""
    model = MODELS[name]
    exported.write(weights(model, None), tmp_path / "out")
    reference = runpy.run_path("docs/numpy_coca.py")["Model"](str(tmp_path / "out"))
    pixels, ids = inputs(model)
    wanted = computed(model, weights(model, None).params, pixels, ids)
    image_features, image_tokens = reference.encode_image(pixels)
    text_features, text_tokens = reference.encode_text(ids)
    found = {"image_features": image_features, "text_features": text_features}
    found["logits"] = reference.logits(text_tokens, image_tokens)
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)


@pytest.mark.parametrize("kind", ["parallel", "cascade", "single"])
@pytest.mark.parametrize("left_out", ["lambda_con", "lambda_cap"])
def test_numpy_alone_computes_one_half(tmp_path: pathlib.Path, kind: str, left_out: str) -> None:
    model = tiny.replace(MODEL, pooler__kind=kind, embed_dim=16)
    exported.write(weights(model, None, **{left_out: 0.0}), tmp_path / "out")
    reference = runpy.run_path("docs/numpy_coca.py")["Model"](str(tmp_path / "out"))
    pixels, ids = inputs(model)
    wanted = computed(model, tiny.parameters(model), pixels, ids)  # of both halves: `weights` leaves one out
    found: dict[str, np.ndarray | None] = {}
    found["image_features"], image_tokens = reference.encode_image(pixels)
    found["text_features"], text_tokens = reference.encode_text(ids)
    found["logits"] = reference.logits(text_tokens, image_tokens) if reference.has_captioning else None
    for key, value in found.items():
        assert (value is None) == ((key == "logits") == (left_out == "lambda_cap")), key
        if value is not None:
            atol = 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(value, wanted[key], rtol=0, atol=atol, err_msg=key)


def test_numpy_alone_runs_without_this_package(
    tmp_path: pathlib.Path, run_python: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    exported.write(weights(MODEL, tokenizer), tmp_path / "out")
    np.save(tmp_path / "picture.npy", inputs(MODEL)[0][0])
    shutil.copy("docs/numpy_coca.py", tmp_path)
    done = run_python(
        f"""
        import runpy, sys
        for name in ("coca_jax", "jax", "flax", "torch"):
            sys.modules[name] = None  # importing it fails
        sys.argv = ["numpy_coca.py", "out", "picture.npy", "2,17,4,1"]
        runpy.run_path({str(tmp_path / "numpy_coca.py")!r}, run_name="__main__")
        """,
        cwd=tmp_path,
    )
    lines = done.stdout.split()
    assert lines[0] == "similarity" and -1 <= float(lines[1]) <= 1
    assert lines[2:4] == ["next", "token"] and 0 <= int(lines[4]) < 300


# ---------------------------------------------------------------------------------------------------------------------
# Every version keeps loading

FORMATS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("version", range(1, exported.VERSION + 1))
def test_a_directory_of_every_version_loads_and_computes_what_it_did(version: int) -> None:
    folder = FORMATS / f"format_{version}"
    w = exported.read(folder)
    assert json.loads((folder / "coca_jax.json").read_text())["format_version"] == version
    assert w.tokenizer is not None and w.step == 7
    with np.load(folder / "expected.npz") as expected:
        found = computed(w.config.model, w.params, expected["pixels"], expected["ids"])
        for key, value in found.items():  # other machines and versions of XLA sum in another order
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)


def record(folder: pathlib.Path) -> None:
    trained = Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)
    w = weights(MODEL, trained)
    exported.write(w, folder)
    pixels, ids = inputs(MODEL)
    np.savez(folder / "expected.npz", pixels=pixels, ids=ids, **computed(MODEL, w.params, pixels, ids))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def folder(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> pathlib.Path:
    exported.write(weights(MODEL, tokenizer), tmp_path / "out")
    return tmp_path / "out"


def edit(folder: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "coca_jax.json").read_text())
    change(values)
    (folder / "coca_jax.json").write_text(json.dumps(values))


def refused(folder: pathlib.Path) -> str:
    with pytest.raises(ConversionError) as error:
        coca_jax.load(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_a_flipped_bit_a_cut_and_a_missing_file_are_named(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "model.safetensors has the SHA-256" in refused(folder)
    file.write_bytes(content[:-100])
    assert "cut off, damaged or replaced" in refused(folder)
    file.unlink()
    assert "model.safetensors is missing" in refused(folder)
    (folder / "coca_jax.json").write_text('{"format": "coca_')
    assert "coca_jax.json is damaged" in refused(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(["something else entirely, and more of it"] * 20, vocab_size=290)
    other.save(folder / "tokenizer.model")
    assert "tokenizer.model has the SHA-256" in refused(folder)
    tokenizer.save(folder / "tokenizer.model")
    edit(folder, lambda values: values["tokenizer"].update(eos_id=5))
    assert "eos_id=1, not 5" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=99), "of version 99, and this coca_jax reads up to"),
        (lambda v: v.update(format="other"), "format 'other'"),
        (lambda v: v["model"]["text"].update(rotary=True), "unknown: model.text.rotary=True"),
        (lambda v: v["model"].pop("norm_eps"), "missing: model.norm_eps"),
        (lambda v: v["model"]["text"].update(heads=5), "heads=5 does not divide"),
        (lambda v: v["model"]["image"].update(width="wide"), "width='wide'"),
        (lambda v: v["preprocessing"].update(size=224), "preprocessing.size=224 is not model.image.size=16"),
        (lambda v: v["preprocessing"].update(interpolation="nearest"), "interpolation='nearest'"),
        (lambda v: v["preprocessing"].pop("mean"), "lacks a part or has another in its place: 'mean'"),
        (lambda v: v["weights"].update(file="../model.safetensors"), "names a file '../model.safetensors' that is not"),
        (lambda v: v.pop("weights"), "lacks a part or has another in its place: 'weights'"),
        (lambda v: v.update(model=None), "lacks a part or has another in its place"),
        (lambda v: v["model"]["text"].update(n_uni=3), "misshapen: text_decoder/unimodal/blocks/attention/key/bias"),
        (lambda v: v["loss"].update(lambda_cap=0.0), "unknown: text_decoder/lm_head/kernel"),
    ],
)
def test_what_does_not_fit_together_is_said(
    folder: pathlib.Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    assert message in refused(folder)


@pytest.mark.parametrize("stop_at", [1, 2])  # between the two renames, and in the second
@pytest.mark.parametrize(("raised", "said"), [(KeyboardInterrupt, "^$"), (OSError, "cannot be written")])
def test_what_is_to_be_replaced_stays_until_it_is(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, raised: type[BaseException], said: str
) -> None:
    before, rename, calls = {p.name: p.read_bytes() for p in folder.iterdir()}, os.rename, []

    def stops(*paths: Any) -> None:
        calls.append(paths)
        if calls[stop_at:] or len(calls) == 1:  # aside, and back
            rename(*paths)
        if len(calls) == stop_at:
            raise raised

    monkeypatch.setattr(os, "rename", stops)
    with (
        pytest.raises(ConversionError if raised is OSError else raised, match=said),
        folders.new_folder(folder, overwrite=True) as new,
    ):
        (new / "file").write_text("new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_writer_refuses_what_is_there_and_leaves_nothing_half_done(
    tmp_path: pathlib.Path, tokenizer: Tokenizer, folder: pathlib.Path
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConversionError, match="not empty"):
        exported.write(weights(OTHER, tokenizer), folder)
    broken = weights(MODEL, tokenizer)
    broken.params["text_decoder"].pop("cls_norm")
    with pytest.raises(ConversionError, match="missing: text_decoder/cls_norm/bias"):
        exported.write(broken, folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    exported.write(weights(OTHER, tokenizer), folder, overwrite=True)
    assert exported.read(folder).config.model == OTHER
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        exported.write(weights(MODEL, tokenizer), tmp_path / "file")


if __name__ == "__main__":
    record(pathlib.Path(sys.argv[1]))
