"""A query transformer between image encoder and text decoder (BLIP-2, Li et al. 2023, arXiv 2301.12597, section 3).

Learned queries read the image, and their outputs stand for the image downstream. Queries and text share self-attention
and norms but have separate MLPs; only the queries attend to the image, in every second layer. Stage one trains the
bridge with a text input of its own and three objectives, which differ in their attention masks (figure 2). Stage two
uses the queries alone, projected to the width of the text decoder that reads them.

Axes: b batch, n image tokens, q queries, t text tokens, s queries and text together, d width, e contrastive space.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coca_jax import config
from coca_jax.model import layers, stacks
from coca_jax.model.attention import Mask
from coca_jax.model.heads import Linear
from coca_jax.model.text_decoder import embed_tokens
from coca_jax.sharding import shard

QUERY, CONTRASTIVE_TEXT, CAPTION_TEXT = range(3)  # kinds of tokens, by which the attention mask is built


class Layer(nn.Module):
    """Pre-norm layer: shared self-attention, cross-attention of the queries, separate MLPs for queries and text.

    Attributes:
      model: Model configuration; sizes come from `model.bridge`, the image tokens' width from `model.image.width`.
      reads: Whether the layer has cross-attention to the image.
    """

    model: config.Model
    reads: bool

    def setup(self) -> None:
        m, c = self.model, self.model.bridge
        recompute = m.text.remat == "attention"
        self.attention_norm = layers.layer_norm(m)
        self.attention = layers.Attention(m, c.width, c.heads, c.width, recompute)
        if self.reads:
            self.cross_norm = layers.layer_norm(m)
            self.cross_attention = layers.Attention(m, c.width, c.heads, m.image.width, recompute)
        self.query_mlp_norm, self.text_mlp_norm = layers.layer_norm(m), layers.layer_norm(m)
        self.query_mlp, self.text_mlp = (layers.Mlp(m, c.width, c.mlp_dim) for _ in range(2))

    def __call__(
        self, both: tuple[Float[Array, "b q d"], Float[Array, "b t d"]], image: Float[Array, "b n i"], mask: Mask | None
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b t d"]]:
        """Apply the layer. Either part of `both` may have length 0; without queries the image is unused."""
        q = both[0].shape[1]
        x = jnp.concatenate(both, axis=1)
        x = layers.add(x, self.attention(self.attention_norm(x), mask=mask))
        queries, text = x[:, :q], x[:, q:]
        if q:
            if self.reads:
                queries = layers.add(queries, self.cross_attention(self.cross_norm(queries), image))
            queries = layers.add(queries, self.query_mlp(self.query_mlp_norm(queries)))
        if text.shape[1]:
            text = layers.add(text, self.text_mlp(self.text_mlp_norm(text)))
        return queries, text


class Pair(nn.Module):
    """A layer with cross-attention followed by one without: the unit that the stack repeats."""

    model: config.Model

    def setup(self) -> None:
        self.reading, self.thinking = Layer(self.model, reads=True), Layer(self.model, reads=False)

    def __call__(self, both: tuple[Array, Array], image: Array, mask: Mask | None) -> tuple[tuple[Array, Array], None]:
        return self.thinking(self.reading(both, image, mask), image, mask), None


class Bridge(nn.Module):
    """The query transformer: with a text input in stage one (`model.bridge.stage`), with a projection in stage two."""

    model: config.Model

    def setup(self) -> None:
        m, c, text = self.model, self.model.bridge, self.model.text
        dtype, param_dtype = jnp.dtype(m.dtype), jnp.dtype(m.param_dtype)
        small = nn.initializers.normal(0.02)
        self.query_tokens = self.param("query_tokens", nn.initializers.normal(1.0), (c.queries, c.width), param_dtype)
        self.token_norm = layers.layer_norm(m)  # the image encoder has no final norm
        self.blocks = stacks.stack(
            Pair,
            {"model": m},
            (nn.broadcast, nn.broadcast),
            depth=c.depth // 2,
            remat=text.remat,
            scan_unroll=text.scan_unroll,
        )
        self.out_norm = layers.layer_norm(m)
        if c.stage == 1:
            self.token_embedding = nn.Embed(
                text.vocab_size, c.width, dtype=dtype, param_dtype=param_dtype, embedding_init=small
            )
            self.position_embedding = self.param("position_embedding", small, (text.length, c.width), param_dtype)
            self.cls_embedding = self.param("cls_embedding", small, (c.width,), param_dtype)
            self.text_norm = layers.layer_norm(m)
            self.matching = Linear(m, 2)
        else:
            self.projection = layers.dense(m, (text.width,))  # bqd,dw->bqw

    def image_tokens(self, image: Float[Array, "b n i"]) -> Float[Array, "b q w"]:
        """Image tokens for the text decoder, in its width (stage two)."""
        return self.projection(self.queries(image))

    def queries(self, image: Float[Array, "b n i"]) -> Float[Array, "b q d"]:
        """Query outputs for an image, without text."""
        return self._run(image, self._empty_text(image), None)[0]

    def text(self, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Text features: the output of [CLS], which replaces bos and attends to the whole text but to no query."""
        x, mask = self._embed(tokens, cls=True), objective_mask(tokens, self.model.text.pad_id, (CONTRASTIVE_TEXT,))
        return self.text_norm(self.blocks((x[:, :0], x), x, mask)[0][1][:, 0])

    def read(
        self, image: Float[Array, "b n i"], tokens: Int[Array, "b t"], *, contrastive: bool, captioning: bool
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b d"] | None, Float[Array, "b t d"] | None]:
        """Queries, `text` features and hidden states (for `head`) of a contrastive and a captioning text, in one pass.

        The caption attends to the queries and to its own earlier positions; the queries attend only to themselves. All
        three results equal those of three separate passes.
        """
        kinds = (CONTRASTIVE_TEXT,) * contrastive + (CAPTION_TEXT,) * captioning
        texts = [self._embed(tokens, cls=kind == CONTRASTIVE_TEXT) for kind in kinds]
        mask = objective_mask(tokens, self.model.text.pad_id, kinds, self.model.bridge.queries)
        queries, x = self._run(image, jnp.concatenate([*texts, self._empty_text(image)], axis=1), mask)
        x, t = self.text_norm(x), tokens.shape[1]
        return queries, x[:, 0] if contrastive else None, x[:, -t:] if captioning else None

    def match(self, image: Float[Array, "b n i"], tokens: Int[Array, "b t"]) -> Float[Array, "b 2"]:
        """float32 matching logits: class 1 for pairs that belong together, else class 0; no token is masked.

        The linear layer is applied to the mean of the queries, which equals the mean of its outputs.
        """
        allowed = padding_mask(tokens, self.model.text.pad_id, self.model.bridge.queries)
        queries, _ = self._run(image, self._embed(tokens, cls=True), allowed)
        return self.matching(jnp.mean(queries, axis=1))

    def head(self) -> Float[Array, "d v"]:
        """Kernel of the output softmax: the transposed token embedding."""
        return self.token_embedding.embedding.T

    def _embed(self, tokens: Int[Array, "b t"], *, cls: bool) -> Float[Array, "b t d"]:
        length = self.model.text.length
        if tokens.shape[1] > length:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than the {length} positions of the model")
        x = embed_tokens(self.token_embedding, tokens)
        if cls:
            first = jnp.broadcast_to(self.cls_embedding.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x[:, 1:]], axis=1)
        x = x + self.position_embedding[: x.shape[1]].astype(x.dtype)[None]
        return shard(x, "batch", None, "width")

    def _empty_text(self, image: Float[Array, "b n i"]) -> Float[Array, "b 0 d"]:
        return jnp.zeros((image.shape[0], 0, self.model.bridge.width), image.dtype)

    def _run(
        self, image: Float[Array, "b n i"], text: Float[Array, "b s d"], mask: Mask | None
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b s d"]]:
        query = jnp.broadcast_to(self.query_tokens.astype(text.dtype)[None], (len(image), *self.query_tokens.shape))
        queries, text = self.blocks((query, text), self.token_norm(image), mask)[0]
        return self.out_norm(queries), text


def objective_mask(tokens: Int[Array, "b t"], pad_id: int, kinds: tuple[int, ...], queries: int = 0) -> Mask:
    """Attention mask of the contrastive and captioning objectives (figure 2), with one copy of the text for each.

    Queries attend to queries. The contrastive text attends to itself, the caption to its earlier positions and to the
    queries. Nothing attends to padding.

    Args:
      tokens: Token ids, padded at the end.
      pad_id: Id of the padding token.
      kinds: CONTRASTIVE_TEXT or CAPTION_TEXT for each copy of the text, in the order in which they follow the queries.
      queries: Number of queries in front of the text.
    """
    t = tokens.shape[1]
    kind = jnp.concatenate([jnp.full(queries, QUERY), *(jnp.full(t, k) for k in kinds)])
    position = jnp.concatenate([jnp.arange(queries), *(jnp.arange(t) for _ in kinds)])
    query_kind, key_kind = kind[:, None], kind[None]
    own = (query_kind == key_kind) & ((query_kind != CAPTION_TEXT) | (position[:, None] >= position[None]))
    allowed = own | ((query_kind == CAPTION_TEXT) & (key_kind == QUERY))
    return allowed[None, None] & padding_mask(tokens, pad_id, queries, len(kinds))


def padding_mask(tokens: Int[Array, "b t"], pad_id: int, queries: int, texts: int = 1) -> Bool[Array, "b 1 s s"]:
    """Mask of the matching objective: every token attends to all queries and to all text except padding."""
    real = jnp.concatenate([jnp.ones((len(tokens), queries), bool), *[tokens != pad_id] * texts], axis=1)
    return jnp.broadcast_to(real[:, None, None], (len(real), 1, real.shape[1], real.shape[1]))


def similarities(image_features: Float[Array, "b q e"], text_features: Float[Array, "c e"]) -> Float[Array, "b c"]:
    """Largest dot product of each text with an image's queries. float32, at "highest" precision."""
    options = {"preferred_element_type": jnp.float32, "precision": "highest"}
    return jnp.max(jnp.einsum("bqe,ce->bqc", image_features, text_features, **options), axis=1)


def hard_pairs(
    logits: Float[Array, "b b"], tokens: Int[Array, "b t"], key: Key[Array, ""]
) -> tuple[Int[Array, " 3b"], Int[Array, " 3b"], Int[Array, " 3b"]]:
    """Pairs for the matching objective: true pairs, images with a wrong text, texts with a wrong image.

    Wrong partners are drawn from the GLOBAL batch by the contrastive softmax: similar ones are likelier (Li et al.
    2021, arXiv 2107.07651). A text identical to the image's own is never drawn as wrong, whichever row it is from.

    Args:
      logits: Contrastive logits, image rows by text columns.
      tokens: Token ids of the texts.
      key: Random key.

    Returns:
      Rows of the images, rows of the texts, and labels: 1 for pairs that belong together. Labels are 0 beyond the first
      third, unless the batch holds no wrong partner.
    """
    same = jnp.all(tokens[:, None] == tokens[None], axis=-1)
    wrong = jnp.where(same, jnp.finfo(jnp.float32).min, logits)
    image_key, text_key = jax.random.split(key)
    own = jnp.arange(len(tokens))
    texts = jnp.concatenate([own, jax.random.categorical(image_key, wrong, axis=1), own])
    images = jnp.concatenate([own, own, jax.random.categorical(text_key, wrong, axis=0)])
    return images, texts, same[images, texts].astype(jnp.int32)
