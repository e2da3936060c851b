"""Files that are another function than our encoder can be, of other sizes, damaged or malicious."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest

from coca_jax import config
from coca_jax.interop.weights import ConversionError
from tests import tiny
from tests.interop.vits import MODEL, big_vision_tensors, load, save, timm_tensors


def said(path: pathlib.Path, model: config.Model = MODEL, data: config.Data | None = None) -> str:
    with pytest.raises(ConversionError) as error:
        load(path, model, data)
    assert str(path) in str(error.value)
    return str(error.value)


def test_sizes_that_differ_are_listed_with_their_keys(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path / "vit.npz", big_vision_tensors(width=24, depth=3, mlp=40))
    message = said(file, tiny.replace(MODEL, image__heads=4))
    assert len(message.splitlines()) == 5, message
    for n, (key, value) in enumerate((("depth", 3), ("width", 24), ("heads", 2), ("mlp_dim", 40)), 1):
        assert f"config.model.image.{key}={value}" in message.splitlines()[n], message


def test_what_stands_beside_the_file_is_compared(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "model.safetensors", timm_tensors())
    described = {
        "architecture": "vit_small_patch16_224",
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"},
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConversionError) as error:
        load(tmp_path, MODEL, config.Data())
    for wanted in (
        "config.model.image.heads=2: this file has 6: config.model.image.heads=6",
        "config.data.mean=(0.485, 0.456, 0.406)",
        "config.data.std=(0.229, 0.224, 0.225)",
    ):
        assert wanted in str(error.value)
    described |= {"model_args": {"num_heads": 2, "act_layer": "gelu_tanh"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    data = config.Data(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    notes = load(tmp_path, MODEL, data)[1].notes
    assert len(notes) == 2 and "config.json says 'tanh'" in notes[0] and "config.json says 'bilinear'" in notes[1]
    # timm's tower inside open_clip is described by open_clip.
    trunk = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(trunk))
    with pytest.raises(ConversionError, match=r"heads=2: this file has 12: config\.model\.image\.heads=12"):
        load(tmp_path, MODEL)
    (tmp_path / "open_clip_config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json is damaged"):
        load(tmp_path, MODEL)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5]}}))
    with pytest.raises(ConversionError, match=r"config\.json lacks a part"):
        load(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"reg_token": (1, 4, 16)}, "refused: reg_token: register tokens"),
        ({"dist_token": (1, 1, 16)}, "refused: dist_token"),
        (
            {"blocks.0.attn.q_norm.weight": (8,)},
            "refused: blocks.0.attn.q_norm.weight: queries and keys are normalised",
        ),
        ({"blocks.0.mlp.fc1_g.weight": (32, 16)}, "refused: blocks.0.mlp.fc1_g.weight: a gated MLP"),
        ({"blocks.0.attn.norm.weight": (16,)}, "unknown: blocks.0.attn.norm.weight (16,)"),
        ({"blocks.0.attn.relative_position_bias_table": (49, 2)}, "positions relative to each other"),
        ({"something": (3,)}, "unknown: something (3,)"),
        ({"blocks.1.norm2.weight": None}, "missing: blocks.1.norm2.weight (16,)"),
        ({"blocks.1.norm2.weight": (17,)}, "misshapen: blocks.1.norm2.weight (17,), wanted (16,)"),
        ({"pos_embed": (1, 19, 16)}, "misshapen: pos_embed (1, 19, 16), its 19 rows are no square grid"),
        ({"pos_embed": (1, 17, 17)}, "misshapen: pos_embed"),
        ({"cls_token": (1, 2, 16)}, "misshapen: cls_token (1, 2, 16)"),
        ({"patch_embed.proj.weight": (16, 4, 4, 4)}, "misshapen: patch_embed.proj.weight (16, 4, 4, 4), wanted"),
        ({"patch_embed.proj.bias": (5,)}, "misshapen: patch_embed.proj.bias (5,)"),
    ],
)
def test_another_function_or_a_damaged_one_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, tuple[int, ...] | None], wanted: str
) -> None:
    tensors = timm_tensors()
    for name, shape in changes.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    assert wanted in said(save(tmp_path / "vit.safetensors", tensors))


def test_files_of_another_kind(tmp_path: pathlib.Path) -> None:
    assert "no such file or folder" in said(tmp_path / "nothing.npz")
    assert "no vision transformer that is known" in said(save(tmp_path / "a.npz", {"w": np.zeros(3, np.float32)}))
    two = {f"{part}.{name}": x for part in ("student", "teacher") for name, x in timm_tensors().items()}
    message = said(save(tmp_path / "b.safetensors", two))
    assert "holds 2 vision transformers" in message and "timm: student.patch_embed.proj.weight" in message
    integers = timm_tensors() | {"blocks.0.norm1.bias": np.zeros(16, np.int32)}
    for suffix in ("npz", "safetensors"):
        assert "blocks.0.norm1.bias is of dtype" in said(save(tmp_path / f"c.{suffix}", integers))
    (tmp_path / "vit.onnx").write_bytes(b"x")
    assert "weights are read from .safetensors, .npz" in said(tmp_path / "vit.onnx")
    for suffix in ("npz", "safetensors"):
        whole = save(tmp_path / f"d.{suffix}", timm_tensors()).read_bytes()
        (tmp_path / f"d.{suffix}").write_bytes(whole[: len(whole) // 2])
        assert "is cut off or no" in said(tmp_path / f"d.{suffix}")
    assert "it is not known which file is meant (there are: a.npz, b.safetensors" in said(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is a run's workdir: write its weights out first" in said(tmp_path / "run")


def npz(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"shape": shape, "fortran_order": False, "descr": dtype})
    return out.getvalue()


def test_an_npz_is_believed_nothing(tmp_path: pathlib.Path) -> None:
    members = {name: npy(x) for name, x in big_vision_tensors().items()}
    name = "Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias"
    # Claims of terabytes cost nothing: they are not what the model has.
    for bomb in (name, "pos_embedding", "embedding/kernel", "embedding/bias", "cls"):
        message = said(npz(tmp_path / "bomb.npz", members | {bomb: header((10**6, 10**6, 3)) + b"\0" * 100}))
        assert f"misshapen: {bomb} (1000000, 1000000, 3)" in message
    assert "is damaged" in said(npz(tmp_path / "short.npz", members | {name: header((32,)) + b"\0" * 100}))
    objects = header((32,), "|O") + b"cos\nsystem\n(S'true'\ntR."
    assert "Python objects, which are never loaded" in said(npz(tmp_path / "objects.npz", members | {name: objects}))
    assert "no npz of arrays" in said(npz(tmp_path / "text.npz", members | {name: b"hello"}))
    # What is not taken is not even looked into.
    load(npz(tmp_path / "head.npz", members | {"head/kernel": objects}), MODEL)
