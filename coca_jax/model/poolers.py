"""Attentional poolers (CoCa paper, section 3.2; Lee et al. 2019): learned queries that attend to tokens."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from coca_jax import config
from coca_jax.model import layers


class Pooler(nn.Module):
    """One multi-head attention of `queries` learned queries over tokens `[b, n, d]` -> `[b, queries, width]`.

    Queries and tokens are normalised before, the result after; there is no residual and no MLP.

    Attributes:
      model: for heads, width (that of the text decoder, which reads the result) and dtypes.
      queries: how many vectors come out.
    """

    model: config.Model
    queries: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b q d"]:
        m = self.model
        width = m.text.width
        query = self.param("query_tokens", nn.initializers.normal(1.0), (self.queries, width), jnp.dtype(m.param_dtype))
        query = layers.layer_norm(m, "query_norm")(query.astype(jnp.dtype(m.dtype)))
        # The queries are the same for every image: normalised once, and projected once per image by the attention.
        query = jnp.broadcast_to(query[None], (tokens.shape[0], *query.shape))
        tokens = layers.layer_norm(m, "token_norm")(tokens)
        attention = layers.rematerialised(layers.Attention, m.pooler.remat)(
            m, width, m.pooler.heads, tokens.shape[-1], recompute=m.pooler.remat == "attention", name="attention"
        )
        pooled = attention(query, tokens)
        return layers.layer_norm(m, "out_norm")(pooled)
