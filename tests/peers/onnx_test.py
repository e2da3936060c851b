"""A model as ONNX, run by ONNX Runtime: the same numbers, the same captions.

`pip install "coca_jax[onnx]"` beside the tests' packages, then `pytest -m peers tests/peers/onnx_test.py`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import functions
from coca_jax.interop import onnx as writer
from coca_jax.interop.weights import ConversionError
from tests import pairs, tiny
from tests.interop.exported_test import weights
from tests.interop.stablehlo_test import MODELS, draw, ids, pixels, wanted

pytestmark = [
    pytest.mark.peers,
    # jax2onnx and what it imports use what newer versions of others will not have.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# Of the largest value. Both compute in float32 and sum in other orders: 4e-7 is what was seen for these sizes.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([pairs.caption(*e) for e in pairs.examples()] * 20, vocab_size=300)


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Iterator[tuple[str, pathlib.Path]]:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    writer.write(weights(MODELS[request.param], tokenizer), folder)
    yield request.param, folder
    shutil.rmtree(folder)


def close(found: np.ndarray, expected: Any, what: str) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=what)


def test_onnx_runtime_computes_the_same(exported: tuple[str, pathlib.Path], tokenizer: Tokenizer) -> None:
    name, folder = exported
    model = runpy.run_path("docs/onnx_coca.py")["Model"](str(folder))
    for batch in (1, 2, 5):
        expected = wanted(weights(MODELS[name], tokenizer), batch, tokenizer)
        image = model("encode_image", images=pixels(batch))
        found = image | model("encode_text", tokens=ids(batch))
        found["logits"] = model("prefill", tokens=ids(batch), image_tokens=image["image_tokens"])["logits"]
        np.testing.assert_array_equal(model.caption(pixels(batch)), expected.pop("captions"))
        for key, value in expected.items():
            close(found[key], value, f"{key}, batch {batch}")


def test_every_output_is_the_functions(exported: tuple[str, pathlib.Path]) -> None:
    """The cache too, for prompts of several lengths and at several positions."""
    name, folder = exported
    w = weights(MODELS[name], None)
    params, rng = functions.flat_parameters(w), np.random.default_rng(0)
    for function in functions.functions(w):
        session = onnxruntime.InferenceSession(folder / writer.FILES[function.name], providers=["CPUExecutionProvider"])
        assert [x.name for x in session.get_inputs()] == [x.name for x in function.inputs]
        assert [x.name for x in session.get_outputs()] == [x.name for x in function.outputs]
        for given, array in zip(session.get_inputs(), function.inputs, strict=True):
            assert tuple(given.shape) == array.shape
        for b, s in ((1, 1), (3, 4)):
            arrays = {array.name: draw(array, rng, b, s) for array in function.inputs}
            found = session.run(None, arrays)
            expected = jax.jit(function.call)(params, *arrays.values())
            for array, one, other in zip(function.outputs, found, expected, strict=True):
                close(one, other, f"{function.name}, {array.name}, b={b}, s={s}")


def test_the_files_are_what_the_manifest_says(exported: tuple[str, pathlib.Path], tokenizer: Tokenizer) -> None:
    _, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["computed_in"]) == ("coca_jax/onnx", "float32")
    assert Tokenizer(folder / manifest["tokenizer"]["file"]).to_bytes() == tokenizer.to_bytes()
    files = [entry["file"] for entry in manifest["functions"].values()]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*files, "manifest.json", "tokenizer.model"])
    for file in files:
        graph = onnx.load(folder / file)
        onnx.checker.check_model(graph, full_check=True)
        assert {entry.version for entry in graph.opset_import if not entry.domain} == {writer.OPSET}
        assert {node.domain for node in graph.graph.node} == {""} and not graph.functions  # standard operators alone


def test_weights_too_large_for_a_file_lie_beside_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(writer, "EXTERNAL_ABOVE", 10_000)
    w = weights(MODELS["paper's"], tokenizer, lambda_cap=0.0)
    writer.write(w, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("image.onnx", "image.onnx.data", "manifest.json", "text.onnx", "text.onnx.data", "tokenizer.model")
    ]
    model = runpy.run_path("docs/onnx_coca.py")["Model"](str(tmp_path / "out"))
    assert set(model.sessions) == {"encode_image", "encode_text"}
    params = functions.flat_parameters(w)
    for function in functions.functions(w):
        arrays = {array.name: draw(array, np.random.default_rng(1)) for array in function.inputs}
        for one, other in zip(
            model(function.name, **arrays).values(), function.call(params, *arrays.values()), strict=True
        ):
            close(one, other, function.name)
    np.save(tmp_path / "pixels.npy", pixels(2))
    done = run_python(["docs/onnx_coca.py", str(tmp_path / "out"), str(tmp_path / "pixels.npy")], devices=1)
    features = np.array([line.split() for line in done.stdout.splitlines()], np.float32)
    close(features, model("encode_image", images=pixels(2))["image_features"], "the example")
    with pytest.raises(SystemExit, match=r"without captions \(lambda_cap=0\): it has encode_image, encode_text"):
        model.caption(pixels(2))
    data = tmp_path / "out" / "text.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    done = run_python(["docs/onnx_coca.py", str(tmp_path / "out"), "x.npy"], devices=1, check=False)
    assert done.returncode == 1 and "text.onnx.data is cut off or damaged" in done.stderr


def test_a_bfloat16_model_computes_in_float32_and_captions_alone_have_no_text_tower(tmp_path: pathlib.Path) -> None:
    model = tiny.replace(MODELS["paper's"], dtype="bfloat16", param_dtype="bfloat16")
    w = weights(model, None, lambda_con=0.0)
    w = dataclasses.replace(w, params=jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), w.params))
    writer.write(w, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("image.onnx", "manifest.json", "prefill.onnx", "step.onnx")
    ]
    with pytest.raises(SystemExit, match="out came without its tokenizer: export it again"):
        runpy.run_path("docs/onnx_coca.py")["Model"](str(tmp_path / "out")).caption(pixels(2))
    (image, *_) = functions.functions(w, dtype="float32")
    params = {path: x.astype(np.float32) for path, x in functions.flat_parameters(w).items()}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "image.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": pixels(2)})[0], image.call(params, pixels(2))[0], "image_tokens")


def test_what_is_there_stays(exported: tuple[str, pathlib.Path]) -> None:
    name, folder = exported
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConversionError, match="not empty"):
        writer.write(weights(MODELS[name], None), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
