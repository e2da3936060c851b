"""Configuration: an editable ConfigDict at the edge, frozen dataclasses inside.

The dataclasses below are the single list of what can be configured: each field is a key, its default and its comment. A
recipe in `configs/` starts from `default()` and changes what it means to change; the command line changes more
(`--config.optimizer.peak_lr=1e-3`); `from_config_dict` freezes the result and `check` refuses what cannot run, in one
line that names the key, the value and what would work.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, its value and what would work."""


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """The vision transformer: image `[b, size, size, 3]` -> patch tokens `[b, n, width]`, n = (size / patch)^2."""

    size: int = 288  # side of the square input, pixels
    patch: int = 18  # side of a patch, pixels; must divide size
    width: int = 768
    depth: int = 12  # layers
    heads: int = 12  # must divide width
    mlp_dim: int = 3072
    position: str = "learned"  # learned | sincos (fixed, two-dimensional)
    class_token: bool = False  # prepend a learned token (open_clip)
    patch_bias: bool = True  # bias of the patch embedding (open_clip: False)
    pre_norm: bool = False  # LayerNorm after the position embedding (open_clip: True)
    remat: str = "none"  # what the backward pass computes again: see REMAT
    scan_unroll: int = 1  # layers a scan step holds; 0 unrolls the whole stack


@dataclasses.dataclass(frozen=True)
class Pooler:
    """Attentional poolers: learned queries over the patch tokens (paper, section 3.2)."""

    kind: str = "parallel"  # parallel | cascade | single (one pooler, query 0 is the contrastive one: open_clip)
    queries: int = 256  # of the generative pooler; with kind=single the contrastive query is one of them
    heads: int = 12  # must divide text.width, which is the width of the pooled tokens
    remat: str = "none"  # of its attention: see REMAT


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """The decoupled text decoder: n_uni causal layers, then n_multi layers that also read the image."""

    vocab_size: int = 64_000
    length: int = 64  # tokens of a caption, bos and eos included; [CLS] comes on top
    width: int = 768
    heads: int = 12  # must divide width
    mlp_dim: int = 3072
    n_uni: int = 12  # at least 1
    n_multi: int = 12  # 0 or more
    position: str = "learned"  # learned | sincos (fixed)
    pad_id: int = 0  # never a real token
    tie_embeddings: bool = False  # the output softmax is the transposed token embedding
    cross_mlp: bool = False  # a second MLP: self-attention, MLP, cross-attention, MLP (open_clip)
    cross_kv_norm: bool = False  # LayerNorm on the image tokens in every layer (open_clip)
    cls_mask: str = "full"  # full: [CLS] attends to real tokens and itself | legacy: open_clip's shifted mask
    remat: str = "none"  # of both halves: see REMAT
    scan_unroll: int = 1


@dataclasses.dataclass(frozen=True)
class Model:
    embed_dim: int = 768  # of the shared contrastive space
    image: ImageEncoder = ImageEncoder()
    pooler: Pooler = Pooler()
    text: TextDecoder = TextDecoder()
    norm_eps: float = 1e-6  # open_clip: 1e-5
    gelu: str = "tanh"  # tanh | exact (open_clip)
    attention: str = "xla"  # xla | cudnn (NVIDIA GPU, bfloat16) | flash (TPU); decoding with a cache is xla always
    temperature: float = 0.07  # initial; learned, logit scale clamped to [0, ln 100] (SigLIP: 0.1)
    logit_bias: float = 0.0  # initial; learned, for loss.contrastive=sigmoid (SigLIP: -10); 0: there is none
    dtype: str = "bfloat16"  # of the computation; temperature, logits and losses are float32 always
    # bfloat16: stored rounded to 8 bits. Steps of less than 1/512 of a value are lost (small learning rates, the end of
    # a schedule): where memory leaves no choice. Second moments, moving average and logit scale stay float32.
    param_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Loss:
    """lambda_con * contrastive + lambda_cap * captioning (paper, equation 4). A weight of 0 removes that half."""

    lambda_con: float = 1.0
    lambda_cap: float = 2.0
    contrastive: str = "softmax"  # softmax | sigmoid (SigLIP; set model.logit_bias and model.temperature too)
    contrastive_tile: int = 4096  # rows and columns of the similarities held at a time; 0: all at once
    caption_chunk: int = 1024  # tokens of a device whose logits are held at a time; 0: all at once


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = "adafactor"  # adafactor | adamw | muon
    peak_lr: float = 8e-4
    schedule: str = "linear"  # linear | cosine | constant | rsqrt, after the warm-up
    warmup: float = 0.02  # share of the steps
    end_lr: float = 0.0  # where linear and cosine end, as a share of peak_lr
    b1: float = 0.9  # momentum
    b2: float = 0.999  # second-moment decay (Adafactor: the cap of 1 - t^-0.8)
    eps: float = 1e-8  # in the denominators of AdamW and Muon; Adafactor adds 1e-30 to squares instead
    weight_decay: float = 0.01  # decoupled, times the learning rate
    decay_mask: str = r".*/(kernel|embedding)$"  # parameters (by path) that decay
    clip_norm: float = 1.0  # global gradient norm; 0: off
    freeze: tuple[str, ...] = ()  # patterns of parameter paths that never change
    ema_decay: float = 0.0  # moving average of the parameters, used by evaluation; 0: off
    state_dtype: str = "float32"  # float32 | bfloat16: what momentum is stored in; second moments are float32 always


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices of each axis; -1: the rest. The batch is split over replica x fsdp.

    A job of several slices (TPU slices, or nodes of GPUs) has a fast network inside each and a slower one, DCN, between
    them. With dcn_replica or dcn_fsdp the other three keys are sizes inside a slice, and an axis is as long as the
    product of both: 2 slices of 256 chips with dcn_replica=2, fsdp=-1 are replica=2 x fsdp=256.
    """

    replica: int = 1  # whole copies of the model
    fsdp: int = -1  # parameters and optimiser state sharded; where replica is -1, over so many devices at most
    tensor: int = 1  # heads, MLP and vocabulary sharded; always inside a slice
    dcn_replica: int = 1  # slices along replica: one exchange of gradients a step; -1: the rest
    dcn_fsdp: int = 1  # slices along fsdp: parameters, too, are gathered from slice to slice; -1: the rest


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources are written `kind:location`, e.g. `emoji:train` or `array_record:/data/laion-*.array_record`."""

    train: str = ""
    tokenizer: str = ""  # SentencePiece model file; empty: the one that the training source brings
    crop_area: tuple[float, float] = (0.5, 1.0)  # random-resized crop: share of the area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # and aspect ratio
    flip: bool = False  # off: captions name sides
    eval_crop: float = 1.0  # evaluation: share of the shorter side that the middle square keeps
    color_jitter: float = 0.0  # brightness, contrast, saturation: up to this share
    hue_jitter: float = 0.0  # hue, share of the colour circle
    grayscale: float = 0.0  # probability
    rotate: float = 0.0  # degrees, up to
    blur: float = 0.0  # probability of a small Gaussian blur
    background: tuple[int, int, int] = (255, 255, 255)  # under transparent pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    workers: int = 0  # processes; 0: threads only, the faster choice up to about 50 cores
    threads: int = 0  # that read and decode; 0: twice the cores, at most 16
    prefetch: int = 2  # batches placed on the mesh ahead of the step


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: int = 0  # steps; 0: only at the end
    splits: tuple[str, ...] = ()  # sources for retrieval and captioning loss
    zero_shot: str = ""  # labelled source
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # averaged per class
    reference_style: str = ""  # of the training pictures that the pixel baseline looks names up in; empty: all
    captions: int = 32  # pictures of the first split that are captioned
    batch_size: int = 256
    best: str = ""  # metric that keep-best goes by, e.g. seen/image_to_text/r1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 1000  # steps; one is always written at the end
    keep: int = 3  # newest
    keep_best: int = 1  # and the best by evaluate.best


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 500_000
    batch_size: int = 65_536  # global
    microbatches: int = 1  # parts of the batch computed after one another: less memory, the same gradients; 1: off
    log_every: int = 50  # steps between lines in metrics.jsonl and TensorBoard
    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()


# ---------------------------------------------------------------------------------------------------------------------
# ConfigDict <-> dataclass


def default() -> ml_collections.ConfigDict:
    """Every key with its default, as a locked ConfigDict: where a recipe starts."""
    return config_dict.ConfigDict(dataclasses.asdict(Config())).lock()


def from_config_dict(config: Mapping[str, Any]) -> Config:
    """Freezes a ConfigDict (or a plain nested mapping, as read from JSON).

    Missing keys take their defaults. Raises ConfigError for an unknown key, naming its neighbours, and for a value of
    the wrong type.
    """
    return _freeze(Config, config.to_dict() if isinstance(config, config_dict.ConfigDict) else config, "")


def to_json(config: Config) -> str:
    """The whole configuration as JSON; `from_config_dict(json.loads(...))` gives it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def check_key(path: str) -> None:
    """Raises ConfigError, naming its neighbours, where a dotted path such as `model.image.width` is not a key."""
    group: Any = Config
    done = ""
    for name in path.split("."):
        hints = typing.get_type_hints(group) if dataclasses.is_dataclass(group) else {}
        if not hints:
            raise ConfigError(f"config.{path} is not a key: config.{done.rstrip('.')} holds a value, not keys")
        _known(name, hints, done)
        group, done = hints[name], f"{done}{name}."


def _known(key: str, hints: Mapping[str, Any], path: str) -> None:
    if key not in hints:
        near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.4) or sorted(hints)
        raise ConfigError(f"config.{path}{key} is not a key; near it: {', '.join(f'config.{path}{k}' for k in near)}")


def _freeze(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{path.rstrip('.')}={values!r} is not a group of keys")
    hints = typing.get_type_hints(cls)
    for key in values:
        _known(key, hints, path)
    return cls(**{key: _coerce(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _freeze(typing.cast(type, hint), value, path + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = typing.get_args(hint)
        if isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                return tuple(_coerce(items[0], v, path) for v in value)
            if len(value) == len(items):
                return tuple(_coerce(t, v, path) for t, v in zip(items, value, strict=True))
        wanted = str(hint).removeprefix("typing.")
        raise ConfigError(f"config.{path}={value!r} is not a {wanted}")
    assert not isinstance(hint, types.UnionType), f"config.{path}: unions are not supported"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config.{path}={value!r} is a {type(value).__name__}, not a {hint.__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What can run

# What a layer's backward pass computes again instead of keeping it, from most memory and least computation to the
# opposite. Sizes are those of a layer's tokens [b, s, width] with an MLP four times as wide; m are the keys.
REMAT = {
    "none": "kept: everything; computed again: nothing",
    "attention": "kept: all but the attention weights [b, heads, s, m]; computed again: those",
    "dots": "kept: products with parameters (8 x tokens); computed again: norms, activations, attention",
    "qkv": "kept: queries, keys, values and what a sublayer adds (4 x tokens); computed again: also the MLP",
    "outputs": "kept: what a sublayer adds (1 x tokens); computed again: also queries, keys and values",
    "everything": "kept: the layer's input; computed again: all of the layer that its gradient needs",
}

_CHOICES = {
    "model.image.position": ("learned", "sincos"),
    "model.text.position": ("learned", "sincos"),
    "model.image.remat": tuple(REMAT),
    "model.text.remat": tuple(REMAT),
    "model.pooler.remat": tuple(REMAT),
    "model.attention": ("xla", "cudnn", "flash"),
    "model.pooler.kind": ("parallel", "cascade", "single"),
    "model.text.cls_mask": ("full", "legacy"),
    "model.gelu": ("tanh", "exact"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "loss.contrastive": ("softmax", "sigmoid"),
    "optimizer.name": ("adafactor", "adamw", "muon"),
    "optimizer.schedule": ("linear", "cosine", "constant", "rsqrt"),
    "optimizer.state_dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    *("steps", "batch_size", "microbatches", "log_every", "model.embed_dim", "model.temperature", "model.norm_eps"),
    *("model.image.size", "model.image.patch", "model.image.width", "model.image.depth"),
    *("model.image.heads", "model.image.mlp_dim", "model.pooler.queries", "model.pooler.heads"),
    *("model.text.vocab_size", "model.text.length", "model.text.width", "model.text.heads"),
    *("model.text.mlp_dim", "model.text.n_uni", "optimizer.peak_lr", "data.prefetch"),
    *("data.eval_crop", "evaluate.batch_size", "checkpoint.every", "checkpoint.keep"),
)
_NOT_NEGATIVE = (
    *("model.text.n_multi", "model.text.pad_id", "model.image.scan_unroll", "model.text.scan_unroll"),
    *("loss.lambda_con", "loss.lambda_cap", "loss.contrastive_tile", "loss.caption_chunk"),
    *("optimizer.weight_decay", "optimizer.clip_norm", "optimizer.eps"),
    *("data.workers", "data.threads", "data.color_jitter", "data.hue_jitter", "data.rotate"),
    *("evaluate.every", "evaluate.captions", "checkpoint.keep_best"),
)
_SHARE = (
    *("optimizer.warmup", "optimizer.end_lr", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay"),
    *("data.grayscale", "data.blur", "data.eval_crop"),
)


def get(config: Config, path: str) -> Any:
    """The value at a dotted path, e.g. `get(config, "model.image.width")`."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check(
    config: Config, device_count: int | None = None, *, slice_count: int = 1, platform: str | None = None
) -> None:
    """Raises ConfigError for the first thing that cannot run; files are looked for where they are opened.

    Args:
      config: what to check.
      device_count: devices of the whole job; None leaves the mesh unchecked.
      slice_count: groups of devices with a fast network inside: `sharding.slice_count()`.
      platform: what computes: cpu | gpu | tpu; None leaves what only some platforms can do unchecked.
    """
    for path, choices in _CHOICES.items():
        if get(config, path) not in choices:
            raise ConfigError(f"config.{path}={get(config, path)!r}: choose one of {', '.join(choices)}")
    for path in _POSITIVE:
        if not get(config, path) > 0:
            raise ConfigError(f"config.{path}={get(config, path)!r} must be more than 0")
    for path in _NOT_NEGATIVE:
        if not get(config, path) >= 0:
            raise ConfigError(f"config.{path}={get(config, path)!r} must be 0 or more")
    for path in _SHARE:
        if not 0 <= get(config, path) <= 1:
            raise ConfigError(f"config.{path}={get(config, path)!r} must lie in 0..1")
    check_model(config.model)
    loss, data = config.loss, config.data
    if loss.lambda_con == 0 and loss.lambda_cap == 0:
        raise ConfigError(
            "config.loss.lambda_con=0 and config.loss.lambda_cap=0 leave nothing to train: set one above 0"
        )
    if loss.lambda_cap > 0 and config.model.text.n_multi == 0:
        raise ConfigError(
            "config.model.text.n_multi=0 has no decoder for captions, but "
            f"config.loss.lambda_cap={loss.lambda_cap}: set n_multi to 1 or more, or lambda_cap to 0"
        )
    if loss.lambda_con > 0 and loss.contrastive == "sigmoid" and config.model.logit_bias == 0:
        raise ConfigError(
            "config.model.logit_bias=0 with config.loss.contrastive='sigmoid' begins with a loss of negatives alone: "
            "set it to -10, and config.model.temperature to 0.1, as SigLIP does"
        )
    if loss.contrastive == "softmax" and config.model.logit_bias != 0:
        raise ConfigError(
            f"config.model.logit_bias={config.model.logit_bias} does not change config.loss.contrastive='softmax': "
            "set it to 0, or config.loss.contrastive to 'sigmoid'"
        )
    for name in ("crop_area", "crop_ratio"):
        low, high = getattr(data, name)
        if not 0 < low <= high or (name == "crop_area" and high > 1):
            limit = " <= 1" if name == "crop_area" else ""
            raise ConfigError(f"config.data.{name}=({low}, {high}) must be (low, high) with 0 < low <= high{limit}")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"config.seed={config.seed} must lie in 0..{2**32 - 1}")
    if not all(0 <= value <= 255 for value in data.background):
        raise ConfigError(f"config.data.background={data.background} must be three numbers in 0..255: red, green, blue")
    for key, pattern in (
        ("decay_mask", config.optimizer.decay_mask),
        *(("freeze", pattern) for pattern in config.optimizer.freeze),
    ):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"config.optimizer.{key}: {pattern!r} is not a regular expression ({error}); an example: '.*/kernel$'"
            ) from error
    if min(data.std) <= 0:
        raise ConfigError(f"config.data.std={data.std} must be more than 0 in every channel")
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"config.microbatches={config.microbatches} does not divide config.batch_size={config.batch_size}; it may "
            f"be {_divisors(config.batch_size)}"
        )
    if device_count is not None:
        sizes = mesh_shape(config.mesh, device_count, slice_count=slice_count, platform=platform)
        shards = sizes[0] * sizes[1]
        if config.batch_size % shards:
            near = max(shards, config.batch_size // shards * shards)
            raise ConfigError(
                f"config.batch_size={config.batch_size} is not divisible by the {shards} shards of the batch (replica "
                f"{sizes[0]} x fsdp {sizes[1]}); near it: {near}, {near + shards}"
            )
        rows = config.batch_size // config.microbatches
        if rows % shards:
            raise ConfigError(
                f"config.microbatches={config.microbatches} cuts config.batch_size={config.batch_size} into parts of "
                f"{rows} rows, not divisible by the {shards} shards of the batch; it may be "
                f"{_divisors(config.batch_size // shards)}"
            )
        for key in ("model.image.heads", "model.text.heads", "model.pooler.heads"):
            if get(config, key) % sizes[2]:
                raise ConfigError(
                    f"config.{key}={get(config, key)} is not divisible by config.mesh.tensor={sizes[2]}, over which "
                    f"heads are split; it may be {_divisors(get(config, key))}"
                )

    needs = {"cudnn": "gpu", "flash": "tpu"}.get(config.model.attention)
    if platform is not None and needs not in (None, platform):
        raise ConfigError(
            f"config.model.attention={config.model.attention!r} runs on a {needs}, and this is a {platform}: set it to "
            "'xla'"
        )


def check_model(model: Model) -> None:
    """The part of `check` that concerns shapes inside the model."""
    image, text = model.image, model.text
    if image.size % image.patch:
        near = image.size // image.patch * image.patch
        raise ConfigError(
            f"config.model.image.size={image.size} is not divisible by config.model.image.patch={image.patch}; "
            f"near it: {max(near, image.patch)}, {near + image.patch}"
        )
    for heads_key, heads, width_key, width in (
        ("model.image.heads", image.heads, "model.image.width", image.width),
        ("model.text.heads", text.heads, "model.text.width", text.width),
        ("model.pooler.heads", model.pooler.heads, "model.text.width", text.width),
    ):
        if width % heads:
            distance = {h: abs(h - heads) for h in range(1, width + 1) if width % h == 0}
            fits = sorted(sorted(distance, key=distance.__getitem__)[:3])
            raise ConfigError(
                f"config.{heads_key}={heads} does not divide config.{width_key}={width}; near it: "
                + ", ".join(map(str, fits))
            )
        # The limit of cuDNN's kernels before the Hopper generation.
        if model.attention == "cudnn" and (width // heads % 8 or width // heads > 128):
            raise ConfigError(
                f"config.model.attention='cudnn' takes heads as wide as a multiple of 8 up to 128; config.{width_key}="
                f"{width} / config.{heads_key}={heads} is {width // heads}: set other heads, or attention to 'xla'"
            )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise ConfigError(
            f"config.model.attention='cudnn' computes in bfloat16, and config.model.dtype={model.dtype!r}: set dtype "
            "to 'bfloat16', or attention to 'xla'"
        )
    if image.position == "sincos" and image.width % 4:
        raise ConfigError(f"config.model.image.width={image.width} must be a multiple of 4 for position=sincos")
    if text.position == "sincos" and text.width % 2:
        raise ConfigError(f"config.model.text.width={text.width} must be even for position=sincos")
    if model.pooler.kind == "single" and model.pooler.queries < 2:
        raise ConfigError(
            f"config.model.pooler.queries={model.pooler.queries}: kind=single needs 2 or more, one for the contrastive "
            "feature and the rest for the decoder"
        )
    if text.pad_id >= text.vocab_size:
        raise ConfigError(
            f"config.model.text.pad_id={text.pad_id} lies outside config.model.text.vocab_size={text.vocab_size}: "
            f"set it to 0..{text.vocab_size - 1}"
        )
    if text.length < 3:
        raise ConfigError(f"config.model.text.length={text.length} must hold bos, a token and eos: 3 or more")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def mesh_shape(
    mesh: Mesh, device_count: int, *, slice_count: int = 1, platform: str | None = None
) -> tuple[int, int, int]:
    """Sizes of (replica, fsdp, tensor) in the whole job, with -1 resolved.

    Args:
      mesh: what is configured.
      device_count: devices of the whole job.
      slice_count: groups of devices with a fast network inside: `sharding.slice_count()`.
      platform: cpu | gpu | tpu. Slices of TPUs must be given an axis; elsewhere the devices may also be taken in order.

    Raises:
      ConfigError: the devices or the slices do not fit.
    """
    dcn = dcn_shape(mesh, slice_count)
    slices = math.prod(dcn)
    if platform == "tpu" and slices != slice_count:
        raise ConfigError(
            f"config.mesh(dcn_replica=1, dcn_fsdp=1) gives no axis to the {slice_count} slices that these "
            f"{device_count} chips are: set config.mesh.dcn_replica=-1 (or dcn_fsdp=-1, where a slice cannot hold the "
            "model)"
        )
    where = f" of each of the {slices} slices" if slices > 1 else ""
    sizes = {"replica": mesh.replica, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    if mesh.replica == -1 and mesh.tensor >= 1 and mesh.fsdp * mesh.tensor > device_count // slices >= mesh.tensor:
        # Fewer devices than one copy of the model is meant to be sharded over hold one copy: a pod's recipe runs on them.
        sizes |= {"replica": 1, "fsdp": -1}
    inside = _resolve(sizes, device_count // slices, f"devices{where}")
    return inside[0] * dcn[0], inside[1] * dcn[1], inside[2] * dcn[2]


def dcn_shape(mesh: Mesh, slice_count: int) -> tuple[int, int, int]:
    """Slices along (replica, fsdp, tensor), with -1 resolved; (1, 1, 1) where none are configured.

    Raises:
      ConfigError: the slices do not fit.
    """
    if (mesh.dcn_replica, mesh.dcn_fsdp) == (1, 1):
        return 1, 1, 1
    replica, fsdp = _resolve({"dcn_replica": mesh.dcn_replica, "dcn_fsdp": mesh.dcn_fsdp}, slice_count, "slices")
    return replica, fsdp, 1


def _resolve(sizes: dict[str, int], count: int, of: str) -> list[int]:
    text = ", ".join(f"{k}={v}" for k, v in sizes.items())
    if any(v < 1 and v != -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"config.mesh({text}): each axis is 1 or more, and at most one is -1 (the rest)")
    known = math.prod(v for v in sizes.values() if v != -1)
    if -1 in sizes.values():
        if count % known:
            raise ConfigError(
                f"config.mesh({text}): {known} does not divide the {count} {of}; what does: {_divisors(count)}"
            )
    elif known != count:
        raise ConfigError(
            f"config.mesh({text}) names {known} {of} where there are {count}: set one axis to -1 (the rest)"
        )
    return [count // known if v == -1 else v for v in sizes.values()]
