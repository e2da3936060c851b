"""Parity with open_clip, whose own weights, outputs and gradients are recorded in the two files beside this one.

They come from open_clip_torch 3.3.0: a small CoCa whose pooler reads another width than it has (a), and one where both
are the same (b). `param.*` and `grad.*` carry open_clip's names; the configuration is in the metadata.

Everywhere here the difference of two arrays is `max |x - reference| / max |reference|`, one figure for a whole array,
and the bound is 1e-4 in float32.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import traverse_util

from coca_jax import config, losses
from coca_jax.interop import open_clip
from coca_jax.model.coca import CoCa, Output
from coca_jax.train import state

TOLERANCE = 1e-4


class Recorded(NamedTuple):
    config: dict[str, Any]  # open_clip's
    tensors: dict[str, np.ndarray]  # its state_dict
    gradients: dict[str, np.ndarray]  # of 1.0 * contrastive + 2.0 * captioning
    images: np.ndarray  # [b, y, x, 3]
    tokens: np.ndarray  # [b, t]
    outputs: dict[str, np.ndarray]


@functools.cache
def recorded(name: str) -> Recorded:
    with safetensors.safe_open(pathlib.Path(__file__).parent / f"open_clip_coca_{name}.safetensors", "numpy") as file:
        groups: dict[str, dict[str, np.ndarray]] = {"in": {}, "out": {}, "param": {}, "grad": {}}
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            group, rest = key.split(".", 1)
            groups[group][rest] = file.get_tensor(key)
        metadata = file.metadata()
    assert metadata["note"] == "CoCaLoss weights: caption 2.0, contrastive 1.0, pad_id 0; grads are of their sum"
    images = groups["in"]["image_nchw"].transpose(0, 2, 3, 1)
    return Recorded(
        json.loads(metadata["config"]), groups["param"], groups["grad"], images, groups["in"]["text"], groups["out"]
    )


class Ours(NamedTuple):
    output: Output
    text_tokens: jax.Array  # of the unimodal half, before any norm
    metrics: dict[str, Any]
    gradients: dict[str, Any]


@functools.cache
def ours(name: str) -> Ours:
    """The same from our model and our losses, compiled as one."""
    r = recorded(name)
    model = open_clip.model_config(r.config)
    # Chunks of 5 of the 12 positions: the loss as it is trained with.
    weights = config.Loss(lambda_con=1.0, lambda_cap=2.0, caption_chunk=5)

    def run(params: Any) -> Any:
        def forward(m: CoCa, images: Any, tokens: Any) -> tuple[Output, Any]:
            return m(images, tokens), m.head()

        (output, head), captured = CoCa(model).apply(
            {"params": params},
            r.images,
            r.tokens,
            method=forward,
            capture_intermediates=lambda module, method: method == "encode",
            mutable=["intermediates"],
        )
        ((text_tokens, _),) = captured["intermediates"]["text_decoder"]["encode"]
        loss, metrics = losses.total(output, head, jnp.asarray(r.tokens), weights, pad_id=model.text.pad_id)
        return loss, (output, text_tokens, metrics)

    params = open_clip.import_parameters(r.tensors, model)
    # Level 0 compiles in two thirds of the time and runs as quickly at this size.
    step = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
    (_, (output, text_tokens, metrics)), gradients = step(params)
    return Ours(output, text_tokens, metrics, gradients)


def difference(x: Any, reference: np.ndarray) -> float:
    x = np.asarray(x)
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def _replace(model: config.Model, group: str, **changes: Any) -> config.Model:
    return dataclasses.replace(model, **{group: dataclasses.replace(getattr(model, group), **changes)})


both = pytest.mark.parametrize("name", ["a", "b"])


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


@both
def test_outputs(name: str) -> None:
    r, o = recorded(name), ours(name)
    real = r.tokens != 0
    assert 0 < real.mean() < 1  # there is padding, whose outputs open_clip's versions disagree about
    assert difference(o.output.image_features, r.outputs["image_features"]) < TOLERANCE
    assert difference(o.output.text_features, r.outputs["text_features"]) < TOLERANCE
    assert difference(o.output.image_tokens, r.outputs["image_tokens"]) < TOLERANCE
    assert difference(np.asarray(o.text_tokens)[real], r.outputs["text_tokens"][real]) < TOLERANCE
    assert difference(np.asarray(o.output.logits)[real], r.outputs["logits"][real]) < TOLERANCE


@both
def test_losses(name: str) -> None:
    r = recorded(name)
    metrics = ours(name).metrics
    assert metrics["loss/contrastive"] == pytest.approx(r.outputs["contrastive_loss_weighted"].item(), rel=TOLERANCE)
    assert 2 * metrics["loss/captioning"] == pytest.approx(r.outputs["caption_loss_weighted"].item(), rel=TOLERANCE)


@both
def test_gradient_of_every_parameter(name: str) -> None:
    r = recorded(name)
    gradients = open_clip.export_parameters(ours(name).gradients, open_clip.model_config(r.config))
    assert gradients.keys() == r.gradients.keys() == r.tensors.keys()
    assert all(np.abs(g).max() > 0 for g in r.gradients.values())
    differences = {key: difference(gradients[key], r.gradients[key]) for key in gradients}
    assert {key: d for key, d in differences.items() if not d < TOLERANCE} == {}


# What the shapes of the parameters do not tell: with another choice there is no parity, so that the recorded numbers
# hold each of them.
@pytest.mark.parametrize(
    ("feature", "change"),
    [
        pytest.param("text", lambda m: dataclasses.replace(m, norm_eps=1e-3), id="norm_eps"),
        pytest.param("text", lambda m: dataclasses.replace(m, gelu="tanh"), id="gelu"),  # 2.5e-4 away
        pytest.param("text", lambda m: _replace(m, "text", cls_mask="full"), id="cls_mask"),
        pytest.param("text", lambda m: _replace(m, "text", heads=8), id="text.heads"),
        pytest.param("image", lambda m: _replace(m, "image", heads=6), id="image.heads"),
        pytest.param("image", lambda m: _replace(m, "pooler", heads=2), id="pooler.heads"),
    ],
)
def test_another_choice_gives_other_numbers(feature: str, change: Callable[[config.Model], config.Model]) -> None:
    r = recorded("a")
    model = open_clip.model_config(r.config)
    flat = traverse_util.flatten_dict(open_clip.import_parameters(r.tensors, model), sep="/")
    other = change(model)
    shapes = traverse_util.flatten_dict(state.abstract_parameters(config.Config(model=other)), sep="/")
    # Other heads are another cut of the same tensor.
    params = traverse_util.unflatten_dict({path: x.reshape(shapes[path].shape) for path, x in flat.items()}, sep="/")
    encode = functools.partial(CoCa(other).apply, method=f"encode_{feature}")
    output: Any = jax.jit(encode)({"params": params}, {"image": r.images, "text": r.tokens}[feature])
    key = f"{feature}_features"
    assert difference(getattr(output, key), r.outputs[key]) > TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# There and back


def _bits(arrays: dict[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    return {key: (x.shape, x.dtype, x.flags["C_CONTIGUOUS"], x.tobytes()) for key, x in arrays.items()}


@both
def test_round_trip_is_bit_exact(name: str) -> None:
    r = recorded(name)
    model = open_clip.model_config(r.config)
    params = open_clip.import_parameters(r.tensors, model)
    assert _bits(open_clip.export_parameters(params, model)) == _bits(r.tensors)
    # The other way, from parameters that never were open_clip's; -0.0, infinities and NaN keep their bits.
    leaves, tree = jax.tree.flatten(state.abstract_parameters(config.Config(model=model)))
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 2**32, leaf.shape, np.uint32) for leaf in leaves]
    drawn = jax.tree.unflatten(tree, [np.asarray(x).view(np.float32) for x in bits])
    back = open_clip.import_parameters(open_clip.export_parameters(drawn, model), model)
    flat = [traverse_util.flatten_dict(p, sep="/") for p in (back, drawn)]
    assert _bits(flat[0]) == _bits(flat[1])


@both
def test_every_parameter_is_filled(name: str) -> None:
    r = recorded(name)
    model = open_clip.model_config(r.config)
    params = open_clip.import_parameters(r.tensors, model)
    abstract = state.abstract_parameters(config.Config(model=model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


def test_pooler_weights_are_fused_exactly_where_the_widths_agree() -> None:
    pooler = "visual.attn_pool.attn."
    split = {f"{pooler}{x}_proj_weight" for x in "qkv"}
    a, b = (set(open_clip.tensor_shapes(open_clip.model_config(recorded(name).config))) for name in "ab")
    assert split <= a and f"{pooler}in_proj_weight" not in a
    assert not split & b and f"{pooler}in_proj_weight" in b


def test_half_precision_is_widened_exactly() -> None:
    r = recorded("b")
    model = open_clip.model_config(r.config)
    half = {key: x.astype(jnp.bfloat16) for key, x in r.tensors.items()}
    back = open_clip.export_parameters(open_clip.import_parameters(half, model), model)
    assert _bits(back) == _bits({key: x.astype(np.float32) for key, x in half.items()})


def test_export_takes_jax_arrays_and_can_be_saved(tmp_path: pathlib.Path) -> None:
    r = recorded("b")
    model = open_clip.model_config(r.config)
    params = jax.tree.map(jnp.asarray, open_clip.import_parameters(r.tensors, model))
    safetensors.numpy.save_file(open_clip.export_parameters(params, model), tmp_path / "open_clip_model.safetensors")
    assert _bits(safetensors.numpy.load_file(tmp_path / "open_clip_model.safetensors")) == _bits(r.tensors)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_import_lists_every_tensor_that_does_not_fit() -> None:
    r = recorded("a")
    tensors = dict(r.tensors)
    tensors["logit_bias"] = np.zeros((), np.float32)
    tensors["visual.transformer.resblocks.2.ln_1.weight"] = np.zeros(48, np.float32)
    del tensors["text.cls_emb"], tensors["text_decoder.cross_attn.1.attn.in_proj_bias"]
    tensors["visual.proj"] = tensors["visual.proj"][:, :31]
    tensors["logit_scale"] = tensors["logit_scale"][None]
    tensors["text.ln_final.bias"] = tensors["text.ln_final.bias"].astype(np.int32)
    tensors["text.ln_final.weight"] = tensors["text.ln_final.weight"].astype(np.float64)
    with pytest.raises(open_clip.ConversionError) as error:
        open_clip.import_parameters(tensors, open_clip.model_config(r.config))
    assert str(error.value).splitlines() == [
        "open_clip's tensors do not fit the model, in 8 places:",
        "  unknown: logit_bias ()",
        "  unknown: visual.transformer.resblocks.2.ln_1.weight (48,)",
        "  missing: text.cls_emb (32,)",
        "  missing: text_decoder.cross_attn.1.attn.in_proj_bias (96,)",
        "  misshapen: logit_scale (1,), wanted ()",
        "  misshapen: visual.proj (32, 31), wanted (32, 32)",
        "  dtype: text.ln_final.bias is int32: convert it to float32",
        "  dtype: text.ln_final.weight is float64: convert it to float32",
    ]


def test_export_lists_every_parameter_that_does_not_fit() -> None:
    r = recorded("b")
    model = open_clip.model_config(r.config)
    params = open_clip.import_parameters(r.tensors, model)
    del params["text_decoder"]["cls_norm"]
    params["image_projection"]["bias"] = np.zeros(32, np.float32)
    params["text_decoder"]["lm_head"]["kernel"] = np.zeros((32, 60), np.float32)
    with pytest.raises(open_clip.ConversionError) as error:
        open_clip.export_parameters(params, model)
    assert str(error.value).splitlines() == [
        "the parameters do not fit the model, in 4 places:",
        "  unknown: image_projection/bias (32,)",
        "  missing: text_decoder/cls_norm/bias (32,)",
        "  missing: text_decoder/cls_norm/scale (32,)",
        "  misshapen: text_decoder/lm_head/kernel (32, 60), wanted (32, 61)",
    ]


def test_export_lists_everything_that_open_clip_cannot_be() -> None:
    """The paper's model, and with it the rest of what can be chosen differently."""
    image = config.ImageEncoder(position="sincos")
    text = config.TextDecoder(position="sincos", tie_embeddings=True, width=384, heads=6, mlp_dim=1024, n_multi=0)
    model = config.Model(image=image, text=text)
    for convert in (open_clip.export_parameters, open_clip.import_parameters):
        with pytest.raises(open_clip.ConversionError) as error:
            convert({}, model)
        assert str(error.value).splitlines() == [
            "open_clip's CoCa cannot be this model:",
            "  config.model.norm_eps=1e-06: open_clip has 1e-05",
            "  config.model.gelu='tanh': open_clip has 'exact'",
            "  config.model.image.position='sincos': open_clip has 'learned'",
            "  config.model.image.class_token=False: open_clip has True",
            "  config.model.image.patch_bias=True: open_clip has False",
            "  config.model.pooler.kind='parallel': open_clip has 'single'",
            "  config.model.text.position='sincos': open_clip has 'learned'",
            "  config.model.text.tie_embeddings=True: open_clip has False",
            "  config.model.text.cross_mlp=False: open_clip has True",
            "  config.model.text.cross_kv_norm=False: open_clip has True",
            "  config.model.text.cls_mask='full': open_clip has 'legacy'",
            "  config.model.text.width=384: open_clip has that of embed_dim=768",
            "  config.model.text.mlp_dim=1024: open_clip's decoder has 4 * width=1536",
            "  config.model.text.n_multi=0: open_clip has a decoder of 1 layer or more",
        ]


@pytest.mark.parametrize("kind", ["parallel", "cascade"])
def test_two_poolers_are_refused(kind: str) -> None:
    model = _replace(open_clip.model_config(recorded("a").config), "pooler", kind=kind)
    with pytest.raises(open_clip.ConversionError, match=rf"pooler.kind='{kind}': open_clip has 'single'$"):
        open_clip.tensor_shapes(model)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    ("name", "image", "text", "total"),
    [("coca_ViT-B-32", 89.16, 63.43, 253.56), ("coca_ViT-L-14", 306.72, 123.65, 638.45)],
)
def test_published_sizes(name: str, image: float, text: float, total: float) -> None:
    """Millions of parameters, as open_clip counts them; nothing is allocated."""
    model = open_clip.model_config(name)
    shapes = open_clip.tensor_shapes(model)

    def millions(prefix: str) -> float:
        return round(sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix)) / 1e6, 2)

    assert (millions("visual."), millions("text."), millions("")) == (image, text, total)
    params = jax.tree.leaves(state.abstract_parameters(config.Config(model=model)))
    assert round(sum(math.prod(leaf.shape) for leaf in params) / 1e6, 2) == total


def test_published_shapes() -> None:
    model = open_clip.model_config("coca_ViT-B-32")
    shapes = open_clip.tensor_shapes(model)
    assert shapes["visual.conv1.weight"] == (768, 3, 32, 32)
    assert shapes["visual.positional_embedding"] == (50, 768)
    assert shapes["visual.attn_pool.attn.k_proj_weight"] == (512, 768)
    assert shapes["visual.attn_pool.attn.in_proj_bias"] == (1536,)
    assert shapes["text.positional_embedding"] == (77, 512)  # 76 tokens and [CLS]
    assert shapes["text_decoder.cross_attn.11.mlp.c_fc.weight"] == (2048, 512)
    assert shapes["text_decoder.text_projection"] == (512, 49408)
    assert (model.text.length, model.pooler.queries, model.dtype) == (76, 256, "float32")
    assert model.temperature == pytest.approx(0.07)
    large = open_clip.model_config("coca_ViT-L-14")
    assert (large.image.heads, large.text.heads, large.pooler.heads) == (16, 12, 8)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(open_clip.ConversionError, match=r"'coca_ViT-H' is not built in.*\n  coca_ViT-B-32\n.*L-14"):
        open_clip.model_config("coca_ViT-H")


@both
def test_a_configuration_is_compared_with_a_checkpoint(name: str) -> None:
    r = recorded(name)
    shapes = {key: x.shape for key, x in r.tensors.items()}
    model = open_clip.model_config(r.config, shapes)
    assert model == open_clip.model_config(r.config)
    assert open_clip.tensor_shapes(model) == shapes
    shapes["text.positional_embedding"] = (77, 32)
    with pytest.raises(open_clip.ConversionError) as error:
        open_clip.model_config(r.config, shapes)
    assert str(error.value).splitlines()[1:] == ["  misshapen: text.positional_embedding (77, 32), wanted (13, 32)"]


def test_a_configuration_that_asks_for_something_else_is_refused() -> None:
    given = copy.deepcopy(recorded("a").config)
    given["quick_gelu"] = True
    given["vision_cfg"] |= {"attentional_pool": "parallel", "image_size": [32, 16], "pool_type": "avg", "qk_norm": True}
    given["text_cfg"] |= {"embed_cls": False, "widht": 32, "vocab_size": "61", "ls_init_value": 1e-5}
    given["multimodal_cfg"] = None
    with pytest.raises(open_clip.ConversionError) as error:
        open_clip.model_config(given)
    assert str(error.value).splitlines() == [
        "this open_clip configuration cannot be converted:",
        "  quick_gelu=True: our model has no such thing, or open_clip does not",
        "  vision_cfg.image_size=[32, 16]: must be a whole number above 0",
        "  vision_cfg.attentional_pool='parallel': must be True",
        "  vision_cfg.pool_type='avg': our model has no such thing, or open_clip does not",
        "  vision_cfg.qk_norm=True: our model has no such thing, or open_clip does not",
        "  text_cfg.vocab_size='61': must be a whole number above 0",
        "  text_cfg.embed_cls=False: must be True",
        "  text_cfg.widht=32: our model has no such thing, or open_clip does not",
        "  text_cfg.ls_init_value=1e-05: our model has no such thing, or open_clip does not",
        "  multimodal_cfg=None: must be a group of keys",
    ]


def test_a_configuration_whose_halves_disagree_is_refused() -> None:
    given = copy.deepcopy(recorded("a").config)
    given["pad_id"] = 1
    given["vision_cfg"]["head_width"] = 13
    given["multimodal_cfg"] |= {"width": 48, "heads": 3, "context_length": 11}
    with pytest.raises(open_clip.ConversionError) as error:
        open_clip.model_config(given)
    assert str(error.value).splitlines()[1:] == [
        "  vision_cfg.head_width=13 does not divide width=48",
        "  multimodal_cfg.width=48: must be text_cfg.width=32",
        "  multimodal_cfg.heads=3: must be text_cfg.heads=2",
        "  multimodal_cfg.context_length=11: is less than text_cfg's",
        "  pad_id=1: must be text_cfg.pad_id=0",
    ]


def test_what_changes_nothing_is_accepted() -> None:
    given = copy.deepcopy(recorded("a").config)
    plain = open_clip.model_config(given)
    given |= {"custom_text": True, "quick_gelu": False, "init_logit_bias": None}
    given["vision_cfg"] |= {"pool_type": "tok", "patch_dropout": 0.1, "image_size": [32, 32], "norm_kwargs": None}
    given["text_cfg"] |= {"pool_type": "argmax", "proj_type": "linear", "qk_norm": False}
    given["multimodal_cfg"] |= {"attn_pooler_heads": 12, "dim_head": 64, "n_queries": 256, "mlp_ratio": 4}
    assert open_clip.model_config(given) == plain


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    given = copy.deepcopy(recorded("a").config)
    given["vision_cfg"]["attn_pooler_heads"] = 5
    with pytest.raises(config.ConfigError, match=r"pooler.heads=5 does not divide"):
        open_clip.model_config(given)
