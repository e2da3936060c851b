"""Every key of a configuration: its default, and what it means.

These dataclasses are the single list of what can be configured: each field is a key, and its comment says what it does.
"""

from __future__ import annotations

import dataclasses


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
    scan_unroll: int = 1  # layers a scan step holds; 0: no scan, each is compiled by itself


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
class Bridge:
    """A query transformer in place of the poolers (BLIP-2, arXiv 2301.12597), between parts that are frozen.

    How texts are cut, remat and unrolling are those of `text`.
    """

    # 0: there is none | 1: it learns to read images, with a text of its own: loss.lambda_con, lambda_cap, lambda_match.
    # The text decoder is kept for the second stage, frozen, and not computed | 2: the text decoder reads its queries
    stage: int = 0
    queries: int = 32
    width: int = 768
    depth: int = 12  # layers, an even number: the first, and then every second one, reads the image
    heads: int = 12  # must divide width
    mlp_dim: int = 3072


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier, which is there where loss.lambda_cls is above 0."""

    # pooler: an attentional pooler of its own over the image tokens (paper, section 3.3) | contrastive: what the
    # contrastive pooler gives (linear probe) | decoder: the multimodal half at the last text token (VQA, entailment)
    reads: str = "pooler"
    classes: int = 0  # 0: as many as data.classes names, or the training source has labels
    frames: int = 1  # above 1 an example is a clip of so many frames, whose tokens are pooled together


@dataclasses.dataclass(frozen=True)
class Model:
    embed_dim: int = 768  # of the shared contrastive space
    image: ImageEncoder = ImageEncoder()
    pooler: Pooler = Pooler()
    text: TextDecoder = TextDecoder()
    head: Head = Head()
    bridge: Bridge = Bridge()
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
class Init:
    """What a run begins from instead of the seed; of no effect when it goes on from a checkpoint of its own workdir."""

    # What coca_jax.load opens: a workdir, an exported directory, open_clip's. Parameters are taken by their paths,
    # learned positions resized; what it does not have is drawn from the seed.
    checkpoint: str = ""
    step: int = 0  # of a workdir; 0: the newest
    # config: config.model and config.data's mean and std must agree with the checkpoint's | checkpoint: they, and how
    # pictures are read, are the checkpoint's. The recipe's are attention, remat, scan_unroll, logit_bias (it goes with
    # loss.contrastive) and the size below.
    model: str = "config"
    image_size: int = 0  # with model=checkpoint: side of the input, pixels; 0: the checkpoint's
    skip: tuple[str, ...] = ()  # patterns of parameter paths that are drawn from the seed all the same

    # File, or folder with one, of a vision transformer's weights: timm's, big_vision's, open_clip's or ours. What it
    # does not have (poolers, text) is drawn from the seed; what it has is trained too, unless optimizer.freeze says no.
    image_encoder: str = ""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates of kernels (Hu et al. 2021, arXiv 2106.09685): kernel + alpha / rank * a @ b.

    Only they and model.head are trained. What is loaded or exported of such a run are the kernels with them added.
    """

    rank: int = 0  # 0: off
    alpha: float = 16.0
    kernels: tuple[str, ...] = (r".*attention/(query|value)/kernel",)  # patterns of paths


@dataclasses.dataclass(frozen=True)
class Loss:
    """lambda_con * contrastive + lambda_cap * captioning (paper, equation 4). A weight of 0 removes that half.

    For a task with classes: + lambda_cls * classification.
    """

    lambda_con: float = 1.0
    lambda_cap: float = 2.0
    lambda_cls: float = 0.0  # above 0: model.head, and labels in the data
    lambda_match: float = 0.0  # of model.bridge.stage=1: whether text and image belong together
    label_smoothing: float = 0.0  # of classification: share of the target that all classes have evenly
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
    freeze: tuple[str, ...] = ()  # patterns of parameter paths that never change: no gradients, no state
    layer_decay: float = 1.0  # learning rate of a layer, as a share of that of the next; 1: off
    ema_decay: float = 0.0  # moving average of the parameters, used by evaluation; 0: off
    state_dtype: str = "float32"  # float32 | bfloat16: what momentum is stored in
    second_moment_dtype: str = "float32"  # float32 | bfloat16, rounded by chance; AdamW, Muon (Adafactor's are small)


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
    """Sources are written `kind:location`, e.g. `emoji:train` or `array_record:/data/laion-*.array_record`.

    Several are mixed by their sizes, `A + B`, or by weights, `0.7 * A + 0.3 * B`. Weights may change on resume.
    """

    train: str = ""
    tokenizer: str = ""  # SentencePiece model file; empty: the one that the training source brings
    classes: str = ""  # file of the labels that are classes, one a line; empty: all that the training source has
    crop_area: tuple[float, float] = (0.5, 1.0)  # random-resized crop: share of the area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # and aspect ratio
    flip: bool = False  # off: captions name sides
    eval_crop: float = 1.0  # evaluation: share of the shorter side that the middle square keeps
    # bicubic: antialiased, fast, JPEG decoded at the detail needed | pillow-bicubic, pillow-bilinear: every pixel as
    # Pillow and torchvision have it, for models from elsewhere; slower.
    interpolation: str = "bicubic"
    color_jitter: float = 0.0  # brightness, contrast, saturation: up to this share
    hue_jitter: float = 0.0  # hue, share of the colour circle
    grayscale: float = 0.0  # probability
    rotate: float = 0.0  # degrees, up to
    blur: float = 0.0  # probability of a small Gaussian blur
    background: tuple[int, int, int] = (255, 255, 255)  # under transparent pixels
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    subword_sampling: float = 0.0  # above 0, captions are cut into drawn pieces, the more freely the nearer to 0
    max_bad: float = 0.01  # share of the examples that cannot be used above which a run stops; others replace them
    workers: int = 0  # processes; 0: threads only, the faster choice up to about 50 cores
    threads: int = 0  # that read and decode; 0: twice the cores, at most 16
    prefetch: int = 2  # batches placed on the mesh ahead of the step


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: int = 0  # steps; 0: only at the end
    first: bool = False  # also before the first step: what training makes of what a run begins from
    splits: tuple[str, ...] = ()  # sources for retrieval and captioning loss
    zero_shot: str = ""  # labelled source
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # averaged per class; `imagenet` stands for CLIP's 80
    reference_style: str = ""  # of the training pictures that the pixel baseline looks names up in; empty: all
    captions: int = 32  # pictures of the first split that are captioned for the report
    score_captions: bool = False  # caption every picture of every split: CIDEr, BLEU, ROUGE-L
    likelihood: int = 0  # pictures of each source whose texts are ranked by log P(text | image); 0: off
    batch_size: int = 256
    best: str = ""  # metric that keep-best goes by, e.g. seen/image_to_text/r1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 1000  # steps; one is always written at the end
    keep: int = 3  # newest
    keep_best: int = 1  # and the best by evaluate.best
    grace: float = 240.0  # seconds in which a run that is asked to stop has saved, or ends without; launchers give 300


@dataclasses.dataclass(frozen=True)
class Guard:
    """Steps whose update is left out: a loss or gradient that is not finite, and spikes (docs/reliability.md)."""

    # A spike: the logarithm of the gradient's norm is that many of its running mean deviations above its running mean;
    # 0: off. Skipped steps stay out of both.
    spike: float = 10.0
    after: int = 100  # accepted steps before spikes are looked for
    max_in_a_row: int = 10  # skipped steps after which the run stops, with the batch's records and the state; 0: never
    max_skipped: int = 100  # the same of all skipped steps
    # A step that takes so many times the median, and stall_seconds at least: all threads' stacks are written; 0: off
    stall: float = 20.0
    stall_seconds: float = 60.0


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 500_000
    batch_size: int = 65_536  # global
    microbatches: int = 1  # parts of the batch computed after one another: less memory, the same gradients; 1: off
    log_every: int = 50  # steps between lines in metrics.jsonl and TensorBoard
    model: Model = Model()
    init: Init = Init()
    loss: Loss = Loss()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
