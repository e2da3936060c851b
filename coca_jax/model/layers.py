"""Attention, MLP, and the pre-norm block, of stacks of which all three towers are made.

Axes: b batch, s queries of an attention (tokens), m its keys, d width, h heads, k head width, f MLP width, l layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from coca_jax import config
from coca_jax.model import stacks
from coca_jax.model.attention import Mask, attend, weights
from coca_jax.model.heads_first import attend_cached
from coca_jax.model.norms import LayerNorm
from coca_jax.model.products import Dense
from coca_jax.sharding import shard


@flax.struct.dataclass
class Cache:
    """Keys and values of one decoder layer, or of a stack of them with a leading layer axis `l`.

    Heads stand in front of positions, as attention reads them: XLA for CPUs otherwise turns all of them around for each
    token, which was two fifths of greedy decoding's time (docs/log.md).

    Attributes:
      keys, values: `[b, h, m, k]` of the tokens decoded so far; slots not yet written hold zeros.
      cross_keys, cross_values: `[b, h, q, k]` of the image tokens, computed once per image; None in the unimodal half.
    """

    keys: Float[Array, "*l b h m k"]
    values: Float[Array, "*l b h m k"]
    cross_keys: Float[Array, "*l b h q k"] | None = None
    cross_values: Float[Array, "*l b h q k"] | None = None


def layer_norm(model: config.Model, name: str | None = None) -> LayerNorm:
    """LayerNorm of the model's epsilon and dtypes."""
    return LayerNorm(model.norm_eps, jnp.dtype(model.dtype), jnp.dtype(model.param_dtype), name=name)


def dense(
    model: config.Model,
    outputs: tuple[int, ...],
    *,
    inputs: int = 1,
    use_bias: bool = True,
    name: str | None = None,
) -> Dense:
    """A product over the last `inputs` axes, which become `outputs`, and a bias; Glorot-uniform at first."""
    return Dense(
        outputs,
        inputs=inputs,
        use_bias=use_bias,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention with biases (Vaswani et al. 2017, section 3.2), split so that a cache can stand between.

    Attributes:
      model: for dtypes and the implementation.
      width: of the output, and of the heads together.
      heads: must divide width.
      kv_width: width of what is attended to.
      recompute: the backward pass computes the attention weights again.
    """

    model: config.Model
    width: int
    heads: int
    kv_width: int
    recompute: bool = False

    def setup(self) -> None:
        h, k = self.heads, self.width // self.heads
        self.query, self.key, self.value = (dense(self.model, (h, k)) for _ in range(3))  # bsd,dhk->bshk
        self.out = dense(self.model, (self.width,), inputs=2)  # bshk,hkd->bsd

    def project(self, x: Float[Array, "b m d"]) -> tuple[Float[Array, "b m h k"], Float[Array, "b m h k"]]:
        """Keys and values of what is attended to."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend_cached(
        self,
        x: Float[Array, "b s d"],
        keys: Float[Array, "b h m k"],
        values: Float[Array, "b h m k"],
        mask: Mask | None = None,
    ) -> Float[Array, "b s d"]:
        """Attention to what a cache holds, by XLA whatever is configured.

        There may be n rows of x for each row of keys, one after the other: captions of one image. They attend as more
        queries, so that what is known of the image is held and read once.
        """
        rows, length = x.shape[:2]
        if rows != keys.shape[0]:
            x = x.reshape(keys.shape[0], -1, x.shape[2])
        x = self._join(attend_cached(self._split(self.query(x)), keys, values, mask))
        return x if x.shape[0] == rows else x.reshape(rows, length, -1)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        kv: Float[Array, "b m d"] | None = None,
        mask: Mask | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "b s d"]:
        keys, values = self.project(x if kv is None else kv)
        mixed = attend(
            self._split(self.query(x)),
            keys,
            values,
            mask,
            is_causal=is_causal,
            implementation=self.model.attention,
            recompute=self.recompute,
        )
        return self._join(mixed)

    def weights(self, x: Float[Array, "b s d"], kv: Float[Array, "b m d"]) -> Float[Array, "b h s m"]:
        """What `__call__` weighs the values by."""
        return weights(self._split(self.query(x)), self._split(self.key(kv)))

    def _join(self, mixed: Float[Array, "b s h k"]) -> Float[Array, "b s d"]:
        joined: Array = self.out(shard(mixed, "batch", None, "heads", None))
        return joined

    def _split(self, x: Float[Array, "b m h k"]) -> Float[Array, "b m h k"]:
        return checkpoint_name(shard(x, "batch", None, "heads", None), "qkv")


def gelu(x: Float[Array, "*b f"], approximate: bool) -> Float[Array, "*b f"]:
    """`x Phi(x)` (Hendrycks and Gimpel 2016, arXiv 1606.08415), or its approximation by tanh.

    By erf in float32, as PyTorch has it: JAX's own is by erfc, which is more exact where the result is nearly 0, and
    took XLA for CPUs three times as long. Its derivative is computed again from x: autodiff would keep three more
    arrays of this size.
    """

    def by_erf(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)

    function = functools.partial(jax.nn.gelu, approximate=True) if approximate else by_erf
    return jax.checkpoint(function, prevent_cse=False)(x)


class Mlp(nn.Module):
    """`down(gelu(up(x)))`."""

    model: config.Model
    width: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = checkpoint_name(shard(dense(self.model, (self.mlp_dim,), name="up")(x), "batch", None, "mlp"), "up")
        return dense(self.model, (self.width,), name="down")(gelu(x, self.model.gelu == "tanh"))


class Block(nn.Module):
    """A pre-norm layer: `x + attention(norm(x))`, then cross-attention if it has one, then `x + mlp(norm(x))`.

    With `cross` the layer also reads image tokens: self-attention, cross-attention, MLP (the paper's order), or, with
    `text.cross_mlp`, self-attention, MLP, cross-attention, MLP (open_clip's).

    Attributes:
      model: for dtypes, epsilon and, with `cross`, `text.cross_mlp` and `text.cross_kv_norm`.
      width, heads, mlp_dim: of this tower.
      causal: a token sees itself and what came before.
      cross: reads image tokens `[b, q, width]`.
      recompute: the backward pass computes attention weights again.
    """

    model: config.Model
    width: int
    heads: int
    mlp_dim: int
    causal: bool = False
    cross: bool = False
    recompute: bool = False

    def setup(self) -> None:
        self.attention_norm = layer_norm(self.model)
        self.attention = Attention(self.model, self.width, self.heads, self.width, self.recompute)
        if self.cross:
            if self.model.text.cross_mlp:
                self.self_mlp_norm = layer_norm(self.model)
                self.self_mlp = Mlp(self.model, self.width, self.mlp_dim)
            self.cross_norm = layer_norm(self.model)
            if self.model.text.cross_kv_norm:
                self.cross_kv_norm = layer_norm(self.model)
            self.cross_attention = Attention(self.model, self.width, self.heads, self.width, self.recompute)
        self.mlp_norm = layer_norm(self.model)
        self.mlp = Mlp(self.model, self.width, self.mlp_dim)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        cache: Cache | None,
        image_tokens: Float[Array, "b q d"] | None,
        mask: Mask | None,
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "b s d"], Cache | None]:
        """One layer.

        Args:
          x: the tokens; while decoding, those from position `index` on.
          cache: None in training. While decoding: what the layer has seen before `index`.
          image_tokens: for a cross layer without a cache, or to fill one.
          mask: over keys; None with causal=True is the causal mask.
          index: while decoding: the position of x's first token.

        Returns:
          The tokens, and while decoding the keys and values of x's tokens alone (the caller writes them into its cache)
          with those of the image tokens if they were given.
        """
        y = self.attention_norm(x)
        new = None
        if cache is None:
            y = self.attention(y, mask=mask, is_causal=self.causal and mask is None)
        else:
            assert index is not None
            new = Cache(*heads_first(*self.attention.project(y)))
            seen = write(cache, new, index)
            y = self.attention.attend_cached(y, seen.keys, seen.values, mask)
        x = add(x, y)
        if self.cross:
            if self.model.text.cross_mlp:
                x = add(x, self.self_mlp(self.self_mlp_norm(x)))
            if image_tokens is not None and self.model.text.cross_kv_norm:
                image_tokens = self.cross_kv_norm(image_tokens)
            y = self.cross_norm(x)
            if new is None:
                assert image_tokens is not None
                y = self.cross_attention(y, image_tokens)
            else:
                if image_tokens is not None:
                    cross = heads_first(*self.cross_attention.project(image_tokens))
                    new = dataclasses.replace(new, cross_keys=cross[0], cross_values=cross[1])
                else:
                    assert cache is not None and cache.cross_keys is not None and cache.cross_values is not None
                    cross = cache.cross_keys, cache.cross_values
                y = self.cross_attention.attend_cached(y, *cross)
            x = add(x, y)
        return add(x, self.mlp(self.mlp_norm(x))), new


def heads_first(
    keys: Float[Array, "b m h k"], values: Float[Array, "b m h k"]
) -> tuple[Float[Array, "b h m k"], Float[Array, "b h m k"]]:
    """Keys and values as a cache holds them."""
    return keys.swapaxes(1, 2), values.swapaxes(1, 2)


def add(x: Float[Array, "b s d"], y: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """The tokens and what a sublayer adds to them."""
    return checkpoint_name(shard(x + y, "batch", None, "width"), "outputs")


def write(cache: Cache, new: Cache, index: Int[Array, ""]) -> Cache:
    """The cache with new keys and values at token position `index`, and new cross keys and values if there are some.

    Works on one layer and on a stack.
    """
    axis = cache.keys.ndim - 2

    def update(old: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), index, axis)

    cache = dataclasses.replace(cache, keys=update(cache.keys, new.keys), values=update(cache.values, new.values))
    if new.cross_keys is not None:
        cache = dataclasses.replace(cache, cross_keys=new.cross_keys, cross_values=new.cross_values)
    return cache


def stack(
    model: config.Model, *, depth: int, remat: str, scan_unroll: int, name: str | None = None, **block: Any
) -> Any:
    """`depth` blocks (`stacks.stack`): call it as a Block, `stack(x, cache, image_tokens, mask, index)`.

    The cache is stacked, or a tuple of each layer's, and what comes back is like it. Name it `blocks`.

    Args:
      model: configuration.
      depth, remat, scan_unroll: as for `stacks.stack`.
      name: where it is not assigned to a name.
      **block: attributes of Block.
    """
    axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
    block = {"model": model, "recompute": remat == "attention"} | block
    return stacks.stack(Block, block, axes, depth=depth, remat=remat, scan_unroll=scan_unroll, name=name)


def sincos(positions: Float[Array, " n"], width: int) -> Float[Array, "n d"]:
    """Fixed sine-cosine embedding of positions (Vaswani et al. 2017, section 3.5), sines first."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = positions[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
