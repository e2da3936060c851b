"""The captioning loss: the next token, without the logits `[b, t, v]` in memory.

Axes: b batch, t text tokens, c those of a chunk, d width, v vocabulary.
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

TOKENS: Axes = (None, "batch")  # logical axes of what has a number or a vector for every token, t in front


def targets(tokens: Int[Array, "b t"], pad_id: int) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """What each position predicts, the token after it, and 1.0 where that is a real token.

    The last position predicts nothing; keeping it keeps the length a round number.
    """
    labels = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], pad_id)], axis=1)
    return labels, (labels != pad_id).astype(jnp.float32)


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


def token_losses(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"], chunk: int
) -> Float[Array, "b t"]:
    """Cross-entropy of every position in nats, float32, with the logits of some tokens in memory at a time.

    The backward pass computes each chunk's logits again, so that `[b, t, v]` is never held. Value and gradients are
    those of all at once, but for the rounding of sums in another order; the head's gradient is summed up in float32.

    Args:
      hidden: the decoder's output; its dtype is that of the products, which are accumulated in float32.
      head: the output softmax's kernel.
      labels: the right ids.
      chunk: tokens of a device whose logits are held at a time; at least one position of all its rows. 0, or as many
        as there are: all at once. It need not divide anything.
    """
    b, t, _ = hidden.shape
    rows = mesh_axes("batch")[1]
    # Chunks are cut along t: the batch stays split over the devices as it is.
    positions = max(1, chunk * rows // b) if chunk > 0 else t
    if positions >= t:
        return _at_once(hidden, head, labels)
    return _in_chunks(positions, hidden, head, labels)


def _at_once(
    hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """The plain formula: what small batches use, and what the chunks are tested against."""
    logits = output_logits(hidden, head)
    # A comparison and a sum, not a gather: it fuses, and it partitions over a sharded vocabulary.
    own = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, :] == labels[:, :, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """How the work is split over the mesh.

    Attributes:
      mapped: each device does its part; otherwise all of it is one computation, which the compiler may split.
      vocab: axes of the mesh over which the vocabulary is split.
    """

    mapped: bool
    vocab: tuple[str, ...]

    @property
    def head(self) -> Axes:
        """Logical axes of the head `[d, v]` while it is worked with."""
        return None, "vocab" if self.vocab else None

    def map(self, function: Callable[..., Any], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Any:
        return per_device(function, inputs, outputs) if self.mapped else function

    def first_id(self, held: int) -> Array | int:
        """The first id of a device's part of the vocabulary, of which it holds so many."""
        return jax.lax.axis_index(self.vocab) * held if self.vocab else 0

    def sum(self, x: Array) -> Array:
        """Over the parts of the vocabulary."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def maximum(self, x: Array) -> Array:
        return jax.lax.pmax(x, self.vocab) if self.vocab else x


def _place(rows: int, vocabulary: int) -> _Place:
    shards = mesh_axes("batch")[1]
    axes, parts = mesh_axes("vocab")
    mapped = shards * parts > 1 and rows % shards == 0
    return _Place(mapped, axes if mapped and parts > 1 and vocabulary % parts == 0 else ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
    positions: int, hidden: Float[Array, "b t d"], head: Float[Array, "d v"], labels: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """`_at_once` with that many positions in memory at a time.

    Each device works on its own rows with all of the head, or its part of the vocabulary. Left to the compiler, a
    sharded head was gathered, and its gradient summed over the devices, in every chunk anew; here it happens once.
    """
    return _forward(positions, hidden, head, labels)[0]


def _logits(
    hidden: Float[Array, "c b d"], head: Float[Array, "d v"], labels: Int[Array, "c b"], first_id: Array | int
) -> tuple[Float[Array, "c b v"], Bool[Array, "c b v"]]:
    """A chunk's logits, and which of them are the labels'."""
    logits = jnp.einsum("cbd,dv->cbv", hidden, head, preferred_element_type=jnp.float32)
    ids = first_id + jnp.arange(head.shape[1], dtype=labels.dtype)
    return logits, ids[None, None, :] == labels[:, :, None]


def _forward(positions: int, hidden: Array, head: Array, labels: Array) -> tuple[Array, Any]:
    place = _place(len(hidden), head.shape[1])

    def on_device(hidden: Array, head: Array, labels: Array) -> tuple[Array, Array, Array]:
        def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
            logits, own = _logits(part[0], head, part[1], place.first_id(head.shape[1]))
            top = place.maximum(jnp.max(logits, axis=-1))
            total = place.sum(jnp.sum(jnp.exp(logits - top[:, :, None]), axis=-1))
            return None, (top + jnp.log(total) - place.sum(jnp.sum(jnp.where(own, logits, 0.0), axis=-1)), top, total)

        return scan_in_slices(one, None, (hidden, labels), positions)[1]

    # t in front: it is what the scan goes along.
    losses, top, total = place.map(on_device, (TOKENS, place.head, TOKENS), (TOKENS, TOKENS, TOKENS))(
        hidden.swapaxes(0, 1), head.astype(hidden.dtype), labels.swapaxes(0, 1)
    )
    return losses.swapaxes(0, 1), (hidden, head, labels, top, total)


def _backward(positions: int, kept: Any, slopes: Array) -> tuple[Array, Array, None]:
    hidden, head, labels, top, total = kept
    place = _place(len(hidden), head.shape[1])

    def on_device(hidden: Array, head: Array, labels: Array, top: Array, total: Array, slopes: Array) -> Any:
        def one(dhead: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            hidden, labels, top, total, slopes = part
            logits, own = _logits(hidden, head, labels, place.first_id(head.shape[1]))
            probabilities = jnp.exp(logits - top[:, :, None]) / total[:, :, None]
            # Rounded as the hidden states are: operands of one type, and half the memory with bfloat16.
            dlogits = ((probabilities - own) * slopes[:, :, None]).astype(hidden.dtype)
            dhidden = jnp.einsum("cbv,dv->cbd", dlogits, head, preferred_element_type=jnp.float32)
            dhead += jnp.einsum("cbd,cbv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
            return dhead, place.sum(dhidden).astype(hidden.dtype)

        xs = (hidden, labels, top, total, slopes)
        dhead, dhidden = scan_in_slices(one, jnp.zeros(head.shape, jnp.float32), xs, positions)
        return dhidden, dhead[None]

    dhidden, dheads = place.map(on_device, (TOKENS, place.head, *(TOKENS,) * 4), (TOKENS, ("batch", *place.head)))(
        hidden.swapaxes(0, 1), head.astype(hidden.dtype), labels.swapaxes(0, 1), top, total, slopes.swapaxes(0, 1)
    )
    dhead = shard(jnp.sum(dheads, axis=0), "embed", "vocab")
    return dhidden.swapaxes(0, 1), dhead.astype(head.dtype), None


_in_chunks.defvjp(_forward, _backward)
