"""What differs between a vision transformer and our encoder is fitted, or told."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config
from coca_jax.interop import vision
from coca_jax.interop.weights import ConversionError
from coca_jax.model.image_encoder import resize_positions
from tests import tiny
from tests.interop.vits import (
    MODEL,
    TOLERANCE,
    big_vision_tensors,
    difference,
    encoder_shapes,
    load,
    save,
    timm_tensors,
    tokens,
)


@pytest.mark.parametrize("kind", ["timm", "big_vision"])
@pytest.mark.parametrize("missing", [(), ("cls", "cls_token"), ("embedding/bias", "patch_embed.proj.bias")])
def test_every_leaf_is_accounted_for_once(tmp_path: pathlib.Path, kind: str, missing: tuple[str, ...]) -> None:
    tensors, suffix = (timm_tensors(), "safetensors") if kind == "timm" else (big_vision_tensors(), "npz")
    file = save(tmp_path / f"vit.{suffix}", {name: x for name, x in tensors.items() if name not in missing})
    there = {name for name in tensors if name not in missing}
    for class_token, patch_bias, pre_norm, position in itertools.product(*[(False, True)] * 3, ("learned", "sincos")):
        image = {"class_token": class_token, "patch_bias": patch_bias, "pre_norm": pre_norm, "position": position}
        model = tiny.replace(MODEL, **{f"image__{key}": value for key, value in image.items()})
        params, report = load(file, model)
        ours = {f"image_encoder/{path}" for path in traverse_util.flatten_dict(encoder_shapes(model), sep="/")}
        loaded, initialised, skipped = (report.of(kind) for kind in ("loaded", "initialised", "skipped"))
        named = [line.name for line in (*loaded, *initialised)]
        assert len(named) == len(set(named)) and set(named) == ours
        flat = traverse_util.flatten_dict({"image_encoder": params}, sep="/")
        assert flat.keys() == {line.name for line in loaded}
        assert all(x.dtype == np.float32 and x.shape == line.shape for line in loaded for x in [flat[line.name]])
        used, left = {name for line in loaded for name in line.tensors}, [line.name for line in skipped]
        assert len(left) == len(set(left)) and used | set(left) == there and not used & set(left)
        assert all(line.detail for line in (*initialised, *skipped))
        assert len(report.lines) == len(loaded) + len(initialised) + len(skipped)
        # What is another function is said by its key.
        keys = {line.name: key for line in (*initialised, *skipped) for key in image if key in line.detail}
        noted = " ".join(report.notes)
        assert all(f"config.model.image.{key}=" in noted for key in keys.values()), report
        assert ("config.model.image.pre_norm=True" in noted) == pre_norm


def test_the_report_is_a_table_and_plain_values(tmp_path: pathlib.Path) -> None:
    model = tiny.replace(MODEL, image__class_token=False, image__size=24, gelu="tanh")
    report = load(save(tmp_path / "model.safetensors", timm_tensors()), model, config.Data())[1]
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.lines) + len(report.notes)
    names = {line.find("image_encoder/") for line in lines if "image_encoder/" in line}
    assert names == {len("skipped") + 2}  # a column
    assert any(
        line.split()[:3] == ["loaded", "image_encoder/position_embedding", "36x16"]
        and line.endswith("from pos_embed; without the class token's row; resized from 4x4 to 6x6")
        for line in lines
    ), str(report)
    assert any(line.split()[:3] == ["skipped", "head.weight", "10x16"] and "the classifier" in line for line in lines)
    values = json.loads(json.dumps(report.to_json()))
    assert len(values["lines"]) == len(report.lines) and values["layout"] == "timm"
    assert {"status", "name", "shape", "tensors", "detail"} == values["lines"][0].keys()
    brief = report.brief()
    for said in (
        "19 parameters loaded",
        "skipped: head.bias, head.weight: the classifier",
        "config.model.gelu='tanh' and timm's models usually have 'exact'",
        "config.model.image.class_token=False and the file has a class token",
        "config.model.image.heads=2 is taken",
        "config.data.mean=(0.5, 0.5, 0.5) is taken",
        "loaded: image_encoder/position_embedding: without the class token's row; resized from 4x4 to 6x6",
    ):
        assert said in brief, brief


def test_prefixes_are_seen_through(tmp_path: pathlib.Path) -> None:
    bare = load(save(tmp_path / "bare.safetensors", timm_tensors()), MODEL)[0]
    for prefix in ("model.", "visual.trunk.", "module.encoder."):
        named = {f"{prefix}{name}": x for name, x in timm_tensors().items()} | {"logit_scale": np.ones(1, np.float32)}
        params, report = load(save(tmp_path / "prefix.safetensors", named), MODEL)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, bare))
        assert [line.detail for line in report.lines if line.name == "logit_scale"] == ["not of the image encoder"]


def test_a_patch_bias_goes_into_the_positions(tmp_path: pathlib.Path) -> None:
    file, images = save(tmp_path / "vit.safetensors", timm_tensors()), tiny.images(MODEL, 2)
    without = tiny.replace(MODEL, image__patch_bias=False)
    for size in (16, 24):
        a, b = (tiny.replace(model, image__size=size) for model in (MODEL, without))
        images = tiny.images(a, 2)
        assert difference(tokens(load(file, b)[0], b, images), tokens(load(file, a)[0], a, images)) < TOLERANCE


def test_positions_with_and_without_a_class_token(tmp_path: pathlib.Path) -> None:
    tensors = timm_tensors()
    table = tensors["pos_embed"][0]

    def position(rows: np.ndarray, **changes: Any) -> np.ndarray:
        file = save(tmp_path / "vit.safetensors", tensors | {"pos_embed": rows[None]})
        return load(file, tiny.replace(MODEL, **changes))[0]["position_embedding"]

    np.testing.assert_array_equal(position(table), table)
    np.testing.assert_array_equal(position(table, image__class_token=False), table[1:])
    np.testing.assert_array_equal(position(table[1:], image__class_token=False), table[1:])
    # timm's no_embed_class: nothing is added to the class token.
    np.testing.assert_array_equal(position(table[1:]), np.concatenate([np.zeros((1, 16)), table[1:]]))
    np.testing.assert_array_equal(
        position(table, image__size=24), np.asarray(resize_positions(jnp.asarray(table), 6, class_token=True))
    )


def test_layer_scale_goes_into_the_weights_and_partial_biases_are_refused(tmp_path: pathlib.Path) -> None:
    plain, rng = timm_tensors(), np.random.default_rng(1)
    gamma = {f"blocks.{i}.ls{n}.gamma": rng.normal(size=16).astype(np.float32) for i in range(2) for n in (1, 2)}
    scaled = plain | gamma
    by_hand = dict(plain)
    for i in range(2):
        for n, module in ((1, "attn.proj"), (2, "mlp.fc2")):
            by_hand[f"blocks.{i}.{module}.weight"] = (
                gamma[f"blocks.{i}.ls{n}.gamma"][:, None] * plain[f"blocks.{i}.{module}.weight"]
            )
            by_hand[f"blocks.{i}.{module}.bias"] = gamma[f"blocks.{i}.ls{n}.gamma"] * plain[f"blocks.{i}.{module}.bias"]
    one, two = (load(save(tmp_path / "vit.safetensors", tensors), MODEL)[0] for tensors in (scaled, by_hand))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    # timm's qkv_bias=False: a bias of nothing is zero; of some layers alone it is a damaged file.
    no_bias = {name: x for name, x in plain.items() if not name.endswith("qkv.bias")}
    params, report = load(save(tmp_path / "vit.safetensors", no_bias), MODEL)
    assert "bias" not in params["blocks"]["attention"]["query"]
    assert [line.name.split("/")[-2] for line in report.of("initialised")] == ["key", "query", "value"]
    for broken in (plain.keys() - {"blocks.1.attn.qkv.bias"}, scaled.keys() - {"blocks.1.ls2.gamma"}):
        with pytest.raises(ConversionError, match=r"missing: blocks\.1\."):
            load(save(tmp_path / "vit.safetensors", {name: scaled[name] for name in broken}), MODEL)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 6), (7, 16)])
def test_a_resized_patch_gives_what_the_patch_gave(old: int, new: int) -> None:
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(old, old, 3, 5)).astype(np.float32), rng.normal(size=(old, old, 3))
    larger = np.asarray(jax.image.resize(patch, (new, new, 3), "bilinear", antialias=False))
    before = np.einsum("yxc,yxcd->d", patch, kernel)
    after = np.einsum("yxc,yxcd->d", larger, vision.resize_patches(kernel, new))
    np.testing.assert_allclose(after, before, atol=1e-4)  # float32, with an inverse between
    assert vision.resize_patches(kernel, old) is kernel


def test_another_patch_size_is_fitted(tmp_path: pathlib.Path) -> None:
    model = tiny.replace(MODEL, image__size=32, image__patch=8)
    params, report = load(save(tmp_path / "vit.npz", big_vision_tensors()), model)
    wanted = vision.resize_patches(big_vision_tensors()["embedding/kernel"], 8)
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"], wanted)
    assert [line.detail for line in report.of("loaded") if "patches of 4x4 to 8x8" in line.detail]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_other_precisions_are_widened(tmp_path: pathlib.Path, dtype: Any, suffix: str) -> None:
    tensors = {name: x.astype(dtype) for name, x in timm_tensors().items()}
    params = load(save(tmp_path / f"vit.{suffix}", tensors), MODEL)[0]
    wanted = tensors["blocks.1.mlp.fc1.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][1], wanted)
