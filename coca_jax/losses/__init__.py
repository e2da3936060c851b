"""The training objectives (CoCa paper, equations 1, 2 and 4) as means over the GLOBAL batch, whatever the mesh.

`pairs` is the contrastive loss, `tiles` its form for large batches, `tokens` the captioning loss, `classes` the
classification loss. All losses are float32. Axes: b batch, t text tokens, d width, e contrastive space, v vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.losses.classes import classification
from coca_jax.losses.pairs import Metrics, contrastive, from_similarities
from coca_jax.losses.tokens import captioning, targets, token_losses
from coca_jax.model.coca import Output

__all__ = ["Metrics", "captioning", "classification", "contrastive", "targets", "token_losses", "total"]


def total(
    output: Output,
    head: Float[Array, "d v"] | None,
    tokens: Int[Array, "b t"],
    loss: config.Loss,
    *,
    pad_id: int,
    labels: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`lambda_con * contrastive + lambda_cap * captioning` (CoCa equation 4) `+ lambda_cls * classification`.

    A bridge in stage one has similarities of its own and adds `lambda_match * matching`.

    Args:
      output: Output of CoCa.forward, with the parts whose weight is not 0.
      head: Kernel of the output softmax; may be None if lambda_cap is 0.
      tokens: Token ids of the captions.
      loss: Loss weights, kind of contrastive loss, tile and chunk sizes.
      pad_id: Id of the padding token.
      labels: Class labels; may be None if lambda_cls is 0.

    Returns:
      The loss, and its parts as metrics.
    """
    value = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    if loss.lambda_con:
        assert output.logit_scale is not None
        scale, bias = output.logit_scale, output.logit_bias
        if output.similarities is not None:
            part, metrics = from_similarities(output.similarities, scale, bias, kind=loss.contrastive)
        else:
            image, text = output.image_features, output.text_features
            assert image is not None and text is not None
            part, metrics = contrastive(image, text, scale, bias, kind=loss.contrastive, tile=loss.contrastive_tile)
        value = value + loss.lambda_con * part
        metrics |= {"loss/contrastive": part, "logit_scale": output.logit_scale}
        if output.logit_bias is not None:
            metrics["logit_bias"] = output.logit_bias
    if loss.lambda_cap:
        assert output.hidden is not None and head is not None
        part = captioning(output.hidden, head, tokens, pad_id=pad_id, chunk=loss.caption_chunk)
        value = value + loss.lambda_cap * part
        metrics["loss/captioning"] = part
    if loss.lambda_cls:
        assert output.class_logits is not None and labels is not None
        part, class_metrics = classification(output.class_logits, labels, smoothing=loss.label_smoothing)
        value, metrics = value + loss.lambda_cls * part, metrics | class_metrics
    if loss.lambda_match:
        assert output.match_logits is not None and output.matches is not None
        part, match_metrics = classification(output.match_logits, output.matches)
        value = value + loss.lambda_match * part
        metrics |= {"loss/matching": part, "accuracy/matching": match_metrics["accuracy"]}
    return value, metrics | {"loss": value}
