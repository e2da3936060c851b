"""Softmax attention by the configured implementation: XLA's, cuDNN's kernel (GPU), or a kernel of our own (TPU).

One function of queries, keys and values, `attend`; the projections around it are in layers.py. All implementations
agree to rounding. The kernels never hold the weights `[b, h, s, m]`: `weights` computes them.

Axes: b batch, s queries of an attention (tokens), m its keys, h heads, k head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coca_jax.model import heads_first
from coca_jax.sharding import per_shard

Mask = Bool[Array, "#b 1 s m"]  # True where query s may see key m
KERNEL_OUTPUT = "attention_output"  # name of the TPU kernel's result
_AXES = ("batch", None, "heads", None)


def attend(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    implementation: str = "xla",
    recompute: bool = False,
) -> Float[Array, "b s h k"]:
    """`softmax(query keys^T / sqrt(k)) values` for each head, softmax in float32 (Vaswani et al. 2017, section 3.2.1).

    Args:
      query, keys, values: of one dtype, which the result has too.
      mask: None with is_causal=False: every query sees every key.
      is_causal: a query sees its own position and those before; s = m.
      implementation: xla | cudnn | flash. A kernel runs on each device for its shards of the batch and heads.
      recompute: XLA's backward pass computes the weights again instead of keeping them, as the kernels always do.

    Raises:
      ValueError: flash is given more keys than its kernel takes.
    """
    if implementation == "xla":
        core = functools.partial(_xla, is_causal=is_causal)
        return (jax.checkpoint(core) if recompute else core)(query, keys, values, mask)
    if implementation == "cudnn" and mask is not None:
        mask = jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))
    run = functools.partial({"cudnn": _cudnn, "flash": _flash}[implementation], is_causal=is_causal)
    return per_shard(run, *((x, _AXES) for x in (query, keys, values)), (mask, ("batch", None, None, None)))


def weights(query: Float[Array, "b s h k"], keys: Float[Array, "b m h k"]) -> Float[Array, "b h s m"]:
    """What `attend` weighs the values by where there is no mask, float32: for looking at, not for training."""
    scores = jnp.einsum("bshk,bmhk->bhsm", query, keys, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)


def _xla(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Mask | None,
    *,
    is_causal: bool,
) -> Float[Array, "b s h k"]:
    if query.dtype == jnp.float32:
        return heads_first.attend(query, keys, values, allowed, is_causal=is_causal)
    return jax.nn.dot_product_attention(query, keys, values, mask=allowed, is_causal=is_causal)


def _cudnn(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Mask | None,
    *,
    is_causal: bool,
) -> Float[Array, "b s h k"]:
    s, m = query.shape[1], keys.shape[1]
    more_s, more_m = s % 2, m % 2  # JAX lets cuDNN's backward pass take even lengths only
    query, keys, values = _pad(query, more_s), _pad(keys, more_m), _pad(values, more_m)
    options: dict[str, Any] = {}
    if allowed is not None:
        options["mask"] = jnp.pad(allowed, ((0, 0), (0, 0), (0, more_s), (0, more_m)))
    elif more_m and not is_causal:  # where it is causal, the key that was filled in comes after every query that counts
        options["key_value_seq_lengths"] = jnp.full(query.shape[:1], m, jnp.int32)
    mixed = jax.nn.dot_product_attention(query, keys, values, is_causal=is_causal, implementation="cudnn", **options)
    return mixed[:, :s]


def _flash(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Mask | None,
    *,
    is_causal: bool,
) -> Float[Array, "b s h k"]:
    from coca_jax.model import tpu_attention  # Pallas takes a while to import, which only few runs need

    return tpu_attention.attend(query, keys, values, allowed, is_causal=is_causal)


def _pad(x: Float[Array, "b s h k"], more: int) -> Float[Array, "b s_more h k"]:
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
