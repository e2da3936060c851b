"""Softmax attention by the configured implementation: XLA's, cuDNN's kernel (GPU), or a flash kernel (TPU).

One function of queries, keys and values, `attend`; the projections around it are in layers.py. All implementations
agree to rounding wherever a token counts. The kernels never hold the weights `[b, h, s, m]`: `weights` computes them.

Axes: b batch, s queries of an attention (tokens), m its keys, h heads, k head width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coca_jax.model import heads_first
from coca_jax.sharding import per_shard

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

KERNEL_RESIDUALS = "attention_residuals"  # name of what the flash kernel's backward pass reads: its output and sums
# Runs the TPU kernel step by step in XLA, on any platform: for tests. Orders of magnitude slower.
INTERPRET = False
_LANES = 128  # of a TPU's vector unit: lengths are padded to whole lanes
_AXES = ("batch", None, "heads", None)


@flax.struct.dataclass
class Mask:
    """Who may see whom, twice: as any mask, and as what the flash kernel can take.

    Attributes:
      allowed: True where query s may see key m.
      query_segments, key_segments: a query sees the keys of its own segment that do not come after it. This must
        agree with `allowed` for queries that count; each query must see a key. None: XLA and cuDNN only.
    """

    allowed: Bool[Array, "*b 1 s m"]
    query_segments: Int[Array, "b s"] | None = None
    key_segments: Int[Array, "b m"] | None = None


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
      ValueError: flash is given a mask without segments.
    """
    if implementation == "xla":
        allowed = None if mask is None else mask.allowed
        core = functools.partial(_xla, is_causal=is_causal)
        return (jax.checkpoint(core) if recompute else core)(query, keys, values, allowed)
    arrays = ((query, _AXES), (keys, _AXES), (values, _AXES))
    if implementation == "cudnn":
        allowed = None
        if mask is not None:
            allowed = jnp.broadcast_to(mask.allowed, (query.shape[0], *mask.allowed.shape[1:]))
        run = functools.partial(_cudnn, is_causal=is_causal)
        return per_shard(run, *arrays, (allowed, ("batch", None, None, None)))
    assert implementation == "flash", implementation  # config.check knows no other
    segments: tuple[Array | None, Array | None] = (None, None)
    if mask is not None:
        if mask.query_segments is None or mask.key_segments is None:
            raise ValueError("the flash kernel takes no mask but segments: give them, or use the xla implementation")
        segments, is_causal = (mask.query_segments, mask.key_segments), True
    run = functools.partial(_flash, is_causal=is_causal)
    return per_shard(run, *arrays, *((part, ("batch", None)) for part in segments))


def weights(query: Float[Array, "b s h k"], keys: Float[Array, "b m h k"]) -> Float[Array, "b h s m"]:
    """What `attend` weighs the values by where there is no mask, float32: for looking at, not for training."""
    scores = jnp.einsum("bshk,bmhk->bhsm", query, keys, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)


def _xla(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b m h k"],
    values: Float[Array, "b m h k"],
    allowed: Bool[Array, "*b 1 s m"] | None,
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
    allowed: Bool[Array, "b 1 s m"] | None,
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
    query_segments: Int[Array, "b s"] | None,
    key_segments: Int[Array, "b m"] | None,
    *,
    is_causal: bool,
) -> Float[Array, "b s h k"]:
    """JAX's splash attention: lengths filled up to whole lanes, and what was filled in kept out by its segment."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second that few runs need

    b, s, h, k = query.shape
    m = keys.shape[1]
    more_s, more_m = -s % _LANES, -m % _LANES
    # Where it is causal, the keys that were filled in come after every query that counts.
    if query_segments is None and more_m and not is_causal:
        query_segments, key_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, m), jnp.int32)
    segments = None
    if query_segments is not None and key_segments is not None:
        # What was filled in is a segment of its own: in causal attention those keys see one another, and elsewhere
        # queries that were filled in see the first segment. A query without a key would divide by 0.
        edge = -1 if is_causal else 1
        segments = splash.SegmentIds(
            jnp.pad(query_segments, ((0, 0), (0, more_s)), constant_values=edge),
            jnp.pad(key_segments, ((0, 0), (0, more_m)), constant_values=-1),
        )
    query = query * jnp.asarray(k**-0.5, query.dtype)  # the kernel has no scale of its own
    query, keys, values = _pad(query, more_s), _pad(keys, more_m), _pad(values, more_m)
    kernel = _splash_kernel(h, s + more_s, m + more_m, is_causal)
    mixed: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (query, keys, values)), segments)
    return mixed.swapaxes(1, 2)[:, :s]


def _splash_kernel(heads: int, s: int, m: int, is_causal: bool) -> splash_attention_kernel.SplashAttentionKernel:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def block(length: int) -> int:
        return max(n for n in range(_LANES, 512 + 1, _LANES) if length % n == 0)

    q, kv = block(s), block(m)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((s, m)) if is_causal else splash.FullMask((s, m))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        residual_checkpoint_name=KERNEL_RESIDUALS,
        interpret=INTERPRET,
    )


def _pad(x: Float[Array, "b s h k"], more: int) -> Float[Array, "b s_more h k"]:
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
