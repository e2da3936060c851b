"""Analytic operation count of the model.

Counts matrix products, with a multiply-add as two operations, the usual definition of model FLOPs (Chowdhery et al.
2022, arXiv 2204.02311, appendix B). Softmax, norms, activations and embedding look-ups are not counted. Attention
counts the full `[s, m]` square, causal or not, because the product computes all of it. Training costs three forward
passes (one product forward, two backward); recomputation to save memory is not model FLOPs and is left out.

Axes: n image tokens, q pooled queries, t text tokens, d width, f MLP width, v vocabulary, e contrastive space.
"""

from __future__ import annotations

import dataclasses
import re

from coca_jax import config


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of the forward pass of ONE image-text pair, by part."""

    image_encoder: float
    poolers: float
    unimodal: float
    multimodal: float
    softmax: float  # output softmax over the vocabulary
    contrastive: float  # projections and similarities with the whole batch
    classifier: float = 0.0  # model.head with its pooler
    bridge: float = 0.0  # model.bridge; in stage one including the text, and three pairs for matching

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def forward(
    model: config.Model,
    *,
    batch_size: int,
    length: int | None = None,
    contrastive: bool = True,
    captioning: bool = True,
    classes: bool = False,
    matching: bool = False,
) -> Flops:
    """Operations of the forward pass of one image-text pair, or one clip-text pair with model.head.frames.

    Args:
      model: Model configuration.
      batch_size: Global batch size: each text is compared with that many images. 0 leaves the similarities out.
      length: Tokens of a caption without [CLS]; None for `text.length`.
      contrastive, captioning, classes, matching: The parts to count, as in CoCa.forward.
    """
    image, pooler, text = model.image, model.pooler, model.text
    d, t = text.width, text.length if length is None else length
    n = (image.size // image.patch) ** 2
    patches = 2 * n * image.patch**2 * 3 * image.width
    n += image.class_token
    encoder = patches + image.depth * (_attention(n, n, image.width, image.width) + _mlp(n, image.width, image.mlp_dim))
    encoder, n = encoder * model.head.frames, n * model.head.frames
    reads = model.head.reads if classes else ""
    decodes = captioning or reads == "decoder"

    if model.bridge.stage:
        parts: dict[str, bool] = {"contrastive": contrastive, "captioning": captioning, "matching": matching}
        return _with_bridge(model, encoder, n, t, batch_size, **parts)
    poolers, feature = 0.0, contrastive or reads == "contrastive"
    if decodes or (feature and pooler.kind != "parallel"):
        poolers += _attention(pooler.queries, n, d, image.width)
    if feature and pooler.kind == "parallel":
        poolers += _attention(1, n, d, image.width)
    elif feature and pooler.kind == "cascade":
        poolers += _attention(1, pooler.queries, d, d)

    s = t + contrastive  # [CLS]
    unimodal = text.n_uni * (_attention(s, s, d, d) + _mlp(s, d, text.mlp_dim)) if contrastive or decodes else 0.0
    multimodal = softmax = similarities = classifier = 0.0
    if decodes:
        multimodal = _multimodal(text, t, pooler.queries - (pooler.kind == "single"))
        softmax = 2.0 * t * d * text.vocab_size if captioning else 0.0
    if contrastive:
        similarities = 2.0 * 2 * d * model.embed_dim + 2.0 * batch_size * model.embed_dim
    if classes:
        classifier = 2.0 * d * model.head.classes + (_attention(1, n, d, image.width) if reads == "pooler" else 0.0)
    return Flops(encoder, poolers, unimodal, multimodal, softmax, similarities, classifier)


def _multimodal(text: config.TextDecoder, t: int, q: int) -> float:
    d = text.width
    layer = _attention(t, t, d, d) + _attention(t, q, d, d) + (1 + text.cross_mlp) * _mlp(t, d, text.mlp_dim)
    return text.n_multi * layer


def _with_bridge(
    model: config.Model,
    encoder: float,
    n: int,
    t: int,
    batch_size: int,
    *,
    contrastive: bool,
    captioning: bool,
    matching: bool,
) -> Flops:
    c, text = model.bridge, model.text

    def stack(s: int) -> float:
        """Operations of the bridge's layers for the queries and s text tokens."""
        layer = _attention(c.queries + s, c.queries + s, c.width, c.width) + _mlp(c.queries + s, c.width, c.mlp_dim)
        return c.depth * layer + c.depth / 2 * _attention(c.queries, n, c.width, model.image.width)

    if c.stage == 2:
        bridge = stack(0) + 2.0 * c.queries * c.width * text.width
        unimodal = text.n_uni * (_attention(t, t, text.width, text.width) + _mlp(t, text.width, text.mlp_dim))
        softmax = 2.0 * t * text.width * text.vocab_size
        return Flops(encoder, 0.0, unimodal, _multimodal(text, t, c.queries), softmax, 0.0, bridge=bridge)
    bridge = stack(t * (contrastive + captioning)) + matching * 3 * (stack(t) + 2.0 * c.width * 2)
    softmax = captioning * 2.0 * t * c.width * text.vocab_size
    projections = 2.0 * (c.queries + 1) * c.width * model.embed_dim
    similarities = contrastive * (projections + 2.0 * batch_size * c.queries * model.embed_dim)
    return Flops(encoder, 0.0, 0.0, 0.0, softmax, similarities, bridge=bridge)


def _attention(s: int, m: int, width: int, kv_width: int) -> float:
    """Operations for s queries and m keys: query and output, key and value projections, scores, weighted sum."""
    return 2.0 * (2 * s * width * width + 2 * m * kv_width * width + 2 * s * m * width)


def _mlp(s: int, width: int, mlp_dim: int) -> float:
    return 2.0 * 2 * s * width * mlp_dim


def train_step_flops(c: config.Config) -> float:
    """Model FLOPs of one training step over the global batch.

    A trained part costs three forward passes: forward, gradients of its parameters, gradients of its inputs. A frozen
    part has no parameter gradients, and no input gradients if nothing before it is trained; one of its kernels tells
    whether it is.
    """
    wanted = {
        "contrastive": c.loss.lambda_con > 0,
        "captioning": c.loss.lambda_cap > 0,
        "classes": c.loss.lambda_cls > 0,
        "matching": c.loss.lambda_match > 0,
    }
    parts = forward(c.model, batch_size=c.batch_size, **wanted)

    def matches(patterns: tuple[str, ...], path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in patterns)

    def passes(kernel: str, *, after: bool) -> tuple[float, bool]:
        """Cost of a part in forward passes, and whether it or anything before it is trained."""
        trained = not (c.lora.rank or matches(c.optimizer.freeze, kernel))
        low_rank = bool(c.lora.rank) and any(
            matches(c.lora.kernels, kernel.replace("mlp/up", f"attention/{name}")) for name in ("query", "value", "out")
        )
        needs_gradient = after or trained or low_rank
        return 1.0 + trained + needs_gradient, needs_gradient

    image, image_trained = passes("image_encoder/blocks/mlp/up/kernel", after=False)
    between = "bridge/blocks/reading/attention/out" if c.model.bridge.stage else "generative_pooler/attention/out"
    pooler, pooled_trained = passes(f"{between}/kernel", after=image_trained)
    unimodal, text_trained = passes("text_decoder/unimodal/blocks/mlp/up/kernel", after=False)
    multimodal, decoder_trained = passes(
        "text_decoder/multimodal/blocks/mlp/up/kernel", after=pooled_trained or text_trained
    )
    softmax, _ = passes("text_decoder/lm_head/kernel", after=decoder_trained)
    contrastive, _ = passes("image_projection/kernel", after=pooled_trained or text_trained)
    if c.model.bridge.stage == 1:  # the output softmax shares the token embedding
        softmax, _ = passes("bridge/token_embedding/embedding", after=pooled_trained)
    total = image * parts.image_encoder + pooler * (parts.poolers + parts.bridge) + unimodal * parts.unimodal
    total += multimodal * parts.multimodal + softmax * parts.softmax + contrastive * parts.contrastive
    return c.batch_size * (total + (2.0 + (image_trained or decoder_trained)) * parts.classifier)
