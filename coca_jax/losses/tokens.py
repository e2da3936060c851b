"""The captioning loss: next-token prediction without the logits `[b, t, v]` in memory.

Axes: b batch, t text tokens, c positions of a chunk, d width, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax.losses.parts import Axes, mesh_axes, per_device, scan_in_slices
from coca_jax.model.text_decoder import output_logits
from coca_jax.sharding import shard

TOKENS: Axes = (None, "batch")  # logical axes of arrays with an entry per token, t first


def targets(tokens: Int[Array, "b t"], pad_id: int) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """Next-token labels of each position, and weights: 1.0 where the label is a real token.

    The last position has no target; it is kept so that the length stays a round number.
    """
    labels = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], pad_id)], axis=1)
    return labels, (labels != pad_id).astype(jnp.float32)


def captioning(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], tokens: Int[Array, "b t"], *, pad_id: int, chunk: int
) -> Float[Array, ""]:
    """Next-token cross-entropy in nats, averaged over the real tokens of the global batch (CoCa equation 2).

    Sum and count are each reduced over the whole batch before dividing, so a device with short captions weighs less.
    """
    labels, weights = targets(tokens, pad_id)
    losses = token_losses(hidden, head, labels, chunk)
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def token_losses(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"], chunk: int
) -> Float[Array, "b t"]:
    """Cross-entropy of every position in nats, float32, computed in chunks of positions.

    The backward pass recomputes each chunk's logits, so `[b, t, v]` is never in memory. Value and gradients equal the
    unchunked computation up to rounding of sums; the head's gradient is accumulated in float32.

    Args:
      hidden: Decoder output; products use its dtype and accumulate in float32.
      head: Kernel of the output softmax.
      labels: Target token ids.
      chunk: Tokens per device whose logits are in memory at a time; at least one position of all its rows. 0, or all of
        its tokens and more, disables chunks. Need not divide anything.
    """
    b, t, _ = hidden.shape
    rows = mesh_axes("batch")[1]
    # Chunks split t, so that the batch stays sharded over the devices.
    positions = max(1, chunk * rows // b) if chunk > 0 else t
    if positions >= t:
        return _unchunked(hidden, head, labels)
    return _in_chunks(positions, hidden, head, labels)


def _unchunked(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """The plain formula, used for small batches and as the reference for the chunks."""
    logits = output_logits(hidden, head)
    # Compare and sum instead of a gather: it fuses, and it partitions over a sharded vocabulary.
    own = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, :] == labels[:, :, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the work is split over the mesh.

    Attributes:
      mapped: Each device computes its part; otherwise it is one computation that the compiler may split.
      vocab: Mesh axes that split the vocabulary.
    """

    mapped: bool
    vocab: tuple[str, ...]

    @property
    def head(self) -> Axes:
        """Logical axes of the head `[d, v]` during the computation."""
        return None, "vocab" if self.vocab else None

    def map(self, function: Callable[..., Any], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Any:
        return per_device(function, inputs, outputs) if self.mapped else function

    def first_id(self, size: int) -> Array | int:
        """First token id in this device's part of the vocabulary, which has `size` ids."""
        return jax.lax.axis_index(self.vocab) * size if self.vocab else 0

    def sum(self, x: Array) -> Array:
        """Sum over the parts of the vocabulary."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def maximum(self, x: Array) -> Array:
        return jax.lax.pmax(x, self.vocab) if self.vocab else x


def _split(rows: int, vocabulary: int) -> _Split:
    shards = mesh_axes("batch")[1]
    axes, parts = mesh_axes("vocab")
    mapped = shards * parts > 1 and rows % shards == 0
    return _Split(mapped, axes if mapped and parts > 1 and vocabulary % parts == 0 else ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
    positions: int, hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """`_unchunked` with `positions` positions in memory at a time.

    Each device computes its own rows with the whole head or its part of the vocabulary. Left to the compiler, a sharded
    head was gathered, and its gradient summed over devices, once per chunk; here it happens once.
    """
    return _forward(positions, hidden, head, labels)[0]


def _logits(
    hidden: Float[Array, "c b d"], head: Float[Array, "d v"], labels: Int[Array, "c b"], first_id: Array | int
) -> tuple[Float[Array, "c b v"], Bool[Array, "c b v"]]:
    """Logits of a chunk, and which of them belong to the labels."""
    logits = jnp.einsum("cbd,dv->cbv", hidden, head, preferred_element_type=jnp.float32)
    ids = first_id + jnp.arange(head.shape[1], dtype=labels.dtype)
    return logits, ids[None, None, :] == labels[:, :, None]


def _forward(positions: int, hidden: Array, head: Array, labels: Array) -> tuple[Array, Any]:
    split = _split(len(hidden), head.shape[1])

    def on_device(hidden: Array, head: Array, labels: Array) -> tuple[Array, Array, Array]:
        def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
            logits, own = _logits(part[0], head, part[1], split.first_id(head.shape[1]))
            top = split.maximum(jnp.max(logits, axis=-1))
            total = split.sum(jnp.sum(jnp.exp(logits - top[:, :, None]), axis=-1))
            return None, (top + jnp.log(total) - split.sum(jnp.sum(jnp.where(own, logits, 0.0), axis=-1)), top, total)

        return scan_in_slices(one, None, (hidden, labels), positions)[1]

    # t first: the scan runs along it.
    losses, top, total = split.map(on_device, (TOKENS, split.head, TOKENS), (TOKENS, TOKENS, TOKENS))(
        hidden.swapaxes(0, 1), head.astype(hidden.dtype), labels.swapaxes(0, 1)
    )
    return losses.swapaxes(0, 1), (hidden, head, labels, top, total)


def _backward(positions: int, residuals: Any, d_losses: Array) -> tuple[Array, Array, None]:
    hidden, head, labels, top, total = residuals
    split = _split(len(hidden), head.shape[1])

    def on_device(hidden: Array, head: Array, labels: Array, top: Array, total: Array, d_losses: Array) -> Any:
        def one(dhead: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            hidden, labels, top, total, d_losses = part
            logits, own = _logits(hidden, head, labels, split.first_id(head.shape[1]))
            probabilities = jnp.exp(logits - top[:, :, None]) / total[:, :, None]
            # Rounded to the hidden states' dtype: equal operand types, and half the memory with bfloat16.
            dlogits = ((probabilities - own) * d_losses[:, :, None]).astype(hidden.dtype)
            dhidden = jnp.einsum("cbv,dv->cbd", dlogits, head, preferred_element_type=jnp.float32)
            dhead += jnp.einsum("cbd,cbv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
            return dhead, split.sum(dhidden).astype(hidden.dtype)

        xs = (hidden, labels, top, total, d_losses)
        dhead, dhidden = scan_in_slices(one, jnp.zeros(head.shape, jnp.float32), xs, positions)
        return dhidden, dhead[None]

    dhidden, dheads = split.map(on_device, (TOKENS, split.head, *(TOKENS,) * 4), (TOKENS, ("batch", *split.head)))(
        hidden.swapaxes(0, 1), head.astype(hidden.dtype), labels.swapaxes(0, 1), top, total, d_losses.swapaxes(0, 1)
    )
    dhead = shard(jnp.sum(dheads, axis=0), "embed", "vocab")
    return dhidden.swapaxes(0, 1), dhead.astype(head.dtype), None


_in_chunks.defvjp(_forward, _backward)
