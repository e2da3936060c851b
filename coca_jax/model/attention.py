"""Softmax attention by the configured implementation: XLA, the cuDNN kernel (GPU) or our Pallas kernel (TPU).

`attend` takes queries, keys and values; the projections around it are in layers.py. All implementations agree up to
rounding. The kernels never materialize the weights `[b, h, s, m]`; `weights` computes them for inspection.

Axes: b batch, s query positions, m key positions, h heads, k head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coca_jax.model import heads_first
from coca_jax.sharding import per_shard

Mask = Bool[Array, "#b 1 s m"]  # True where query s may attend to key m
KERNEL_OUTPUT = "attention_output"  # checkpoint name of the TPU kernel's result
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
    """`softmax(query keys^T / sqrt(k)) values` per head, with a float32 softmax (Vaswani et al. 2017, section 3.2.1).

    Args:
      query, keys, values: Arrays of one dtype, which is also the dtype of the result.
      mask: True where a query may attend to a key. None with is_causal=False lets every query attend to every key.
      is_causal: Each query attends to its own and earlier positions; requires s = m.
      implementation: xla, cudnn or flash. A kernel runs on each device for its shards of the batch and the heads.
      recompute: Recompute the weights in XLA's backward pass instead of storing them; the kernels always do.

    Raises:
      ValueError: flash is given more keys than its kernel supports.
    """
    if implementation == "xla":
        core = functools.partial(_xla, is_causal=is_causal)
        return (jax.checkpoint(core) if recompute else core)(query, keys, values, mask)
    if implementation == "cudnn" and mask is not None:
        mask = jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))
    run = functools.partial({"cudnn": _cudnn, "flash": _flash}[implementation], is_causal=is_causal)
    return per_shard(run, *((x, _AXES) for x in (query, keys, values)), (mask, ("batch", None, None, None)))


def weights(query: Float[Array, "b s h k"], keys: Float[Array, "b m h k"]) -> Float[Array, "b h s m"]:
    """Attention weights of `attend` without a mask, in float32; for inspection, not for training."""
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
    pad_s, pad_m = s % 2, m % 2  # JAX requires even lengths for cuDNN's backward pass
    query, keys, values = _pad(query, pad_s), _pad(keys, pad_m), _pad(values, pad_m)
    options: dict[str, Any] = {}
    if allowed is not None:
        options["mask"] = jnp.pad(allowed, ((0, 0), (0, 0), (0, pad_s), (0, pad_m)))
    elif pad_m and not is_causal:  # under a causal mask the padding key follows every real query
        options["key_value_seq_lengths"] = jnp.full(query.shape[:1], m, jnp.int32)
    output = jax.nn.dot_product_attention(query, keys, values, is_causal=is_causal, implementation="cudnn", **options)
    return output[:, :s]


def _flash(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Mask | None,
    *,
    is_causal: bool,
) -> Float[Array, "b s h k"]:
    from coca_jax.model import tpu_attention  # importing Pallas is slow and few runs need it

    return tpu_attention.attend(query, keys, values, allowed, is_causal=is_causal)


def _pad(x: Float[Array, "b s h k"], count: int) -> Float[Array, "b s_padded h k"]:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))
