"""What can run: each rule gives one line that names the key, the value and what would work."""

from __future__ import annotations

import re

from coca_jax.config.keys import Config, ConfigError, Init, Model
from coca_jax.config.mesh import all_divisors, divisors, mesh_shape
from coca_jax.config.reading import get

# What a layer's backward pass computes again instead of keeping it, from most memory and least computation to the
# opposite. Sizes are those of a layer's tokens [b, s, width] with an MLP four times as wide; m are the keys.
REMAT = {
    "none": "kept: everything; computed again: nothing",
    "attention": "kept: all but the attention weights [b, heads, s, m]; computed again: those",
    "dots": "kept: products with parameters (8 x tokens); computed again: norms, activations, attention",
    "qkv": "kept: queries, keys, values and the tokens after a sublayer (4 x tokens); computed again: also the MLP",
    "outputs": "kept: the tokens after a sublayer (1 x tokens); computed again: also queries, keys and values",
    "everything": "kept: the layer's input; computed again: all of the layer that its gradient needs",
}

# Keys that attention=flash takes of heads up to 128 wide: scores of 128 queries, and what is computed of them, fit in a
# TPU's scratch memory.
_FLASH_KEYS = {"bfloat16": 2048, "float32": 1024}

CHOICES = {
    "model.image.position": ("learned", "sincos"),
    "model.text.position": ("learned", "sincos"),
    "model.image.remat": tuple(REMAT),
    "model.text.remat": tuple(REMAT),
    "model.pooler.remat": tuple(REMAT),
    "model.attention": ("xla", "cudnn", "flash"),
    "model.pooler.kind": ("parallel", "cascade", "single"),
    "model.text.cls_mask": ("full", "legacy"),
    "model.gelu": ("tanh", "exact"),
    "init.model": ("config", "checkpoint"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.head.reads": ("pooler", "contrastive", "decoder"),
    "loss.contrastive": ("softmax", "sigmoid"),
    "optimizer.name": ("adafactor", "adamw", "muon"),
    "optimizer.schedule": ("linear", "cosine", "constant", "rsqrt"),
    "optimizer.state_dtype": ("float32", "bfloat16"),
    "optimizer.second_moment_dtype": ("float32", "bfloat16"),
    "data.interpolation": ("bicubic", "pillow-bicubic", "pillow-bilinear"),
}
POSITIVE = (
    *("steps", "batch_size", "microbatches", "log_every", "model.embed_dim", "model.temperature", "model.norm_eps"),
    *("model.image.size", "model.image.patch", "model.image.width", "model.image.depth"),
    *("model.image.heads", "model.image.mlp_dim", "model.pooler.queries", "model.pooler.heads"),
    *("model.text.vocab_size", "model.text.length", "model.text.width", "model.text.heads"),
    *("model.text.mlp_dim", "model.text.n_uni", "optimizer.peak_lr", "data.prefetch"),
    *("model.head.frames", "lora.alpha", "optimizer.layer_decay"),
    *("model.bridge.queries", "model.bridge.width", "model.bridge.depth", "model.bridge.heads", "model.bridge.mlp_dim"),
    *("data.eval_crop", "evaluate.batch_size", "checkpoint.every", "checkpoint.keep"),
)
NOT_NEGATIVE = (
    *("init.step", "init.image_size", "model.head.classes", "loss.lambda_cls", "loss.lambda_match", "lora.rank"),
    "model.bridge.stage",
    *("model.text.n_multi", "model.text.pad_id", "model.image.scan_unroll", "model.text.scan_unroll"),
    *("loss.lambda_con", "loss.lambda_cap", "loss.contrastive_tile", "loss.caption_chunk"),
    *("optimizer.weight_decay", "optimizer.clip_norm", "optimizer.eps"),
    *("data.workers", "data.worker_timeout", "data.threads", "data.subword_sampling"),
    *("data.color_jitter", "data.hue_jitter", "data.rotate"),
    *("evaluate.every", "evaluate.captions", "evaluate.likelihood", "checkpoint.keep_best", "checkpoint.grace"),
    *("guard.spike", "guard.after", "guard.max_in_a_row", "guard.max_skipped", "guard.stall", "guard.stall_seconds"),
)
LARGEST = 2**31 - 1  # of any of these: what JAX counts steps and sides in
SHARE = (
    *("optimizer.warmup", "optimizer.end_lr", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay"),
    *("loss.label_smoothing", "optimizer.layer_decay", "data.grayscale", "data.blur", "data.eval_crop", "data.max_bad"),
)


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
    for path, choices in CHOICES.items():
        if get(config, path) not in choices:
            raise ConfigError(f"config.{path}={get(config, path)!r}: choose one of {', '.join(choices)}")
    for path in POSITIVE:
        if not get(config, path) > 0:
            raise ConfigError(f"config.{path}={get(config, path)!r} must be more than 0")
    for path in NOT_NEGATIVE:
        if not get(config, path) >= 0:
            raise ConfigError(f"config.{path}={get(config, path)!r} must be 0 or more")
    for path in (*POSITIVE, *NOT_NEGATIVE):
        if not get(config, path) <= LARGEST:
            raise ConfigError(f"config.{path} must be no more than {LARGEST}: is a digit too many?")
    for path in SHARE:
        if not 0 <= get(config, path) <= 1:
            raise ConfigError(f"config.{path}={get(config, path)!r} must lie in 0..1")
    check_model(config.model)
    loss, data = config.loss, config.data
    if loss.lambda_con == loss.lambda_cap == loss.lambda_cls == 0:
        raise ConfigError(
            "config.loss.lambda_con=0 and config.loss.lambda_cap=0 leave nothing to train: set one above 0 (or "
            "lambda_cls, for a task with classes)"
        )
    _check_head(config)
    _check_bridge(config)
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
    if config.optimizer.name == "adafactor" and config.optimizer.second_moment_dtype != "float32":
        raise ConfigError(
            f"config.optimizer.second_moment_dtype={config.optimizer.second_moment_dtype!r} is for adamw and muon: "
            "adafactor keeps rows and columns of it alone; set it to 'float32', or config.optimizer.name"
        )
    for key, usual in (("b1", 0.9), ("b2", 0.999)):
        # Adafactor's b2 is a cap, which 1 leaves out.
        if get(config, f"optimizer.{key}") == 1 and (key == "b1" or config.optimizer.name != "adafactor"):
            raise ConfigError(
                f"config.optimizer.{key}=1.0 is of a mean that no gradient ever enters: set it below 1, e.g. {usual}"
            )
    if config.optimizer.ema_decay == 1:
        raise ConfigError(
            "config.optimizer.ema_decay=1.0 keeps the parameters that it begins with: set it below 1, e.g. 0.9999"
        )
    if config.optimizer.eps < 1e-37 and config.optimizer.name != "adafactor":
        raise ConfigError(
            f"config.optimizer.eps={config.optimizer.eps} is 0 in float32, and config.optimizer.name="
            f"{config.optimizer.name!r} divides 0 by it where a gradient is 0: set it to 1e-8"
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
        ("optimizer.decay_mask", config.optimizer.decay_mask),
        *(("optimizer.freeze", pattern) for pattern in config.optimizer.freeze),
        *(("lora.kernels", pattern) for pattern in config.lora.kernels),
        *(("init.skip", pattern) for pattern in config.init.skip),
    ):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"config.{key}: {pattern!r} is not a regular expression ({error}); an example: '.*/kernel$'"
            ) from error
    if config.lora.rank and not config.lora.kernels:
        raise ConfigError(
            f"config.lora.kernels=() leaves config.lora.rank={config.lora.rank} nothing to update: name some, e.g. "
            "('.*attention/(query|value)/kernel',), or set rank to 0"
        )
    _check_init(config.init)
    if min(data.std) <= 0:
        raise ConfigError(f"config.data.std={data.std} must be more than 0 in every channel")
    if not all(split.strip() for split in config.evaluate.splits):
        raise ConfigError(
            f"config.evaluate.splits={config.evaluate.splits} names a source by an empty text: to evaluate on none, "
            'write --config.evaluate.splits="()"'
        )
    if config.evaluate.zero_shot and not config.evaluate.prompts:
        raise ConfigError(
            f"config.evaluate.prompts is empty and config.evaluate.zero_shot={config.evaluate.zero_shot!r} needs some: "
            "set it to ('a photo of a {}.',)"
        )
    for prompt in config.evaluate.prompts:
        if "{}" not in prompt and prompt != "imagenet":
            raise ConfigError(
                f"config.evaluate.prompts: {prompt!r} has no place for the name of the class: write {{}} where it "
                "goes, as in 'a photo of a {}.', or 'imagenet' for CLIP's 80"
            )
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"config.microbatches={config.microbatches} does not divide config.batch_size={config.batch_size}; it may "
            f"be {divisors(config.batch_size)}"
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
                f"{divisors(config.batch_size // shards)}"
            )
        bridge = ("model.bridge.heads",) if config.model.bridge.stage else ()
        for key in ("model.image.heads", "model.text.heads", "model.pooler.heads", *bridge):
            if get(config, key) % sizes[2]:
                raise ConfigError(
                    f"config.{key}={get(config, key)} is not divisible by config.mesh.tensor={sizes[2]}, over which "
                    f"heads are split; it may be {divisors(get(config, key))}"
                )

    needs = {"cudnn": "gpu", "flash": "tpu"}.get(config.model.attention)
    if platform is not None and needs not in (None, platform):
        raise ConfigError(
            f"config.model.attention={config.model.attention!r} runs on a {needs}, and this is a {platform}: set it to "
            "'xla'"
        )


def _check_head(config: Config) -> None:
    head, loss = config.model.head, config.loss
    if loss.lambda_cls == 0:
        for key, off in (("model.head.classes", 0), ("model.head.frames", 1), ("data.classes", "")):
            if (value := get(config, key)) != off:
                raise ConfigError(
                    f"config.{key}={value!r} says nothing where config.loss.lambda_cls=0 leaves the classifier out: "
                    "set lambda_cls to 1"
                )
        if loss.label_smoothing:
            raise ConfigError(
                f"config.loss.label_smoothing={loss.label_smoothing} is of classification, and lambda_cls=0 leaves "
                "that out: set it to 0, or lambda_cls to 1"
            )
        return
    if head.reads == "decoder":
        if config.model.text.n_multi == 0:
            raise ConfigError(
                "config.model.head.reads='decoder' and config.model.text.n_multi=0: there is no multimodal half to read"
            )
        if loss.lambda_con > 0 or loss.lambda_cap > 0:
            raise ConfigError(
                f"config.model.head.reads='decoder' reads questions, and config.loss(lambda_con={loss.lambda_con}, "
                f"lambda_cap={loss.lambda_cap}) are of captions: set both to 0"
            )


def _check_bridge(config: Config) -> None:
    bridge, loss, stage = config.model.bridge, config.loss, config.model.bridge.stage
    if stage not in (0, 1, 2):
        raise ConfigError(f"config.model.bridge.stage={stage}: choose one of 0, 1, 2")
    if loss.lambda_match > 0 and (stage != 1 or loss.lambda_con == 0):
        raise ConfigError(
            f"config.loss.lambda_match={loss.lambda_match} is of config.model.bridge.stage=1 and takes its wrong pairs "
            "from the contrastive half: set the stage, and config.loss.lambda_con above 0, or lambda_match to 0"
        )
    if not stage:
        return
    if stage == 2 and (loss.lambda_con > 0 or loss.lambda_cap == 0):
        raise ConfigError(
            f"config.model.bridge.stage=2 learns from captions alone, not with config.loss.lambda_con={loss.lambda_con}"
            f", lambda_cap={loss.lambda_cap}: set lambda_con to 0 and lambda_cap to 1"
        )
    if stage == 1 and config.microbatches > 1:
        raise ConfigError(
            f"config.microbatches={config.microbatches} and config.model.bridge.stage=1, whose similarities are of the "
            "whole batch: set it to 1"
        )
    if config.model.text.n_multi == 0:
        raise ConfigError(
            "config.model.bridge.stage is for a text decoder, and config.model.text.n_multi=0: set it to 1"
        )
    for key in ("loss.lambda_cls", "lora.rank"):
        if value := get(config, key):
            raise ConfigError(f"config.{key}={value} does not go with config.model.bridge.stage={stage}: set one to 0")
    if bridge.depth % 2:
        raise ConfigError(
            f"config.model.bridge.depth={bridge.depth} must be even, every second layer reads the image: "
            f"{bridge.depth - 1 or 2} or {bridge.depth + 1}"
        )


def _check_init(init: Init) -> None:
    if init.checkpoint and init.image_encoder:
        raise ConfigError(
            f"config.init.checkpoint={init.checkpoint!r} and config.init.image_encoder={init.image_encoder!r} are both "
            "set, and a run begins from one of them: set the other to ''"
        )
    for key in ("step", "image_size", "skip") if not init.checkpoint else ():
        if value := getattr(init, key):
            raise ConfigError(f"config.init.{key}={value!r} says nothing without config.init.checkpoint: set that too")
    if init.model == "checkpoint" and not init.checkpoint:
        raise ConfigError(
            "config.init.model='checkpoint' and config.init.checkpoint is empty: set it to what the run begins from, "
            "e.g. --config.init.checkpoint=runs/mine"
        )
    if init.model != "checkpoint" and init.image_size:
        raise ConfigError(
            f"config.init.image_size={init.image_size} is for config.init.model='checkpoint': set that, or "
            "config.model.image.size instead"
        )


def flash_keys(dtype: str, width: int) -> int:
    """How many keys attention=flash takes of heads of a width: half as many where they fill two registers."""
    return _FLASH_KEYS[dtype] // -(-width // 128)


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
        *(("model.bridge.heads", b.heads, "model.bridge.width", b.width) for b in (model.bridge,) if b.stage),
    ):
        if width % heads:
            distance = {h: abs(h - heads) for h in all_divisors(width)}
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
    if model.attention == "flash":
        tokens = (image.size // image.patch) ** 2 + image.class_token
        of_image = f"model.image.size={image.size} in patches of {image.patch}"
        bridge, frames = model.bridge, model.head.frames
        for keys, width, of in (
            (tokens, image.width // image.heads, of_image),
            (tokens * frames, text.width // model.pooler.heads, f"{of_image}, model.head.frames={frames},"),
            (text.length + 1, text.width // text.heads, f"model.text.length={text.length}"),
            (model.pooler.queries, text.width // text.heads, f"model.pooler.queries={model.pooler.queries}"),
            (
                (bridge.queries + 2 * text.length) if bridge.stage else 0,
                bridge.width // bridge.heads,
                f"model.bridge.queries={bridge.queries}, with model.text.length={text.length} twice,",
            ),
        ):
            if keys > (most := flash_keys(model.dtype, width)):
                raise ConfigError(
                    f"config.model.attention='flash' takes up to {most:,} tokens of {model.dtype} with heads {width} "
                    f"wide, and config.{of} gives {keys:,}: set attention to 'xla'"
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
