"""The two objectives (CoCa paper, equations 1, 2 and 4), as means over the GLOBAL batch whatever the mesh.

Everything here is float32. Axes: b batch, t text tokens, d width, e the contrastive space, v vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model.coca import Output
from coca_jax.model.text_decoder import output_logits
from coca_jax.sharding import shard

Metrics = dict[str, Any]


def contrastive(
    image_features: Float[Array, "b e"], text_features: Float[Array, "b e"], logit_scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Softmax contrastive loss over the global batch, the mean of both directions.

    CoCa equation 1; Radford et al. 2021.

    Args:
      image_features, text_features: unit length; row i of one belongs to row i of the other.
      logit_scale: what the similarities are multiplied by.

    Returns:
      The loss in nats, and the share of rows whose own partner scores highest, both ways.
    """
    logits = jnp.einsum(
        "ie,je->ij", image_features, text_features, preferred_element_type=jnp.float32, precision="highest"
    )
    logits = shard(logits * logit_scale, "batch", None)
    own = jnp.diagonal(logits)
    image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
    text_to_image = jnp.mean(jax.nn.logsumexp(logits, axis=0) - own)
    fixed = jax.lax.stop_gradient(logits)
    return (image_to_text + text_to_image) / 2, {
        "accuracy/image_to_text": jnp.mean(jnp.diagonal(fixed) >= jnp.max(fixed, axis=1)),
        "accuracy/text_to_image": jnp.mean(jnp.diagonal(fixed) >= jnp.max(fixed, axis=0)),
    }


def targets(tokens: Int[Array, "b t"], pad_id: int) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """What each position predicts, the token after it, and 1.0 where that is a real token.

    The last position predicts nothing; keeping it keeps the length a round number.
    """
    labels = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], pad_id)], axis=1)
    return labels, (labels != pad_id).astype(jnp.float32)


def token_losses(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"], chunk: int
) -> Float[Array, "b t"]:
    """Cross-entropy of every position in nats, with the logits of `chunk` positions in memory at a time.

    The backward pass computes each chunk's logits again, so that `[b, t, v]` is never held. Chunks are cut along t: the
    batch stays split over the devices as it is.

    Args:
      hidden: the decoder's output.
      head: the output softmax's kernel.
      labels: the right ids.
      chunk: positions; 0 or t and more: all at once. t need not be a multiple.
    """
    b, t, d = hidden.shape
    if chunk <= 0 or chunk >= t:
        return _cross_entropy(hidden, head, labels)
    count = -(-t // chunk)
    behind = ((0, 0), (0, count * chunk - t))
    hidden = jnp.pad(hidden, (*behind, (0, 0))).reshape(b, count, chunk, d).swapaxes(0, 1)
    labels = jnp.pad(labels, behind).reshape(b, count, chunk).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _cross_entropy(shard(part[0], "batch", None, "width"), head, part[1])

    losses = jax.lax.scan(one, None, (hidden, labels))[1]
    return losses.swapaxes(0, 1).reshape(b, count * chunk)[:, :t]


def _cross_entropy(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    logits = output_logits(hidden, head)
    # A comparison and a sum, not a gather: it fuses, and it partitions over a sharded vocabulary.
    own = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, :] == labels[:, :, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0.0), axis=-1)


def captioning(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], tokens: Int[Array, "b t"], *, pad_id: int, chunk: int
) -> Float[Array, ""]:
    """Next-token cross-entropy in nats, the mean over the global batch's real tokens (CoCa equation 2).

    The sum and the count are taken over the whole batch before they are divided: a device whose captions are short
    weighs less, as it must.
    """
    labels, weights = targets(tokens, pad_id)
    losses = token_losses(hidden, head, labels, chunk)
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def total(
    output: Output, head: Float[Array, "d v"] | None, tokens: Int[Array, "b t"], loss: config.Loss, *, pad_id: int
) -> tuple[Float[Array, ""], Metrics]:
    """`lambda_con * contrastive + lambda_cap * captioning` (CoCa equation 4), and its parts.

    Args:
      output: of CoCa.forward with the halves whose weight is not 0.
      head: the output softmax's kernel; may be None where lambda_cap is 0.
      tokens: the captions.
      loss: weights and chunk size.
      pad_id: of padding.
    """
    value = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    if loss.lambda_con:
        assert output.image_features is not None and output.text_features is not None
        assert output.logit_scale is not None
        part, metrics = contrastive(output.image_features, output.text_features, output.logit_scale)
        value = value + loss.lambda_con * part
        metrics |= {"loss/contrastive": part, "logit_scale": output.logit_scale}
    if loss.lambda_cap:
        assert output.hidden is not None and head is not None
        part = captioning(output.hidden, head, tokens, pad_id=pad_id, chunk=loss.caption_chunk)
        value = value + loss.lambda_cap * part
        metrics["loss/captioning"] = part
    return value, metrics | {"loss": value}
