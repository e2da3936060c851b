"""Attentional poolers (CoCa paper, section 3.2; Lee et al. 2019): learned queries that attend to tokens."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from coca_jax import config
from coca_jax.model import layers, stacks


class Pooler(nn.Module):
    """Multi-head attention of `queries` learned queries over tokens, `[b, n, d]` -> `[b, queries, width]`.

    Queries and tokens are normalized before attention, the output after it; there is no residual connection and no MLP.

    Attributes:
      model: Model configuration; the width is the text decoder's, which reads the output.
      queries: Number of output vectors.
      kv_width: Width of the tokens.
    """

    model: config.Model
    queries: int
    kv_width: int

    def setup(self) -> None:
        m = self.model
        width = m.text.width
        self.query_tokens = self.param(
            "query_tokens", nn.initializers.normal(1.0), (self.queries, width), jnp.dtype(m.param_dtype)
        )
        self.query_norm, self.token_norm, self.out_norm = (layers.layer_norm(m) for _ in range(3))
        self.attention = stacks.rematerialize(layers.Attention, m.pooler.remat)(
            m, width, m.pooler.heads, self.kv_width, recompute=m.pooler.remat == "attention"
        )

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b q d"]:
        pooled = self.attention(*self._normalized(tokens))
        return self.out_norm(pooled)

    def weights(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b q n"]:
        """Attention weights of each query over the tokens: float32, mean over heads, summing to 1 per query."""
        return self.attention.weights(*self._normalized(tokens)).mean(axis=1)

    def _normalized(self, tokens: Float[Array, "b n d"]) -> tuple[Float[Array, "b q d"], Float[Array, "b n d"]]:
        query = self.query_norm(self.query_tokens.astype(jnp.dtype(self.model.dtype)))
        # The queries do not depend on the image: normalize once, project once per image in the attention.
        return jnp.broadcast_to(query[None], (tokens.shape[0], *query.shape)), self.token_norm(tokens)
