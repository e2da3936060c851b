"""timm's own models, small ones with drawn weights, give the tokens that our encoder gives with what is read of them.

Compared is what timm has before its final norm, which our encoder does not have. The bound is 1e-4 of the largest
token, in float32.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from coca_jax import config
from coca_jax.interop import vision
from coca_jax.interop.weights import ConversionError
from tests import tiny
from tests.interop import vits

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def model(**changes: Any) -> config.Model:
    image = config.ImageEncoder(size=32, patch=8, width=48, depth=2, heads=3, mlp_dim=192, class_token=True)
    return tiny.replace(tiny.replace(tiny.MODEL, image=image, gelu="exact"), **changes)


def drawn(seed: int = 0, **changes: Any) -> VisionTransformer:
    """A model of timm's; biases and norms too are drawn, so that a missing one shows."""
    torch.manual_seed(seed)
    vit = VisionTransformer(**SIZES | {"num_classes": 5} | changes).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return vit


def images(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def their_tokens(vit: VisionTransformer, pictures: np.ndarray) -> np.ndarray:
    norm, vit.norm = vit.norm, torch.nn.Identity()
    with torch.no_grad():
        tokens = vit.forward_features(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    vit.norm = norm
    return tokens


def saved(vit: VisionTransformer, path: pathlib.Path) -> pathlib.Path:
    safetensors.torch.save_file(vit.state_dict(), path)
    return path


def read(path: pathlib.Path, m: config.Model, data: config.Data | None = None) -> tuple[Any, vision.Report]:
    return vision.load_encoder(path, m, vits.encoder_shapes(m), data)


def ours(path: pathlib.Path, m: config.Model, pictures: np.ndarray) -> np.ndarray:
    """Tokens of our encoder. What the file does not have are biases alone, which are zero there."""
    params, report = read(path, m)
    assert all(line.name.endswith("/bias") for line in report.of("initialised")), report
    flat = {path: np.zeros(x.shape) for path, x in flatten_dict(vits.encoder_shapes(m)).items()}
    return vits.tokens(unflatten_dict(flat | flatten_dict(params)), m, pictures)


@pytest.mark.parametrize(
    ("theirs", "changes"),
    [
        ({}, {}),
        ({"init_values": 0.1}, {}),
        ({"no_embed_class": True}, {}),
        ({"class_token": False, "global_pool": "avg"}, {"image__class_token": False}),
        (
            {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
            {"image__class_token": False, "gelu": "tanh"},
        ),
        ({"pre_norm": True, "norm_layer": "layernorm"}, {"image__pre_norm": True, "image__patch_bias": False}),
        ({"qkv_bias": False, "proj_bias": False}, {}),
        ({"mlp_ratio": 2.5}, {"image__mlp_dim": 120}),
    ],
    ids=["plain", "layer scale", "no_embed_class", "average", "SigLIP", "CLIP", "no biases", "narrow MLP"],
)
def test_tokens(tmp_path: pathlib.Path, theirs: dict[str, Any], changes: dict[str, Any]) -> None:
    vit, pictures = drawn(**theirs), images()
    m = tiny.replace(model(**changes), norm_eps=vit.blocks[0].norm1.eps)
    tokens = ours(saved(vit, tmp_path / "vit.safetensors"), m, pictures)
    assert vits.difference(tokens, their_tokens(vit, pictures)) < TOLERANCE


def test_a_file_of_pytorch(tmp_path: pathlib.Path) -> None:
    vit = drawn()
    torch.save({"state_dict": vit.state_dict(), "epoch": 3}, tmp_path / "vit.pth")
    tokens = ours(tmp_path / "vit.pth", model(), images())
    assert vits.difference(tokens, their_tokens(vit, images())) < TOLERANCE


@pytest.mark.parametrize("size", [16, 48])
def test_another_resolution(tmp_path: pathlib.Path, size: int) -> None:
    """timm resizes the positions too: PyTorch's antialiased bicubic is Pillow's, and so is JAX's."""
    vit, pictures = drawn(), images(size)
    path = saved(vit, tmp_path / "vit.safetensors")
    vit.set_input_size((size, size))
    assert vits.difference(ours(path, model(image__size=size), pictures), their_tokens(vit, pictures)) < TOLERANCE


@pytest.mark.parametrize("new", [4, 8, 12])
def test_another_patch_size(new: int) -> None:
    kernel = np.random.default_rng(0).normal(size=(6, 6, 3, 16)).astype(np.float32)
    tensor = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    theirs = timm.layers.resample_patch_embed(tensor, [new, new], interpolation="bilinear", antialias=False).numpy()
    assert vits.difference(vision.resize_patches(kernel, new), theirs.transpose(2, 3, 1, 0)) < TOLERANCE


@pytest.mark.parametrize("earlier", [False, True])
def test_timm_reads_a_big_vision_file_as_we_do(tmp_path: pathlib.Path, earlier: bool) -> None:
    tensors = vits.big_vision_tensors()
    if earlier:
        tensors = vits.as_saved_by_google_research(tensors)
    else:
        tensors = {f"params/{name}": tensor for name, tensor in tensors.items()}
    np.savez(tmp_path / "vit.npz", **tensors)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    vit = drawn(**sizes, num_classes=10, no_embed_class=not earlier)
    vit.load_pretrained(str(tmp_path / "vit.npz"))
    tokens = ours(tmp_path / "vit.npz", vits.MODEL, images(16))
    assert vits.difference(tokens, their_tokens(vit, images(16))) < TOLERANCE


def test_a_folder_of_the_hub(tmp_path: pathlib.Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, num_classes=0).eval()
    save_for_hf(vit, tmp_path, safe_serialization=True)
    image = config.ImageEncoder(size=224, patch=16, width=192, depth=1, heads=3, mlp_dim=768, class_token=True)
    m, pictures = tiny.replace(model(), image=image), images(224)[:1]
    assert vits.difference(ours(tmp_path, m, pictures), their_tokens(vit, pictures)) < TOLERANCE
    described = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    data = config.Data(mean=tuple(described["mean"]), std=tuple(described["std"]))
    assert read(tmp_path, m, data)[1].notes == ()
    with pytest.raises(ConversionError, match=r"config\.model\.image\.heads=2: this file has 3"):
        read(tmp_path, tiny.replace(m, image__heads=2))
    with pytest.raises(ConversionError, match=r"config\.data\.mean=\(0\.1, 0\.1, 0\.1\)"):
        read(tmp_path, m, tiny.replace(data, mean=(0.1, 0.1, 0.1)))


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"reg_tokens": 4}, "register tokens"),
        ({"qk_norm": True}, "queries and keys are normalised"),
        ({"mlp_layer": timm.layers.SwiGLU}, "gated MLP"),
        ({"scale_attn_norm": True}, "unknown: blocks.0.attn.norm.weight"),
    ],
)
def test_what_is_another_function_is_refused(tmp_path: pathlib.Path, theirs: dict[str, Any], reason: str) -> None:
    path = saved(drawn(**theirs), tmp_path / "vit.safetensors")
    with pytest.raises(ConversionError, match=reason):
        read(path, model())


def record(path: pathlib.Path) -> None:
    """Writes tests/interop/timm_vit.safetensors."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit, pictures = drawn(**sizes, num_classes=10, init_values=0.1), images(16)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in vit.state_dict().items()}
    tensors |= {"in.images": torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()}
    tensors |= {"out.tokens": torch.from_numpy(their_tokens(vit, pictures))}
    safetensors.torch.save_file(tensors, path, {"config": json.dumps(sizes), "timm": timm.__version__})


def test_the_recorded_tokens_are_timms() -> None:
    with safetensors.safe_open(vits.HERE / "timm_vit.safetensors", "torch") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118  (not a mapping)
        vit = drawn(seed=1, **json.loads(file.metadata()["config"]), num_classes=10, init_values=0.1)
        vit.load_state_dict({name.removeprefix("model."): file.get_tensor(name) for name in names})
        pictures = file.get_tensor("in.images").permute(0, 2, 3, 1).numpy()
        assert vits.difference(their_tokens(vit, pictures), file.get_tensor("out.tokens").numpy()) < 1e-6
