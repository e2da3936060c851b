"""Contrastive losses: match each image with its text among the global batch.

Axes: b rows of the global batch, e contrastive space.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coca_jax.losses.tiles import pair_losses, similarities, tiled
from coca_jax.sharding import shard

Metrics = dict[str, Any]
_ACCURACIES = ("accuracy/image_to_text", "accuracy/text_to_image")


def contrastive(
    image_features: Float[Array, "b e"],
    text_features: Float[Array, "b e"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    kind: str = "softmax",
    tile: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """Contrastive loss over the global batch, for the mesh set with `jax.set_mesh` or without a mesh.

    softmax: cross-entropy of each image among all texts and of each text among all images, averaged (CoCa, arXiv
    2205.01917, equation 1; Radford et al. 2021). sigmoid: -log sigmoid(logit) for matching pairs and -log
    sigmoid(-logit) for all others, summed and divided by b (SigLIP, arXiv 2303.15343, equation 1).

    Args:
      image_features, text_features: Unit-length features; row i of one matches row i of the other.
      logit_scale: Factor of the similarities.
      logit_bias: Added to the scaled similarities; None adds nothing. Has no effect with softmax.
      kind: softmax or sigmoid.
      tile: Rows and columns of the similarity matrix in memory at a time; 0, or b and more, means all. Need not divide
        b. Value and gradients change only by float32 rounding of sums.

    Returns:
      The loss in nats, float32, and retrieval accuracies in both directions.

    Raises:
      ValueError: With tiles, the mesh does not divide b.
    """
    if tile <= 0 or tile >= len(image_features):
        return from_similarities(similarities(image_features, text_features), logit_scale, logit_bias, kind=kind)
    bias = jnp.zeros((), jnp.float32) if logit_bias is None else logit_bias
    loss, *accuracies = tiled(kind, tile, image_features, text_features, logit_scale, bias)
    return loss, dict(zip(_ACCURACIES, accuracies, strict=True))


def from_similarities(
    similarities: Float[Array, "b b"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    kind: str = "softmax",
) -> tuple[Float[Array, ""], Metrics]:
    """`contrastive` without tiles: the plain formulas, used for small batches and as the reference for the tiles.

    Args:
      similarities: float32, images by texts of the global batch.
      logit_scale, logit_bias, kind: As for `contrastive`.
    """
    bias = jnp.zeros((), jnp.float32) if logit_bias is None else logit_bias
    logits = shard(similarities * logit_scale + bias, "batch", None)
    partners = jnp.eye(len(logits), dtype=bool)
    # Not jnp.diagonal: it is a gather, for which a mesh would move the logits.
    own = jnp.sum(jnp.where(partners, logits, 0), axis=1)
    if kind == "softmax":
        image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
        text_to_image = jnp.mean(jax.nn.logsumexp(logits, axis=0) - own)
        loss = (image_to_text + text_to_image) / 2
    else:
        loss = jnp.sum(pair_losses(logits, partners)) / len(logits)
    fixed, own = jax.lax.stop_gradient((logits, own))
    return loss, {name: jnp.mean(own >= jnp.max(fixed, axis)) for name, axis in zip(_ACCURACIES, (1, 0), strict=True)}
