"""open_clip itself (open_clip_torch 3.3.0, PyTorch on the CPU) opens what is written, and what it saves is read.

Differences are `max |x - reference| / max |reference|`, one figure for a whole array; the bound is 1e-4 in float32.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from flax import traverse_util

from coca_jax import config, losses
from coca_jax.data.images import Preprocessor
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import open_clip as ours
from coca_jax.interop import torch_files
from coca_jax.interop.tokenizer_json import PROBES
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model.coca import CoCa
from tests import tiny
from tests.interop.open_clip_rewriting_test import BASE, REWRITTEN, TWO_POOLERS, parameters

# The libraries warn of themselves; what is tested here is what they compute.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
TOLERANCE = 1e-4


@functools.cache
def libraries() -> tuple[Any, Any]:
    """(torch, open_clip)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import open_clip
    import torch

    return torch, open_clip


CAPTIONS = ["a red apple on a table", "two cats, naïve café", "A photo of 3 dogs <3 in Paris!", "it's a dog's life"] * 5
TEXTS = ["a red apple", "two  cats 😀", "A Photo OF a dog & 中文", "a " * 30]


@functools.cache
def sentencepiece() -> Tokenizer:
    return Tokenizer.train([*CAPTIONS, *(text for text in PROBES if text.strip())], vocab_size=600)


def weights(tokenizer: Tokenizer, changes: dict[str, Any] | None = None, shared: bool = True) -> Weights:
    sizes = {"text__vocab_size": tokenizer.vocab_size, "text__pad_id": tokenizer.pad_id, "text__length": 40}
    model = tiny.replace(BASE, **sizes, **(changes or {}))
    data = config.Data(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), interpolation="pillow-bicubic")
    return Weights(config.Config(model=model, data=data), parameters(model, shared), tokenizer)


def difference(x: Any, reference: Any) -> float:
    x, reference = np.asarray(x), np.asarray(reference)
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def compare(model: Any, w: Weights, tokens: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Differences of open_clip's outputs from ours, at positions that hold tokens."""
    torch, _ = libraries()
    model.eval()
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens).long(), output_labels=False
        )
    output: Any = jax.jit(CoCa(w.config.model).apply)({"params": w.params}, images, tokens)
    real = tokens != w.config.model.text.pad_id
    assert 0 < real.mean() < 1
    size = w.config.model.embed_dim  # behind are zeros
    return {
        "image": difference(output.image_features, theirs["image_features"][:, :size]),
        "text": difference(output.text_features, theirs["text_features"][:, :size]),
        "logits": difference(np.asarray(output.logits)[real], theirs["logits"].numpy()[real]),
        "scale": difference(output.logit_scale, theirs["logit_scale"]),
    }


def picture(width: int, height: int) -> PIL.Image.Image:
    """Edges and slopes, a photograph's worth of frequencies."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a) + np.cos(y / b) for a, b in ((3, 7), (11, 5), (40, 23))]
    pixels = np.stack(waves, -1) * 50 + 127 + rng.normal(scale=30, size=(height, width, 3))
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sentencepiece", {}),
        ("clip", {}),
        ("sentencepiece", REWRITTEN["all"][0]),
        ("clip", TWO_POOLERS["two poolers and all else"]),
    ],
    ids=["sentencepiece", "clip", "rewritten", "two poolers"],
)
def test_open_clip_opens_what_is_written(tmp_path: pathlib.Path, kind: str, changes: dict[str, Any]) -> None:
    torch, open_clip = libraries()
    tokenizer = sentencepiece() if kind == "sentencepiece" else Tokenizer.clip()
    w = weights(tokenizer, changes, shared=changes is REWRITTEN["all"][0])
    ours.write(w, tmp_path / "out")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert type(model).__name__ == "CoCa"
    # Ids. open_clip mends texts before it encodes them, so that these are such as need no mending.
    their_tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    tokens = tokenizer.encode_batch(TEXTS, 40)
    np.testing.assert_array_equal(their_tokenizer(TEXTS).numpy(), tokens)
    # Pixels: the same resampling, bit for bit.
    preprocessor = Preprocessor.from_config(w.config.model.image.size, w.config.data)
    pictures = [picture(37, 61), picture(200, 90), picture(16, 16), picture(9, 12)]
    theirs = np.stack([transform(image).permute(1, 2, 0).numpy() for image in pictures])
    np.testing.assert_allclose(preprocessor(pictures), theirs, rtol=0, atol=1e-6)
    differences = compare(model, w, tokens, tiny.images(w.config.model, len(tokens)))
    assert max(differences.values()) < TOLERANCE, differences
    # Its own generation.
    images = torch.from_numpy(theirs[:2].transpose(0, 3, 1, 2).copy())
    ids = {"sot_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    for how in ({"generation_type": "top_p"}, {"generation_type": "beam_search", "num_beams": 6}):
        generated = model.generate(images, seq_len=12, **ids, **how)
        assert generated.shape[0] == 2 and 5 <= generated.shape[1] <= 12
        assert (generated[:, 0] == tokenizer.bos_id).all()
        assert ((generated >= 0) & (generated < tokenizer.vocab_size)).all()


def test_every_probe_has_the_same_ids_in_transformers(tmp_path: pathlib.Path) -> None:
    libraries()
    from transformers import AutoTokenizer

    tokenizer = sentencepiece()
    ours.write(weights(tokenizer), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for length in (5, 40, 200):
        found = theirs(list(PROBES), max_length=length, padding="max_length", truncation=True).input_ids
        for text, ids in zip(PROBES, found, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text, length), err_msg=repr(text))
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 2, 1)


@functools.cache
def made_by_open_clip(name: str = "") -> Any:
    """A CoCa that open_clip initialises, small or of a published name."""
    torch, open_clip = libraries()
    torch.manual_seed(0)
    if name:
        return open_clip.create_model(name)
    text = {"context_length": 12, "vocab_size": 61, "width": 64, "heads": 1, "layers": 2}
    model = open_clip.CoCa(
        embed_dim=64,
        vision_cfg={
            **{"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64},
            **{"attentional_pool": True, "attn_pooler_queries": 5, "output_tokens": True},
        },
        text_cfg=text | {"embed_cls": True, "output_tokens": True},
        multimodal_cfg=text,
        init_logit_bias=-10.0,
    )
    with torch.no_grad():  # it leaves parts as the memory was
        for key, parameter in model.named_parameters():
            if "text_projection" in key or "emb" in key:
                parameter.normal_(std=0.05)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint.pt", "bin"])
def test_what_open_clip_saves_is_read(tmp_path: pathlib.Path, form: str) -> None:
    torch, _ = libraries()
    model = made_by_open_clip()
    tensors = model.state_dict()
    file = tmp_path / f"weights.{form}"
    if form == "safetensors":
        safetensors.numpy.save_file({key: x.numpy() for key, x in tensors.items()}, file)
    elif form == "checkpoint.pt":  # as its training writes them
        wrapped = {f"module.{key}": x for key, x in tensors.items()}
        torch.save({"epoch": 3, "name": "a", "state_dict": wrapped, "optimizer": {"state": {}}}, file)
    else:
        torch.save(tensors, file)
    w = ours.read(file, tokenizer="none")  # without a configuration: told by the shapes
    rng = np.random.default_rng(0)
    tokens = np.where(np.arange(12)[None] < np.array([[12], [7], [4]]), rng.integers(1, 61, (3, 12)), 0)
    differences = compare(model, w, tokens.astype(np.int32), tiny.images(w.config.model, 3))
    assert max(differences.values()) < TOLERANCE, differences
    assert w.config.loss.contrastive == "sigmoid" and w.params["logit_bias"] == -10


def test_gradients_are_those_of_autograd(tmp_path: pathlib.Path) -> None:
    torch, open_clip = libraries()
    model = made_by_open_clip()
    safetensors.numpy.save_file({key: x.numpy() for key, x in model.state_dict().items()}, tmp_path / "a.safetensors")
    w = ours.read(tmp_path / "a.safetensors", tokenizer="none")
    rng = np.random.default_rng(1)
    tokens = np.where(np.arange(12)[None] < np.array([[12], [7], [4]]), rng.integers(1, 61, (3, 12)), 0)
    tokens = tokens.astype(np.int32)
    images = tiny.images(w.config.model, 3)
    output = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens).long())
    output.pop("logit_bias")
    loss = sum(open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**output))
    model.zero_grad()
    loss.backward()

    def ours_loss(params: Any) -> Any:
        def forward(m: CoCa) -> tuple[Any, Any]:
            return m(images, tokens), m.head()

        out, head = CoCa(w.config.model).apply({"params": params}, method=forward)
        return losses.total(out, head, jax.numpy.asarray(tokens), config.Loss(), pad_id=0)[0]

    value, gradients = jax.jit(jax.value_and_grad(ours_loss))(w.params)
    assert float(value) == pytest.approx(loss.item(), rel=TOLERANCE)
    found = ours.export_parameters(gradients, w.config.model)
    theirs = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    assert set(found) - set(theirs) == {"logit_bias"}  # in no softmax
    differences = {key: difference(found[key], x) for key, x in theirs.items()}
    assert {key: d for key, d in differences.items() if not d < TOLERANCE} == {}


def test_a_published_model_at_its_size(tmp_path: pathlib.Path) -> None:
    """coca_ViT-B-32, 253 million parameters that open_clip draws."""
    torch, open_clip = libraries()
    model = made_by_open_clip("coca_ViT-B-32")
    with torch.no_grad():
        model.text_decoder.text_projection.normal_(std=0.05)
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "open_clip_model.safetensors")
    by_name = ours.read(tmp_path, name="coca_ViT-B-32")
    by_shape = ours.read(tmp_path)
    assert by_name.config == by_shape.config
    assert by_name.tokenizer is not None and by_name.tokenizer.vocab_size == 49408
    tokens = by_name.tokenizer.encode_batch(TEXTS[:2], 76)
    np.testing.assert_array_equal(open_clip.get_tokenizer("coca_ViT-B-32")(TEXTS[:2]).numpy(), tokens)
    differences = compare(model, by_name, tokens, tiny.images(by_name.config.model, 2))
    assert max(differences.values()) < TOLERANCE, differences


class _Malicious:
    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_malicious_file_runs_nothing(tmp_path: pathlib.Path) -> None:
    torch, _ = libraries()
    made = tmp_path / "made"
    torch.save({"visual.proj": torch.zeros(3), "a": _Malicious(made)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="holds more than weights, which is not run"):
        ours.read(tmp_path / "a.pt")
    assert not made.exists()
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    with pytest.raises(ConversionError, match=r"b\.pt is damaged"):
        torch_files.read(tmp_path / "b.pt")
    torch.save([torch.zeros(3)], tmp_path / "c.pt")
    with pytest.raises(ConversionError, match="holds a list, not a state_dict"):
        torch_files.read(tmp_path / "c.pt")
    torch.save({"a": torch.zeros(3), "b": "text"}, tmp_path / "d.pt")
    with pytest.raises(ConversionError, match="no tensors:\n  b: str"):
        torch_files.read(tmp_path / "d.pt")
    torch.save({"a": torch.full((2,), 0.1, dtype=torch.bfloat16)}, tmp_path / "e.pt")
    assert torch_files.read(tmp_path / "e.pt")["a"].dtype == np.float32


def test_a_model_trained_on_in_open_clip_comes_back_as_its_own(tmp_path: pathlib.Path) -> None:
    torch, open_clip = libraries()
    w = weights(sentencepiece(), {"text__cross_mlp": False})
    ours.write(w, tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        model.text_decoder.resblocks[0].mlp.c_proj.bias.add_(1.0)
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "out" / "open_clip_model.safetensors")
    back = ours.read(tmp_path / "out")
    assert back.config.model.text.cross_mlp
    assert back.tokenizer is not None and back.tokenizer.to_bytes() == sentencepiece().to_bytes()
    tokens = sentencepiece().encode_batch(TEXTS, 40)
    differences = compare(model, back, tokens, tiny.images(back.config.model, len(TEXTS)))
    assert max(differences.values()) < TOLERANCE, differences
    flat = traverse_util.flatten_dict(back.params, sep="/")
    assert flat["text_decoder/multimodal/blocks/self_mlp/down/bias"][0].min() == 1
    assert "coca_jax" in json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
