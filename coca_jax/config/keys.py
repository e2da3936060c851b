"""Every configuration key with its default and its meaning.

These dataclasses are the only list of keys: each field is a key, and its comment is its documentation, which
`python -m coca_jax.main --help` prints. Alternatives are separated by ` | `; the first word of each is the value.
"""

from __future__ import annotations

import dataclasses


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, its value and what would work."""


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """Vision transformer: images `[b, size, size, 3]` to patch tokens `[b, n, width]`, n = (size / patch)^2."""

    size: int = 288  # side of the square input image, pixels
    patch: int = 18  # side of a patch, pixels; must divide size
    width: int = 768  # features of a token
    depth: int = 12  # layers
    heads: int = 12  # attention heads; must divide width
    mlp_dim: int = 3072  # hidden features of the MLP
    position: str = "learned"  # position embedding: learned | sincos (fixed, two-dimensional)
    class_token: bool = False  # prepend a learned class token (open_clip: True)
    patch_bias: bool = True  # bias of the patch embedding (open_clip: False)
    pre_norm: bool = False  # LayerNorm after the position embedding (open_clip: True)
    # Activations that the backward pass recomputes to save memory, from none to all:
    # none | attention | dots | qkv | outputs | everything
    remat: str = "none"
    scan_unroll: int = 1  # layers per step of the scan over layers; 0: no scan, every layer is compiled separately


@dataclasses.dataclass(frozen=True)
class Pooler:
    """Attentional poolers: learned queries that attend to the patch tokens (paper, section 3.2)."""

    # parallel: both poolers read the patch tokens | cascade: the contrastive pooler reads the generative pooler's
    # output | single: one pooler, whose query 0 is the contrastive one (open_clip)
    kind: str = "parallel"
    queries: int = 256  # queries of the generative pooler; with kind=single one of them is the contrastive query
    heads: int = 12  # attention heads; must divide text.width, which is the width of the pooled tokens
    remat: str = "none"  # recomputation in the poolers' attention; values as in model.image.remat


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """Decoupled text decoder: n_uni causal layers, then n_multi layers that also attend to the image."""

    vocab_size: int = 64_000  # tokens in the vocabulary
    length: int = 64  # tokens per caption, including bos and eos; [CLS] is added to them
    width: int = 768  # features of a token
    heads: int = 12  # attention heads; must divide width
    mlp_dim: int = 3072  # hidden features of the MLP
    n_uni: int = 12  # unimodal layers, 1 or more
    n_multi: int = 12  # multimodal layers, 0 or more
    position: str = "learned"  # position embedding: learned | sincos (fixed)
    pad_id: int = 0  # padding token; must not be a token that captions use
    tie_embeddings: bool = False  # use the transposed token embedding as the output projection
    cross_mlp: bool = False  # a second MLP per multimodal layer, before cross-attention (open_clip: True)
    cross_kv_norm: bool = False  # LayerNorm on the image tokens in every multimodal layer (open_clip: True)
    cls_mask: str = "full"  # full: [CLS] attends to all real tokens and itself | legacy: open_clip's shifted mask
    remat: str = "none"  # recomputation in both halves; values as in model.image.remat
    scan_unroll: int = 1  # as model.image.scan_unroll


@dataclasses.dataclass(frozen=True)
class Bridge:
    """Query transformer between a frozen image encoder and a frozen text decoder (BLIP-2, arXiv 2301.12597).

    It replaces the poolers. Tokenization, remat and unrolling follow `model.text`.
    """

    # 0: no bridge | 1: train the bridge with its own text layers on loss.lambda_con, lambda_cap and lambda_match; the
    # text decoder is kept frozen for stage 2 and is not computed | 2: the text decoder reads the bridge's queries
    stage: int = 0
    queries: int = 32  # learned queries
    width: int = 768  # features of a token
    depth: int = 12  # layers, an even number; every second one, beginning with the first, attends to the image
    heads: int = 12  # attention heads; must divide width
    mlp_dim: int = 3072  # hidden features of the MLP


@dataclasses.dataclass(frozen=True)
class Head:
    """Classifier. It exists where loss.lambda_cls is above 0."""

    # pooler: an attentional pooler of its own over the patch tokens (paper, section 3.3) | contrastive: the contrastive
    # pooler's output (linear probe) | decoder: the multimodal half at the last text token (VQA, entailment)
    reads: str = "pooler"
    classes: int = 0  # number of classes; 0: the number in data.classes, or of labels in the training source
    frames: int = 1  # frames per example; above 1 an example is a clip whose tokens are pooled together


@dataclasses.dataclass(frozen=True)
class Model:
    """What is computed: the sizes of the model, and the dtypes and kernels that compute it."""

    embed_dim: int = 768  # features of the shared contrastive space
    image: ImageEncoder = ImageEncoder()
    pooler: Pooler = Pooler()
    text: TextDecoder = TextDecoder()
    head: Head = Head()
    bridge: Bridge = Bridge()
    norm_eps: float = 1e-6  # epsilon of LayerNorm (open_clip: 1e-5)
    gelu: str = "tanh"  # tanh: approximation | exact: erf (open_clip)
    # Attention kernel: xla | cudnn (NVIDIA GPUs, bfloat16) | flash (TPUs). Decoding with a cache always uses xla.
    attention: str = "xla"
    temperature: float = 0.07  # initial value; learned, with the logit scale clamped to [0, ln 100] (SigLIP: 0.1)
    logit_bias: float = 0.0  # initial value; learned, for loss.contrastive=sigmoid (SigLIP: -10); 0: no bias
    dtype: str = "bfloat16"  # dtype of the computation; temperature, logits and losses are always float32
    # Dtype of the stored parameters: float32 | bfloat16, which loses updates smaller than 1/512 of a value (small
    # learning rates, the end of a schedule). Use it only where memory leaves no choice. Second moments, moving average
    # and logit scale stay float32.
    param_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial parameters. Ignored by a run that resumes from a checkpoint in its own workdir."""

    # Anything that coca_jax.load opens: a workdir, an exported directory, an open_clip directory. Parameters are
    # matched by path and learned positions are resized; the rest is initialized from the seed.
    checkpoint: str = ""
    step: int = 0  # step of a workdir's checkpoint; 0: the newest
    # config: config.model and data.mean and data.std must match the checkpoint | checkpoint: take the model and its
    # image preprocessing from the checkpoint, except attention, remat, scan_unroll, logit_bias and the size below
    model: str = "config"
    image_size: int = 0  # with model=checkpoint: side of the input image, pixels; 0: the checkpoint's
    skip: tuple[str, ...] = ()  # patterns of parameter paths that are initialized from the seed all the same

    # File or folder with the weights of a vision transformer from timm, big_vision, open_clip or this project. Poolers
    # and text decoder are initialized from the seed. All of it is trained, unless optimizer.freeze says otherwise.
    image_encoder: str = ""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates of kernels (Hu et al. 2021, arXiv 2106.09685): kernel + alpha / rank * a @ b.

    Only they and model.head are trained. Loading and exporting merge them into the kernels.
    """

    rank: int = 0  # rank of an update; 0: off
    alpha: float = 16.0  # scale of an update, divided by rank
    kernels: tuple[str, ...] = (r".*attention/(query|value)/kernel",)  # patterns of parameter paths


@dataclasses.dataclass(frozen=True)
class Loss:
    """lambda_con * contrastive + lambda_cap * captioning (paper, equation 4) + lambda_cls * classification.

    A weight of 0 removes that half from the compiled program.
    """

    lambda_con: float = 1.0  # weight of the contrastive loss
    lambda_cap: float = 2.0  # weight of the captioning loss
    lambda_cls: float = 0.0  # weight of the classification loss; above 0 it needs labels and trains model.head
    lambda_match: float = 0.0  # weight of image-text matching, for model.bridge.stage=1
    label_smoothing: float = 0.0  # for classification: share of the target spread evenly over all classes
    contrastive: str = "softmax"  # softmax | sigmoid (SigLIP; set model.logit_bias and model.temperature too)
    contrastive_tile: int = 4096  # rows and columns of the similarity matrix in memory at a time; 0: all
    caption_chunk: int = 1024  # tokens per device whose logits are in memory at a time; 0: all


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optimizer, learning-rate schedule, weight decay, and which parameters train."""

    name: str = "adafactor"  # adafactor | adamw | muon
    peak_lr: float = 8e-4  # learning rate after the warm-up
    schedule: str = "linear"  # after the warm-up: linear | cosine | constant | rsqrt
    warmup: float = 0.02  # length of the linear warm-up, as a share of the steps
    end_lr: float = 0.0  # final learning rate of linear and cosine, as a share of peak_lr
    b1: float = 0.9  # momentum
    b2: float = 0.999  # decay of the second moments (Adafactor: upper limit of 1 - t^-0.8)
    eps: float = 1e-8  # added to the denominators of AdamW and Muon; Adafactor adds 1e-30 to the squares instead
    weight_decay: float = 0.01  # decoupled; multiplied by the learning rate
    decay_mask: str = r".*/(kernel|embedding)$"  # pattern of the parameter paths that decay
    clip_norm: float = 1.0  # limit of the global gradient norm; 0: off
    freeze: tuple[str, ...] = ()  # patterns of parameter paths that stay fixed: no gradients, no optimizer state
    layer_decay: float = 1.0  # learning rate of a layer, as a share of the next layer's; 1: off
    ema_decay: float = 0.0  # decay of the parameters' moving average (EMA), which evaluation uses; 0: off
    state_dtype: str = "float32"  # dtype of the momentum: float32 | bfloat16
    # Dtype of AdamW's and Muon's second moments (Adafactor's are small): float32 | bfloat16, stochastically rounded
    second_moment_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1: all that remain. The batch is split over replica x fsdp.

    A job of several slices (TPU slices, or nodes of GPUs) has a fast network inside a slice and a slower one, DCN,
    between slices. With dcn_replica or dcn_fsdp the other three keys are sizes inside a slice, and an axis is the
    product of both: 2 slices of 256 chips with dcn_replica=2, fsdp=-1 make replica=2 x fsdp=256.
    """

    replica: int = 1  # copies of the model
    fsdp: int = -1  # shards of parameters and optimizer state; with replica=-1, the most shards
    tensor: int = 1  # shards of heads, MLP and vocabulary; always inside a slice
    dcn_replica: int = 1  # slices along replica, which exchange gradients once a step; -1: all that remain
    dcn_fsdp: int = 1  # slices along fsdp, which also gather parameters from each other; -1: all that remain


@dataclasses.dataclass(frozen=True)
class Data:
    """Training data. Sources are written `kind:location`, e.g. `array_record:/data/laion-*.array_record`.

    Several are mixed by size, `A + B`, or by weight, `0.7 * A + 0.3 * B`. Weights may change on resume.
    """

    train: str = ""  # training source or mixture, e.g. emoji:train
    tokenizer: str = ""  # SentencePiece model file; empty: the training source's own
    classes: str = ""  # file with one class label per line; empty: all labels of the training source
    crop_area: tuple[float, float] = (0.5, 1.0)  # random resized crop: smallest and largest share of the area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # random resized crop: smallest and largest aspect ratio
    flip: bool = False  # random horizontal flip; off, because captions name left and right
    eval_crop: float = 1.0  # evaluation: side of the central square crop, as a share of the shorter side
    # Resizing: bicubic (antialiased and fast; JPEGs are decoded at the size needed) | pillow-bicubic, pillow-bilinear
    # (Pillow's pixels exactly, for models trained elsewhere; slower)
    interpolation: str = "bicubic"
    color_jitter: float = 0.0  # largest change of brightness, contrast and saturation, as a share
    hue_jitter: float = 0.0  # largest change of hue, as a share of the color circle
    grayscale: float = 0.0  # probability of a grayscale image
    rotate: float = 0.0  # largest rotation, degrees
    blur: float = 0.0  # probability of a small Gaussian blur
    background: tuple[int, int, int] = (255, 255, 255)  # color under transparent pixels, RGB
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # subtracted from pixel values in 0..1, per channel
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # pixel values are divided by it, per channel
    subword_sampling: float = 0.0  # above 0: sample how captions are tokenized; smaller values vary more
    # Resume on data that have changed since the last checkpoint; changes are logged, and the workdir's tokenizer and
    # classes stay (docs/data.md)
    accept_changes: bool = False
    max_bad: float = 0.01  # largest share of unusable examples; others replace them, and above it the run stops
    workers: int = 0  # reader processes; 0: threads only, which is faster up to about 50 cores
    # Seconds in which a reader process must have begun or ended a record while the run waits for it: else it is killed,
    # and the run ends with status 75. The first batch has 120 at least; the slowest record must fit in. 0: no limit
    worker_timeout: float = 600.0
    threads: int = 0  # threads that read and decode; 0: twice the cores, at most 16
    prefetch: int = 2  # batches placed on the mesh ahead of the step


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is evaluated, and how often."""

    every: int = 0  # steps between evaluations; 0: only after the last step
    first: bool = False  # evaluate before the first step too
    splits: tuple[str, ...] = ()  # sources for retrieval and captioning loss
    zero_shot: str = ""  # labelled source for zero-shot classification
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # averaged per class; `imagenet`: CLIP's 80 prompts
    reference_style: str = ""  # style of the training images that the nearest-pixels baseline searches; empty: all
    captions: int = 32  # images of the first split that are captioned for the report
    score_captions: bool = False  # caption all images of all splits and compute CIDEr, BLEU and ROUGE-L
    likelihood: int = 0  # images per source whose texts are also ranked by log P(text | image); 0: off
    batch_size: int = 256  # images or texts per batch
    best: str = ""  # metric for checkpoint.keep_best, e.g. seen/image_to_text/r1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are saved, and which are kept."""

    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 3  # number of newest checkpoints to keep
    keep_best: int = 1  # number of best checkpoints, by evaluate.best, to keep besides
    grace: float = 240.0  # seconds within which a run that is asked to stop saves and ends; launchers allow 300


@dataclasses.dataclass(frozen=True)
class Guard:
    """Steps whose update is skipped: a loss or gradient that is not finite, and spikes (docs/reliability.md)."""

    # A spike: the logarithm of the gradient norm exceeds its running mean by this many running mean deviations, both
    # over accepted steps; 0: off.
    spike: float = 10.0
    after: int = 100  # accepted steps before spikes are detected
    max_in_a_row: int = 10  # consecutive skipped steps that stop the run and save the batch's records; 0: no limit
    max_skipped: int = 100  # skipped steps in all that stop the run; 0: no limit
    # A step that takes this many times the median step, and at least stall_seconds, writes all threads' stacks; 0: off.
    stall: float = 20.0
    stall_seconds: float = 60.0  # shortest step that counts as stalled, seconds


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of initialization, data order, augmentation and sampling
    steps: int = 500_000  # training steps
    batch_size: int = 65_536  # examples per step, over all devices
    microbatches: int = 1  # parts of the batch computed one after another: less memory, same gradients; 1: off
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
