"""Attention, MLP and the pre-norm block, the layers of all three towers.

Axes: b batch, s query positions, m key positions, d width, h heads, k head width, f MLP width, l layers.
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
    """Keys and values of one decoder layer, or of a stack of layers with a leading axis `l`.

    Heads come before positions, the order attention reads them in. XLA for CPUs otherwise transposes the whole cache
    for each token, which was two fifths of the time of greedy decoding (docs/log.md).

    Attributes:
      keys, values: `[b, h, m, k]`, of the tokens decoded so far; unwritten slots hold zeros.
      cross_keys, cross_values: `[b, h, q, k]`, of the image tokens, computed once per image; None if unimodal.
    """

    keys: Float[Array, "*l b h m k"]
    values: Float[Array, "*l b h m k"]
    cross_keys: Float[Array, "*l b h q k"] | None = None
    cross_values: Float[Array, "*l b h q k"] | None = None


def layer_norm(model: config.Model, name: str | None = None) -> LayerNorm:
    """LayerNorm with the model's epsilon and dtypes."""
    return LayerNorm(model.norm_eps, jnp.dtype(model.dtype), jnp.dtype(model.param_dtype), name=name)


def dense(
    model: config.Model,
    outputs: tuple[int, ...],
    *,
    inputs: int = 1,
    use_bias: bool = True,
    name: str | None = None,
) -> Dense:
    """Linear layer that contracts the last `inputs` axes into `outputs`, with bias; Glorot-uniform initialization."""
    return Dense(
        outputs,
        inputs=inputs,
        use_bias=use_bias,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention with biases (Vaswani et al. 2017, section 3.2), in parts that a cache can be put between.

    Attributes:
      model: Model configuration, for dtypes and the implementation.
      width: Width of the output, and of all heads together.
      heads: Number of heads; must divide width.
      kv_width: Width of the tokens that keys and values are computed from.
      recompute: Recompute the attention weights in the backward pass.
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
        """Keys and values of the tokens `x`."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend_cached(
        self,
        x: Float[Array, "b s d"],
        keys: Float[Array, "b h m k"],
        values: Float[Array, "b h m k"],
        mask: Mask | None = None,
    ) -> Float[Array, "b s d"]:
        """Attend to cached keys and values, in XLA whatever implementation is configured.

        x may have n consecutive rows for each row of keys: several captions of one image. They are treated as
        additional queries, so that the image's keys and values are stored and read once.
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
        output = attend(
            self._split(self.query(x)),
            keys,
            values,
            mask,
            is_causal=is_causal,
            implementation=self.model.attention,
            recompute=self.recompute,
        )
        return self._join(output)

    def weights(self, x: Float[Array, "b s d"], kv: Float[Array, "b m d"]) -> Float[Array, "b h s m"]:
        """Attention weights of `__call__`."""
        return weights(self._split(self.query(x)), self._split(self.key(kv)))

    def _join(self, output: Float[Array, "b s h k"]) -> Float[Array, "b s d"]:
        joined: Array = self.out(shard(output, "batch", None, "heads", None))
        return joined

    def _split(self, x: Float[Array, "b m h k"]) -> Float[Array, "b m h k"]:
        return checkpoint_name(shard(x, "batch", None, "heads", None), "qkv")


def gelu(x: Float[Array, "*b f"], approximate: bool) -> Float[Array, "*b f"]:
    """`x Phi(x)` (Hendrycks and Gimpel 2016, arXiv 1606.08415), or its tanh approximation.

    Uses erf in float32, as PyTorch does: JAX's own erfc form is more exact for results near 0 but took XLA for CPUs
    three times as long. The derivative is recomputed from x, because autodiff would store three more arrays of this
    size.
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
    """A pre-norm layer: `x + attention(norm(x))`, optional cross-attention, then `x + mlp(norm(x))`.

    With `cross` the order is self-attention, cross-attention, MLP (the paper), or with `text.cross_mlp` self-attention,
    MLP, cross-attention, MLP (open_clip).

    Attributes:
      model: Model configuration, for dtypes, epsilon and, with `cross`, `text.cross_mlp` and `text.cross_kv_norm`.
      width, heads, mlp_dim: Sizes of this tower.
      causal: Each token attends to itself and earlier tokens.
      cross: Cross-attend to image tokens `[b, q, width]`.
      recompute: Recompute attention weights in the backward pass.
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
        """Apply the layer.

        Args:
          x: Tokens; in decoding, those from position `index` on.
          cache: Cached keys and values of the positions before `index`; None in training.
          image_tokens: Image tokens for a cross layer that has no cache, or whose cache is still to be filled.
          mask: Mask over keys; None with causal=True is the causal mask.
          index: Position of x's first token, in decoding.

        Returns:
          The output tokens and, in decoding, the keys and values of x's tokens alone, together with those of the image
          tokens if given. The caller writes them into its cache.
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
    """Transpose keys and values into the cache's layout."""
    return keys.swapaxes(1, 2), values.swapaxes(1, 2)


def add(x: Float[Array, "b s d"], y: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """Residual connection: tokens plus the output of a sublayer."""
    return checkpoint_name(shard(x + y, "batch", None, "width"), "outputs")


def write(cache: Cache, new: Cache, index: Int[Array, ""]) -> Cache:
    """Write new keys and values into the cache at position `index`, and new cross keys and values if there are any.

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
    """`depth` blocks (see `stacks.stack`), called like a Block: `stack(x, cache, image_tokens, mask, index)`.

    The cache is stacked or a tuple with one entry per layer; the returned cache has the same form. Name the module
    `blocks`.

    Args:
      model: Model configuration.
      depth, remat, scan_unroll: As for `stacks.stack`.
      name: Module name, if it is not assigned to an attribute.
      **block: Attributes of Block.
    """
    axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
    block = {"model": model, "recompute": remat == "attention"} | block
    return stacks.stack(Block, block, axes, depth=depth, remat=remat, scan_unroll=scan_unroll, name=name)


def sincos(positions: Float[Array, " n"], width: int) -> Float[Array, "n d"]:
    """Fixed sine-cosine position embedding (Vaswani et al. 2017, section 3.5), sines first."""
    frequency = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = positions[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
