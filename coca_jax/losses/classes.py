"""The classification loss. Axes: b batch, c classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coca_jax.losses.pairs import Metrics


def classification(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], *, smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """Softmax cross-entropy in nats, averaged over the global batch, and the accuracy.

    Args:
      logits: float32 class logits.
      labels: Class labels, 0 to c - 1.
      smoothing: Share of the target spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).
    """
    log_probs = jax.nn.log_softmax(logits)
    correct = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    losses = -(1.0 - smoothing) * correct - smoothing * jnp.mean(log_probs, axis=1)
    accuracy = jnp.mean((jnp.argmax(logits, axis=1) == labels).astype(jnp.float32))
    loss = jnp.mean(losses)
    return loss, {"loss/classification": loss, "accuracy": accuracy}
