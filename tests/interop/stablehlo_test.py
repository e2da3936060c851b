"""A model as StableHLO: loaded in processes that have JAX and nothing of this package, it computes the same."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import coca_jax
from coca_jax import generate
from coca_jax.data.images import Preprocessor, normalize
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import functions, onnx, stablehlo
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model.coca import CoCa
from tests import pairs, tiny
from tests.interop.exported_test import DATA, MODEL, OTHER, weights

MODELS = {"paper's": MODEL, "open_clip's": OTHER}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, MODEL.image.size, MODEL.image.size, 3), np.uint8)


def ids(batch: int) -> np.ndarray:
    return tiny.tokens(MODEL, [9, 4, 2, 7, 3][:batch], seed=3)


def wanted(w: Weights, batch: int, tokenizer: Tokenizer | None = None) -> dict[str, np.ndarray]:
    """What this package computes; with a tokenizer, captions too."""
    model = w.config.model

    def compute(params: Any, images: Any, tokens: Any) -> dict[str, Any]:
        output: Any = CoCa(model).apply({"params": params}, images, tokens)
        found = {name: getattr(output, name) for name in ("image_features", "image_tokens", "text_features", "logits")}
        if tokenizer is not None:
            special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
            found["captions"] = generate.greedy(model, params, output.image_tokens, **special)
        return found

    images = normalize(pixels(batch), DATA.mean, DATA.std)
    return {key: np.asarray(value) for key, value in jax.jit(compute)(w.params, images, ids(batch)).items()}


# Run where this package and Flax cannot be imported: computes everything for several batches, captions for the first.
PROGRAM = """
import importlib.abc, runpy, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("coca_jax", "flax", "optax", "tests"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Refused())
import numpy as np
model = runpy.run_path(sys.argv[1])["Model"](sys.argv[2])
given, results, batches = np.load(sys.argv[3]), {}, list(map(int, sys.argv[5:]))
results["captions"] = model.caption(given[f"pixels{batches[0]}"])
for batch in batches:
    pixels, ids = given[f"pixels{batch}"], given[f"ids{batch}"]
    results[f"image_features{batch}"], tokens = model["encode_image"](pixels)
    results[f"image_tokens{batch}"] = tokens
    (results[f"text_features{batch}"],) = model["encode_text"](ids)
    results[f"logits{batch}"] = model["prefill"](ids, tokens)[0]
np.savez(sys.argv[4], **results)
assert not {"coca_jax", "flax"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("name", "batches"), [("open_clip's", (2, 3)), pytest.param("paper's", (5, 1, 2), marks=pytest.mark.slow)]
)
def test_a_process_with_jax_alone_computes_the_same(
    tmp_path: pathlib.Path,
    run_python: Callable[..., Any],
    tokenizer: Tokenizer,
    name: str,
    batches: tuple[int, ...],
) -> None:
    w = weights(MODELS[name], tokenizer)
    stablehlo.write(w, tmp_path / "out")
    given = {f"pixels{b}": pixels(b) for b in batches} | {f"ids{b}": ids(b) for b in batches}
    np.savez(tmp_path / "given.npz", **given)
    shutil.copy("docs/stablehlo_coca.py", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    run_python(
        ["program.py", "stablehlo_coca.py", "out", "given.npz", "results.npz", *map(str, batches)],
        devices=1,
        cwd=tmp_path,
        env={"PYTHONPATH": ""},
    )
    with np.load(tmp_path / "results.npz") as results:
        for batch in batches:
            expected = wanted(w, batch, tokenizer if batch == batches[0] else None)
            if batch == batches[0]:
                np.testing.assert_array_equal(results["captions"], expected.pop("captions"))
            for key, value in expected.items():
                # The same operations, but compiled apart: XLA may fuse them otherwise, which is float32's last bits.
                atol = 1e-5 * np.abs(value).max()
                np.testing.assert_allclose(results[f"{key}{batch}"], value, rtol=0, atol=atol, err_msg=f"{key} {batch}")


@pytest.fixture(scope="module")
def ours(tokenizer: Tokenizer) -> Weights:
    return weights(MODEL, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ours: Weights) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("stablehlo") / "out"
    stablehlo.write(ours, folder)
    return folder


def loaded(folder: pathlib.Path, name: str) -> jax.export.Exported:
    return jax.export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes()))


def test_the_files_are_for_every_platform_and_promised_to_stay_loadable(folder: pathlib.Path) -> None:
    for name in ("encode_image", "encode_text", "prefill", "decode_step"):
        exported = loaded(folder, name)
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert exported.nr_devices == 1  # nothing of a mesh
        called = set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module()))
        assert called <= {"shape_assertion"}, called  # of jax.export's own list, for the free sizes


def test_the_manifest_says_what_the_functions_take_and_give(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("coca_jax/stablehlo", functions.VERSION)
    assert manifest["jax_version"] == jax.__version__ and "6 months" in manifest["loads_with"]
    preprocessing = {key: value for key, value in manifest["preprocessing"].items() if key != "normalized_inside"}
    assert Preprocessor.from_json(preprocessing) == Preprocessor.from_config(16, DATA)
    assert Tokenizer(folder / manifest["tokenizer"]["file"]).to_bytes() == tokenizer.to_bytes()
    assert manifest["decoding"]["never"] == sorted([tokenizer.pad_id, tokenizer.bos_id])
    assert manifest["similarity"] == {"scale": pytest.approx(10.0), "bias": 0.0}
    for name, entry in manifest["functions"].items():
        exported = loaded(folder, name)
        _, *arrays = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
        for aval, array in zip([*arrays, *exported.out_avals], [*entry["inputs"], *entry["outputs"]], strict=True):
            assert [str(n) for n in aval.shape] == [str(n) for n in array["shape"]], array
            assert aval.dtype == array["dtype"], array
    inputs = [array["name"] for array in manifest["functions"]["decode_step"]["inputs"]]
    outputs = [array["name"] for array in manifest["functions"]["decode_step"]["outputs"]]
    assert manifest["decoding"]["carried"] == {name: inputs[outputs.index(name)] for name in outputs[1:]}


def test_other_weights_of_the_same_shapes_fit(folder: pathlib.Path, ours: Weights) -> None:
    other = tiny.parameters(MODEL, seed=5)
    flat = functions.flat_parameters(dataclasses.replace(ours, params=other))
    found = loaded(folder, "encode_text").call(flat, ids(2))[0]
    expected: Any = CoCa(MODEL).apply({"params": other}, ids(2), method="encode_text")
    np.testing.assert_allclose(found, expected.text_features, rtol=0, atol=1e-6)


def test_a_prompt_longer_than_the_model_is_refused(folder: pathlib.Path, ours: Weights) -> None:
    tokens = np.zeros((2, MODEL.text.length + 1), np.int32), np.zeros((2, 4, 16), np.float32)
    with pytest.raises(ValueError, match="shapes"):
        loaded(folder, "prefill").call(functions.flat_parameters(ours), *tokens)


@pytest.mark.parametrize(
    ("kind", "loss", "names", "outputs"),
    [
        ("cascade", {"lambda_cap": 0.0}, {"encode_image", "encode_text"}, ["image_features"]),
        ("parallel", {"lambda_con": 0.0}, {"encode_image", "prefill", "decode_step"}, ["image_tokens"]),
    ],
    ids=["contrastive alone", "captions alone"],
)
def test_a_half_that_is_not_there_is_left_out(
    kind: str, loss: dict[str, float], names: set[str], outputs: list[str]
) -> None:
    found = {f.name: f for f in functions.functions(weights(tiny.replace(MODEL, pooler__kind=kind), None, **loss))}
    assert set(found) == names
    assert [array.name for array in found["encode_image"].outputs] == outputs


def test_a_bfloat16_model_has_float32_interfaces_and_its_own_numbers(ours: Weights) -> None:
    model = tiny.replace(MODEL, dtype="bfloat16", param_dtype="bfloat16")
    trained = tiny.replace(ours.config, model=tiny.replace(model, attention="cudnn", text__remat="dots"))  # on a GPU
    w = Weights(trained, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), ours.params), None)
    found = {f.name: f for f in functions.functions(w)}
    assert [array.dtype for array in found["encode_image"].outputs] == ["float32", "float32"]
    assert [array.dtype for array in found["prefill"].outputs] == ["float32"] + ["bfloat16"] * 6
    exported = stablehlo.lower(found["encode_text"], w, ["cpu"])
    features = exported.call(functions.flat_parameters(w), ids(3))[0]
    here: Any = jax.jit(lambda p, x: CoCa(model).apply({"params": p}, x, method="encode_text"))(w.params, ids(3))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, here.text_features, rtol=0, atol=2e-2)  # bfloat16's 8 bits, fused otherwise


def test_what_cannot_be_written_is_said_and_nothing_is_left(
    tmp_path: pathlib.Path, folder: pathlib.Path, ours: Weights
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConversionError, match="not empty"):
        stablehlo.write(ours, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ConversionError, match=r"platforms=\['abacus'\]: give one or more of cpu"):
        stablehlo.write(ours, tmp_path / "new", platforms=("abacus",))
    broken = {**ours.params, "text_decoder": {**ours.params["text_decoder"], "cls_norm": {}}}
    with pytest.raises(ConversionError, match="text_decoder/cls_norm/bias: missing"):
        stablehlo.write(dataclasses.replace(ours, params=broken), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_example_names_a_damaged_file(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SystemExit, match=r"model\.safetensors is cut off or damaged"):
        runpy.run_path("docs/stablehlo_coca.py")["Model"](str(tmp_path / "out"))


def test_the_example_runs_one_half(
    tmp_path: pathlib.Path, run_python: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    w = weights(MODEL, tokenizer, lambda_cap=0.0)
    stablehlo.write(w, tmp_path / "out")
    np.save(tmp_path / "pixels.npy", pixels(2))
    done = run_python(["docs/stablehlo_coca.py", tmp_path / "out", tmp_path / "pixels.npy"], devices=1)
    features = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
    np.testing.assert_allclose(features, wanted(weights(MODEL, None), 2)["image_features"], rtol=0, atol=1e-5)
    with pytest.raises(SystemExit, match=r"without captions \(lambda_cap=0\): it has encode_image, encode_text"):
        runpy.run_path("docs/stablehlo_coca.py")["Model"](str(tmp_path / "out")).caption(pixels(2))


def test_the_example_says_that_there_is_no_tokenizer(tmp_path: pathlib.Path) -> None:
    stablehlo.write(weights(MODEL, None), tmp_path / "out")
    with pytest.raises(SystemExit, match="out came without its tokenizer: export it again"):
        runpy.run_path("docs/stablehlo_coca.py")["Model"](str(tmp_path / "out")).caption(pixels(2))


def test_load_says_what_it_is(folder: pathlib.Path) -> None:
    with pytest.raises(ConversionError, match=r"holds compiled functions \(stablehlo\), which docs/stablehlo_coca\.py"):
        coca_jax.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encode_text", "prefill", "decode_step"])
def test_layers_written_out_are_the_scanned_ones(name: str) -> None:
    """`Loop` against `stack`: all tokens at once, and with a cache."""
    w = weights(OTHER, None)
    params, rng = functions.flat_parameters(w), np.random.default_rng(0)
    one, other = (next(f for f in functions.functions(w, scan=scan) if f.name == name) for scan in (True, False))
    arrays = [draw(array, rng) for array in one.inputs]
    for a, b in zip(jax.jit(one.call)(params, *arrays), jax.jit(other.call)(params, *arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def draw(array: functions.Array, rng: np.random.Generator, b: int = 2, s: int = 3) -> np.ndarray:
    shape = [{"b": b, "s": s}[n] if isinstance(n, str) else n for n in array.shape]
    if array.dtype.startswith("float"):
        return rng.normal(size=shape).astype(array.dtype)
    return np.asarray(rng.integers(3, 8, shape), array.dtype)


def test_onnx_without_its_packages_says_what_to_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, ours: Weights
) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # importing it fails
    with pytest.raises(ConversionError, match=r'pip install "coca_jax\[onnx\]"'):
        onnx.write(ours, tmp_path / "out")
    assert not list(tmp_path.iterdir())
