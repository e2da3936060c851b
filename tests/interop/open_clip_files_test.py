"""What open_clip's files are read as: a directory, a file, its configuration, preprocessing and tokenizer."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coca_jax import config
from coca_jax.data.images import Preprocessor
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import open_clip, torch_files
from coca_jax.interop.weights import ConversionError, Weights
from tests import tiny
from tests.interop.open_clip_rewriting_test import BASE, bits, check_back, parameters

# Heads as shapes cannot tell them, so that they are taken to be the usual ones.
USUAL = tiny.replace(
    BASE,
    **{"embed_dim": 64, "image__width": 64, "image__heads": 1, "image__mlp_dim": 100, "image__depth": 1},
    **{"pooler__heads": 8, "text__width": 64, "text__heads": 1, "text__mlp_dim": 256, "text__n_uni": 3},
)


@functools.cache
def tensors(model: config.Model = USUAL) -> dict[str, np.ndarray]:
    return open_clip.export_parameters(parameters(model), model)


@functools.cache
def vocabulary() -> Tokenizer:
    return Tokenizer.train(["a red apple", "two cats", "the blue dog's house"] * 9, vocab_size=300)


def directory(folder: pathlib.Path, model: config.Model = USUAL, **sections: Any) -> pathlib.Path:
    """As another program would have written it."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors(model), folder / "open_clip_model.safetensors")
    values = {"model_cfg": open_clip.open_clip_config(model)} | sections
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return folder


def said(path: pathlib.Path, **arguments: Any) -> str:
    with pytest.raises(ConversionError) as error:
        open_clip.read(path, **arguments)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("name", open_clip.CONFIGS)
def test_published_models_are_known_by_their_shapes(name: str) -> None:
    shapes = open_clip.tensor_shapes(open_clip.model_config(name))
    assert open_clip.model_config(open_clip.inferred_config(shapes), shapes) == open_clip.model_config(name)


@pytest.mark.parametrize("changes", [{}, {"image__pre_norm": False, "logit_bias": -10.0}])
def test_shapes_tell_what_the_configuration_says(changes: dict[str, Any]) -> None:
    model = tiny.replace(USUAL, **changes)
    shapes = open_clip.tensor_shapes(model)
    told = open_clip.model_config(open_clip.inferred_config(shapes), shapes)
    assert told == open_clip.model_config(open_clip.open_clip_config(model), shapes)


def test_heads_that_shapes_cannot_tell() -> None:
    with pytest.raises(ConversionError) as error:
        open_clip.inferred_config(open_clip.tensor_shapes(tiny.replace(BASE, image__width=20, image__heads=2)))
    assert str(error.value).splitlines()[1:] == [
        "  vision_cfg.head_width: 20 is not divisible by 64",
        "  text_cfg.heads: 16 is not divisible by 64",
    ]
    with pytest.raises(ConversionError, match="not the weights of open_clip's CoCa"):
        open_clip.inferred_config({"visual.conv1.weight": (3, 3, 3, 3)})


@pytest.mark.parametrize("width", range(48, 64, 4))
@pytest.mark.parametrize("mlp_dim", [7, 50, 129, 1000])
def test_every_mlp_width_comes_back(width: int, mlp_dim: int) -> None:
    model = tiny.replace(USUAL, image__width=width, image__heads=4, image__mlp_dim=mlp_dim)
    assert open_clip.model_config(open_clip.open_clip_config(model)).image == model.image


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.5])
def test_every_temperature_comes_back(temperature: float) -> None:
    """open_clip keeps its logarithm, which is 0 or less from 1 on."""
    values = json.loads(json.dumps(open_clip.open_clip_config(tiny.replace(USUAL, temperature=temperature))))
    assert open_clip.model_config(values).temperature == pytest.approx(temperature, rel=1e-12)
    for wrong in (None, "1", True):
        with pytest.raises(ConversionError, match=f"init_logit_scale={wrong!r}: must be a number$"):
            open_clip.model_config(values | {"init_logit_scale": wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_directory_a_file_in_it_and_a_file_alone_are_the_same(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = directory(tmp_path / "a")
    w = open_clip.read(folder, tokenizer="none")
    assert not caplog.records
    assert w.tokenizer is None and w.step == 0
    assert w.config.loss.lambda_con == 1 and w.config.loss.lambda_cap == 2 and w.config.loss.contrastive == "softmax"
    np.testing.assert_array_equal(w.params["image_projection"]["kernel"], tensors()["visual.proj"])
    assert bits(open_clip.read(folder / "open_clip_model.safetensors", tokenizer="none")) == bits(w)
    alone = tmp_path / "b.safetensors"
    wrapped = {f"module.{name}": x for name, x in tensors().items()}
    safetensors.numpy.save_file(wrapped, alone)
    told = open_clip.read(alone, tokenizer="none")
    assert bits(told) == bits(w)
    assert told.config.model == w.config.model
    assert "heads: config.model.image.heads=1, pooler.heads=8 and text.heads=1 are taken" in caplog.text


def test_files_that_are_missing_or_damaged(tmp_path: pathlib.Path) -> None:
    assert "holds no weights that are known (there are: no files)" in said(tmp_path)
    for number in range(30):  # a folder of pictures, say: not all of its names
        (tmp_path / f"{number:02}.png").touch()
    assert "07.png, 08.png, 09.png and 20 more)" in said(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "holds weights in several files (model.safetensors.index.json)" in said(tmp_path)
    folder = directory(tmp_path / "a")
    assert "says what the model is: leave it out" in said(folder, name="coca_ViT-B-32")
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut off or no safetensors" in said(folder)
    (folder / "open_clip_config.json").write_text('{"model_cfg": ')
    assert "open_clip_config.json is damaged" in said(folder)
    (folder / "open_clip_config.json").write_text("{}")
    assert "has no model_cfg" in said(folder)
    (tmp_path / "vit.npz").write_bytes(b"")
    assert "weights are read from .safetensors, .pt" in said(tmp_path / "vit.npz")
    model = tiny.replace(USUAL, text__n_uni=2)
    directory(folder, model)
    safetensors.numpy.save_file(tensors(), file)
    message = said(folder)
    assert str(file) in message and "unknown: text.transformer.resblocks.2.ln_1.bias (64,)" in message


def test_pytorch_is_asked_for_only_where_it_is_needed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r'pip install "coca_jax\[torch\]"'):
        torch_files.read(tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"b\.pt: no such file"):
        torch_files.read(tmp_path / "b.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing


def test_preprocessing_comes_with_the_weights(tmp_path: pathlib.Path) -> None:
    data = open_clip.read(directory(tmp_path / "a"), tokenizer="none").config.data
    assert data.mean == (0.48145466, 0.4578275, 0.40821073) and data.std == (0.26862954, 0.26130258, 0.27577711)
    assert (data.interpolation, data.eval_crop) == ("pillow-bicubic", 1.0)
    given = {"size": [16, 16], "mean": [0.5, 0.4, 0.3], "std": 0.5, "interpolation": "bilinear", "fill_color": 7}
    data = open_clip.read(directory(tmp_path / "a", preprocess_cfg=given), tokenizer="none").config.data
    wanted = Preprocessor(16, (0.5, 0.4, 0.3), (0.5, 0.5, 0.5), interpolation="pillow-bilinear")
    assert Preprocessor.from_config(16, data) == wanted


def test_other_preprocessing_is_refused(tmp_path: pathlib.Path) -> None:
    given = {"size": 32, "mean": [0.5], "interpolation": "random", "resize_mode": "squash", "mode": "L", "crop": 0.9}
    assert said(directory(tmp_path / "a", preprocess_cfg=given)).splitlines()[1:] == [
        "  size=32: the model is for 16",
        "  mean=[0.5]: must be three numbers",
        "  interpolation='random': there is bicubic and bilinear here",
        "  resize_mode='squash': there is shortest here",
        "  mode='L': there is RGB here",
        "  crop=0.9: is not known",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def with_tokenizer(folder: pathlib.Path) -> Weights:
    model = tiny.replace(BASE, text__vocab_size=vocabulary().vocab_size, text__pad_id=vocabulary().pad_id)
    w = Weights(config.Config(model=model), parameters(model), vocabulary())
    open_clip.write(w, folder)
    return w


def test_a_sentencepiece_tokenizer_comes_back(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "out"
    w = with_tokenizer(folder)
    back = open_clip.read(folder)
    check_back(back, w)
    assert back.tokenizer is not None and back.tokenizer.to_bytes() == vocabulary().to_bytes()
    with pytest.raises(ConversionError, match="is not empty"):
        open_clip.write(w, folder)
    (folder / "other").write_text("")
    open_clip.write(w, folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == [
        *("open_clip_config.json", "open_clip_model.safetensors", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    ]
    (folder / "tokenizer.model").write_bytes(Tokenizer.train(["other words"] * 3, vocab_size=270).to_bytes())
    assert "is not the tokenizer that was exported" in said(folder)
    (folder / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in said(folder)


def test_the_tokenizer_json_of_an_exported_directory_is_taken_by_itself(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "out"
    with_tokenizer(folder)
    values = json.loads((folder / "open_clip_config.json").read_text())
    section = values.pop("coca_jax")
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    back = open_clip.read(folder)
    assert back.tokenizer is not None and back.tokenizer.file_name == "tokenizer.json"
    text = "two red cats 😀"
    np.testing.assert_array_equal(back.tokenizer.encode(text, 40), vocabulary().encode(text, 40))
    # It travels again, as it is.
    open_clip.write(back, tmp_path / "again")
    again = open_clip.read(tmp_path / "again")
    assert again.tokenizer is not None and again.tokenizer.to_bytes() == back.tokenizer.to_bytes()
    # One that frames texts otherwise is not what the model was trained with.
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"] = None
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert "does not frame texts by bos and eos" in said(folder)
    (folder / "tokenizer.json").unlink()
    assert f"the tokenizer is {folder.name!r} of Hugging Face, and there is no tokenizer.json" in said(folder)
    assert open_clip.read(folder, tokenizer="none").tokenizer is None
    given = open_clip.read(folder, tokenizer=folder / "tokenizer.model").tokenizer
    assert given is not None and given.to_bytes() == vocabulary().to_bytes()
    (folder / "tokenizer.json").write_text(whole)
    values["coca_jax"] = section | {"format_version": 99}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    assert "section coca_jax is not of version 1" in said(folder)


def test_clips_vocabulary_needs_no_file(tmp_path: pathlib.Path) -> None:
    model = tiny.replace(USUAL, text__vocab_size=49408)
    folder = directory(tmp_path / "a", model)
    (folder / "tokenizer.json").write_text("open_clip does not look at it")
    read = open_clip.read(folder)
    assert read.tokenizer is not None and read.tokenizer.file_name == "bpe_simple_vocab_16e6.txt.gz"
    open_clip.write(read, tmp_path / "b")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        *("open_clip_config.json", "open_clip_model.safetensors"),
    ]
    back = open_clip.read(tmp_path / "b")
    check_back(back, read)
    assert back.tokenizer is not None and back.tokenizer.to_bytes() == read.tokenizer.to_bytes()


def test_tokenizers_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    folder = directory(tmp_path / "a")
    assert "40 pieces, which is not CLIP's vocabulary, and no tokenizer came with it" in said(folder)
    vocabulary().save(tmp_path / "v.model")
    assert "its tokenizer does not fit the model: config.model.text.vocab_size=40 is too small" in said(
        folder, tokenizer=tmp_path / "v.model"
    )
    large = directory(tmp_path / "b", tiny.replace(USUAL, text__vocab_size=2048))
    assert "the model has 2048 pieces, the tokenizer 2" in said(large, tokenizer=tmp_path / "v.model")
    values = open_clip.open_clip_config(USUAL)
    values["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    assert "text_cfg asks for texts to be treated in a way that is not here" in said(folder)


def test_what_was_rewritten_must_be_there(tmp_path: pathlib.Path) -> None:
    model = tiny.replace(BASE, text__tie_embeddings=True)
    w = Weights(config.Config(model=model), parameters(model), None)
    open_clip.write(w, tmp_path / "out")
    check_back(open_clip.read(tmp_path / "out"), w)
    # The head is a copy, so that nothing had to be kept.
    assert not (tmp_path / "out" / "coca_jax_replaced.safetensors").exists()
    model = tiny.replace(BASE, norm_eps=1e-6)
    w = Weights(config.Config(model=model), parameters(model), None)
    open_clip.write(w, tmp_path / "out", overwrite=True)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    file = tmp_path / "copy" / "coca_jax_replaced.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "coca_jax_replaced.safetensors is missing or damaged" in said(tmp_path / "copy")
    file.unlink()
    assert "coca_jax_replaced.safetensors is missing or damaged" in said(tmp_path / "copy")
