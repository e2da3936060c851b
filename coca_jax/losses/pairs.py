"""The contrastive losses: which picture belongs to which text, among all of the global batch.

Axes: b rows of the global batch, e the contrastive space.
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
    """Contrastive loss over the global batch, whatever the mesh that `jax.set_mesh` has set, and without one.

    softmax: cross-entropy of each image among all texts and of each text among all images, the mean of both (CoCa,
    arXiv 2205.01917, equation 1; Radford et al. 2021). sigmoid: -log sigmoid(logit) of the pairs that belong together
    and -log sigmoid(-logit) of all others, their sum divided by b (SigLIP, arXiv 2303.15343, equation 1).

    Args:
      image_features, text_features: unit length; row i of one belongs to row i of the other.
      logit_scale: what the similarities are multiplied by.
      logit_bias: what is then added; None: nothing. It changes nothing with the softmax.
      kind: softmax | sigmoid.
      tile: rows and columns of the similarities that are held at a time; 0, or b and more: all at once. It need not
        divide b. Value and gradients are the same but for the rounding of float32 sums in another order.

    Returns:
      The loss in nats, float32, and the share of rows whose own partner scores highest, both ways.

    Raises:
      ValueError: in tiles, where the mesh does not divide b.
    """
    if tile <= 0 or tile >= len(image_features):
        return of_similarities(similarities(image_features, text_features), logit_scale, logit_bias, kind=kind)
    bias = jnp.zeros((), jnp.float32) if logit_bias is None else logit_bias
    loss, *accuracies = tiled(kind, tile, image_features, text_features, logit_scale, bias)
    return loss, dict(zip(_ACCURACIES, accuracies, strict=True))


def of_similarities(
    similarities: Float[Array, "b b"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    kind: str = "softmax",
) -> tuple[Float[Array, ""], Metrics]:
    """`contrastive` all at once: the plain formulas, which small batches use and the tiles are tested against.

    Args:
      similarities: float32, images by texts of the global batch.
      logit_scale, logit_bias, kind: as there.
    """
    bias = jnp.zeros((), jnp.float32) if logit_bias is None else logit_bias
    logits = shard(similarities * logit_scale + bias, "batch", None)
    partners = jnp.eye(len(logits), dtype=bool)
    # Not jnp.diagonal, a gather, for which a mesh would move logits.
    own = jnp.sum(jnp.where(partners, logits, 0), axis=1)
    if kind == "softmax":
        image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)
        text_to_image = jnp.mean(jax.nn.logsumexp(logits, axis=0) - own)
        loss = (image_to_text + text_to_image) / 2
    else:
        loss = jnp.sum(pair_losses(logits, partners)) / len(logits)
    fixed, own = jax.lax.stop_gradient((logits, own))
    return loss, {name: jnp.mean(own >= jnp.max(fixed, axis)) for name, axis in zip(_ACCURACIES, (1, 0), strict=True)}
