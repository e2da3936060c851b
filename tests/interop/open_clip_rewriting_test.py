"""Models that open_clip's CoCa is not, written as one that it is: the same numbers, and back to the last bit."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop import open_clip
from coca_jax.interop.weights import ConversionError, Weights
from coca_jax.model.coca import CoCa
from tests import tiny

# open_clip's architecture but for sizes.
BASE = tiny.replace(
    tiny.MODEL,
    **{"norm_eps": 1e-5, "gelu": "exact", "embed_dim": 16, "image__class_token": True, "image__patch_bias": False},
    **{"image__pre_norm": True, "pooler__kind": "single", "text__mlp_dim": 64, "text__cross_mlp": True},
    **{"text__cross_kv_norm": True, "text__cls_mask": "legacy"},
)
# float32's rounding through some ten layers; a rewriting that only moves or pads values gives the very same numbers up
# to the order in which sums are taken. Undoing a LayerNorm takes differences of what nearly cancels.
ROUNDING, UNDONE = 1e-5, 1e-4

EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "as open_clip": {},
    "no norm in front": {"image__pre_norm": False},
    "image MLP": {"image__mlp_dim": 37},
    "heads": {"image__heads": 4, "text__heads": 4, "pooler__heads": 1},
    "padding": {"text__pad_id": 3},
    "sigmoid": {"logit_bias": -10.0},
}
REWRITTEN: dict[str, tuple[dict[str, Any], float]] = {
    "moved or filled up": (
        {
            **{"text__cross_mlp": False, "image__position": "sincos", "text__position": "sincos"},
            **{"text__tie_embeddings": True, "text__mlp_dim": 24, "embed_dim": 8, "pooler__kind": "parallel"},
        },
        ROUNDING,
    ),
    "patch bias and a small epsilon": ({"image__patch_bias": True, "norm_eps": 1e-6}, ROUNDING),
    "a large epsilon, no norm in front": ({"norm_eps": 1e-2, "image__pre_norm": False}, ROUNDING),
    "no norm of keys": ({"text__cross_kv_norm": False}, UNDONE),
    "all": (
        {
            **{"text__cross_mlp": False, "image__position": "sincos", "text__position": "sincos", "norm_eps": 1e-6},
            **{"text__tie_embeddings": True, "image__patch_bias": True, "text__mlp_dim": 24, "embed_dim": 8},
            **{"pooler__kind": "parallel", "text__cross_kv_norm": False, "image__pre_norm": False},
        },
        UNDONE,
    ),
}


# Two poolers that share nothing, as in the paper.
TWO_POOLERS: dict[str, dict[str, Any]] = {
    "two poolers": {"pooler__kind": "parallel", "text__cross_kv_norm": False},
    "two poolers and all else": {
        **{"pooler__kind": "parallel", "text__cross_kv_norm": False, "image__pre_norm": False, "norm_eps": 1e-6},
        **{"image__patch_bias": True, "image__position": "sincos", "text__position": "sincos", "embed_dim": 8},
        **{"text__cross_mlp": False, "text__tie_embeddings": True, "text__mlp_dim": 24},
    },
}


def parameters(model: config.Model, shared: bool = True) -> Any:
    """Random, with norms around one; two poolers share all but their queries, or nothing."""
    params = tiny.parameters(model)
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {path: np.float32(1) + x if path.endswith("/scale") else x for path, x in flat.items()}
    for path in flat:
        if shared and path.startswith("contrastive_pooler/") and not path.endswith("query_tokens"):
            flat[path] = flat[path.replace("contrastive", "generative")].copy()
    return traverse_util.unflatten_dict(flat, sep="/")


def weights(changes: dict[str, Any], tokenizer: Tokenizer | None = None, step: int = 7, shared: bool = True) -> Weights:
    model = tiny.replace(BASE, **changes)
    loss = config.Loss(contrastive="sigmoid" if model.logit_bias else "softmax")
    data = config.Data(mean=(0.1, 0.2, 0.3), background=(1, 2, 3), interpolation="pillow-bilinear")
    return Weights(config.Config(model=model, loss=loss, data=data), parameters(model, shared), tokenizer, step)


@functools.cache  # most are rewritten as one architecture
def forward(model: config.Model) -> Any:
    return jax.jit(CoCa(model).apply)


def outputs(w: Weights) -> dict[str, np.ndarray]:
    """Features, temperature and logits; padding is in the text."""
    model = w.config.model
    tokens = tiny.tokens(tiny.replace(BASE, text__pad_id=model.text.pad_id), [9, 6, 3])
    output = forward(dataclasses.replace(model, temperature=0.07))({"params": w.params}, tiny.images(BASE, 3), tokens)
    real = tokens != model.text.pad_id
    values = {"image": output.image_features, "text": output.text_features, "scale": output.logit_scale}
    values |= {} if output.logit_bias is None else {"bias": output.logit_bias}
    return {key: np.asarray(x) for key, x in values.items()} | {"logits": np.asarray(output.logits)[real]}


def bits(w: Weights) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(w.params, sep="/")
    return {path: (np.shape(x), np.asarray(x).dtype.name, np.asarray(x).tobytes()) for path, x in flat.items()}


def travelled(w: Weights, folder: pathlib.Path) -> tuple[Weights, Weights]:
    """Written and read: as it was, and as open_clip sees it."""
    open_clip.write(w, folder)
    back = open_clip.read(folder)
    file = folder / "open_clip_config.json"
    values = json.loads(file.read_text())
    del values["coca_jax"]
    file.write_text(json.dumps(values))
    return back, open_clip.read(folder, tokenizer="none")


def check_back(back: Weights, w: Weights) -> None:
    assert bits(back) == bits(w)
    assert back.config.model == w.config.model
    for key in ("mean", "std", "background", "interpolation", "eval_crop"):
        assert getattr(back.config.data, key) == getattr(w.config.data, key)
    assert back.config.loss == w.config.loss
    assert back.step == w.step


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_what_the_configuration_can_say(tmp_path: pathlib.Path, name: str) -> None:
    w = weights(EXPRESSIBLE[name])
    back, theirs = travelled(w, tmp_path / "out")
    check_back(back, w)
    # Nothing was rewritten: it is the same model without our section, but for what decides no number.
    assert not (tmp_path / "out" / "coca_jax_replaced.safetensors").exists()
    assert theirs.config.model == dataclasses.replace(w.config.model, temperature=theirs.config.model.temperature)
    assert theirs.config.model.temperature == pytest.approx(0.07)
    assert bits(theirs) == bits(w)
    assert theirs.config.data.mean == w.config.data.mean and theirs.config.data.interpolation == "pillow-bilinear"
    assert {status for _, status, _ in open_clip.explain(w.config.model)} == {"expressible"}


@pytest.mark.parametrize("name", [*REWRITTEN, *TWO_POOLERS])
def test_a_rewritten_model_computes_the_same_and_comes_back(tmp_path: pathlib.Path, name: str) -> None:
    changes, tolerance = REWRITTEN[name] if name in REWRITTEN else (TWO_POOLERS[name], ROUNDING)
    w = weights(changes, shared=name in REWRITTEN)
    back, theirs = travelled(w, tmp_path / "out")
    check_back(back, w)
    assert theirs.config.model != w.config.model
    assert theirs.config.model.text.width == w.config.model.text.width * (1 if name in REWRITTEN else 2)
    found, wanted = outputs(theirs), outputs(w)
    size = w.config.model.embed_dim
    for key in ("image", "text"):  # what is behind is zero
        np.testing.assert_array_equal(found[key][:, size:], 0)
        found[key] = found[key][:, :size]
    differences = {key: float(np.abs(found[key] - x).max() / np.abs(x).max()) for key, x in wanted.items()}
    assert max(differences.values()) < tolerance, differences
    assert "rewritten" in {status for _, status, _ in open_clip.explain(w.config.model)}


def test_bfloat16_comes_back(tmp_path: pathlib.Path) -> None:
    changes = {"text__tie_embeddings": True, "norm_eps": 1e-6, "param_dtype": "bfloat16", "dtype": "bfloat16"}
    w = weights(changes)
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), w.params)
    half["logit_scale"] = w.params["logit_scale"]
    w = dataclasses.replace(w, params=half)
    back, theirs = travelled(w, tmp_path / "out")
    check_back(back, w)
    assert {np.asarray(x).dtype.name for x in jax.tree.leaves(theirs.params)} == {"float32"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooler__kind": "cascade"}, "config.model.pooler.kind='cascade': its one pooler reads the image"),
        ({"image__class_token": False}, "config.model.image.class_token=False: its class token takes part"),
        ({"gelu": "tanh"}, "config.model.gelu='tanh': its decoder's activation cannot be chosen"),
        ({"text__cls_mask": "full"}, "config.model.text.cls_mask='full': no key of its configuration reaches"),
        ({"text__mlp_dim": 65}, "config.model.text.mlp_dim=65: its decoder's MLP is 4 * width"),
        ({"embed_dim": 17}, "config.model.embed_dim=17: its pooler and projection are as wide as embed_dim"),
    ],
)
def test_what_is_refused(tmp_path: pathlib.Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError) as error:
        open_clip.write(weights(changes), tmp_path / "out")
    assert str(error.value).splitlines()[0] == "open_clip's CoCa cannot be this model:"
    assert [line.strip().startswith(said) for line in str(error.value).splitlines()[1:]] == [True]
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_refused_is_said_at_once(tmp_path: pathlib.Path) -> None:
    """The model that a recipe has by default."""
    with pytest.raises(ConversionError) as error:
        open_clip.write(
            weights({"image__class_token": False, "gelu": "tanh", "text__cls_mask": "full"}), tmp_path / "o"
        )
    assert len(str(error.value).splitlines()) == 4


def test_what_the_values_decide_is_refused(tmp_path: pathlib.Path) -> None:
    w = weights({"pooler__kind": "parallel"})
    w.params["contrastive_pooler"]["attention"]["value"]["bias"][0, 0] += 1
    with pytest.raises(ConversionError, match="contrastive_pooler/attention/value/bias for one"):
        open_clip.write(w, tmp_path / "out")
    w = weights({"text__cross_kv_norm": False})
    w.params["generative_pooler"]["out_norm"]["scale"][:] = np.where(np.arange(16) % 2, 1, -1.01)
    with pytest.raises(ConversionError, match=r"cross_kv_norm=False.*has values near 0, or of both signs"):
        open_clip.write(w, tmp_path / "out")


def test_missing_halves_and_other_pictures_are_refused(tmp_path: pathlib.Path) -> None:
    w = weights({})
    c = tiny.replace(w.config, loss__lambda_con=0.0, data__eval_crop=0.875, model__gelu="tanh")
    with pytest.raises(ConversionError) as error:
        open_clip.write(dataclasses.replace(w, config=c), tmp_path / "out")
    assert str(error.value).splitlines()[1:] == [
        "  config.loss.lambda_con=0.0: the model has no contrastive half, and open_clip's CoCa has both",
        "  config.data.eval_crop=0.875: open_clip's preprocessing keeps the whole square",
        *(f"  {reason}" for reason in open_clip.rewriting.refused(c.model)),
    ]
    assert "config.model.gelu='tanh'" in str(error.value)
    del w.params["logit_scale"]
    with pytest.raises(ConversionError, match=r"in 1 places:\n  missing: logit_scale"):
        open_clip.write(w, tmp_path / "out")


def test_weights_that_were_trained_on_are_taken_as_they_are(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    import safetensors.numpy

    w = weights({"text__tie_embeddings": True})
    open_clip.write(w, tmp_path / "out")
    file = tmp_path / "out" / "open_clip_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    # The same values in another order and with other metadata are the same weights.
    safetensors.numpy.save_file(dict(reversed(tensors.items())), file, {"format": "np"})
    check_back(open_clip.read(tmp_path / "out"), w)
    tensors["text_decoder.text_projection"][0, 0] += 1
    safetensors.numpy.save_file(tensors, file)
    with caplog.at_level("INFO"):
        read = open_clip.read(tmp_path / "out", tokenizer="none")
    assert not read.config.model.text.tie_embeddings
    assert "are not those that were exported" in caplog.text
    np.testing.assert_array_equal(
        read.params["text_decoder"]["lm_head"]["kernel"], tensors["text_decoder.text_projection"]
    )
