"""A query transformer between image encoder and text decoder (BLIP-2, Li et al. 2023, arXiv 2301.12597, section 3).

Learned queries read the image; what comes out of them is the image for whoever reads it. Queries and text go through
the same self-attention and norms, each through MLPs of its own; queries alone attend to the image, in every second
layer. Stage one: a text of the bridge's own and three objectives, which differ in who may see whom (figure 2). Stage
two: the queries alone, projected to the width of the text decoder that reads them.

Axes: b batch, n image tokens, q queries, t text tokens, s queries and texts together, d width, e the contrastive space.
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
from coca_jax.model.text_decoder import look_up
from coca_jax.sharding import shard

QUERY, COMPARED, WRITTEN = range(3)  # what a token is: a query, of the text that is compared, of the text to predict


class Layer(nn.Module):
    """Pre-norm: self-attention of queries and text together, cross-attention of the queries, an MLP for each.

    Attributes:
      model: sizes are those of `model.bridge`, and `model.image.width` of what is read.
      reads: has cross-attention.
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
        """Either of the two may have length 0; the image is then read by nobody, or no text is there."""
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
    """A layer that reads the image and one that does not: what the stack repeats."""

    model: config.Model

    def setup(self) -> None:
        self.reading, self.thinking = Layer(self.model, reads=True), Layer(self.model, reads=False)

    def __call__(self, both: tuple[Array, Array], image: Array, mask: Mask | None) -> tuple[tuple[Array, Array], None]:
        return self.thinking(self.reading(both, image, mask), image, mask), None


class Bridge(nn.Module):
    """The query transformer; in stage one (`model.bridge.stage`) with a text, in stage two with a projection."""

    model: config.Model

    def setup(self) -> None:
        m, c, text = self.model, self.model.bridge, self.model.text
        dtype, param_dtype = jnp.dtype(m.dtype), jnp.dtype(m.param_dtype)
        small = nn.initializers.normal(0.02)
        self.query_tokens = self.param("query_tokens", nn.initializers.normal(1.0), (c.queries, c.width), param_dtype)
        self.token_norm = layers.layer_norm(m)  # the image encoder has none at its end
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
        """Stage two: what the text decoder reads, of its width."""
        return self.projection(self.queries(image))

    def queries(self, image: Float[Array, "b n i"]) -> Float[Array, "b q d"]:
        """What the queries make of the image."""
        return self._run(image, self._no_text(image), None)[0]

    def text(self, tokens: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """The output of [CLS], which stands in the place of bos and sees all of the text and no query."""
        x, mask = self._embed(tokens, cls=True), who_sees_whom(tokens, self.model.text.pad_id, (COMPARED,))
        return self.text_norm(self.blocks((x[:, :0], x), x, mask)[0][1][:, 0])

    def read(
        self, image: Float[Array, "b n i"], tokens: Int[Array, "b t"], *, contrastive: bool, captioning: bool
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b d"] | None, Float[Array, "b t d"] | None]:
        """One pass for both: queries, `text`, and hidden states whose product with `head` is the logits.

        The text to predict sees the queries and what came before, the queries see themselves: all three are what three
        passes would give.
        """
        kinds = (COMPARED,) * contrastive + (WRITTEN,) * captioning
        texts = [self._embed(tokens, cls=kind == COMPARED) for kind in kinds]
        mask = who_sees_whom(tokens, self.model.text.pad_id, kinds, self.model.bridge.queries)
        queries, x = self._run(image, jnp.concatenate([*texts, self._no_text(image)], axis=1), mask)
        x, t = self.text_norm(x), tokens.shape[1]
        return queries, x[:, 0] if contrastive else None, x[:, -t:] if captioning else None

    def match(self, image: Float[Array, "b n i"], tokens: Int[Array, "b t"]) -> Float[Array, "b 2"]:
        """float32 logits of whether text and image do not, and do, belong together.

        All see all. The mean over the queries of what a linear layer makes of each, which is that of their mean.
        """
        allowed = seen_by_all(tokens, self.model.text.pad_id, self.model.bridge.queries)
        queries, _ = self._run(image, self._embed(tokens, cls=True), allowed)
        return self.matching(jnp.mean(queries, axis=1))

    def head(self) -> Float[Array, "d v"]:
        """The output softmax's kernel: the token embedding, transposed."""
        return self.token_embedding.embedding.T

    def _embed(self, tokens: Int[Array, "b t"], *, cls: bool) -> Float[Array, "b t d"]:
        length = self.model.text.length
        if tokens.shape[1] > length:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than the {length} positions of the model")
        x = look_up(self.token_embedding, tokens)
        if cls:
            first = jnp.broadcast_to(self.cls_embedding.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x[:, 1:]], axis=1)
        x = x + self.position_embedding[: x.shape[1]].astype(x.dtype)[None]
        return shard(x, "batch", None, "width")

    def _no_text(self, image: Float[Array, "b n i"]) -> Float[Array, "b 0 d"]:
        return jnp.zeros((image.shape[0], 0, self.model.bridge.width), image.dtype)

    def _run(
        self, image: Float[Array, "b n i"], text: Float[Array, "b s d"], mask: Mask | None
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b s d"]]:
        query = jnp.broadcast_to(self.query_tokens.astype(text.dtype)[None], (len(image), *self.query_tokens.shape))
        queries, text = self.blocks((query, text), self.token_norm(image), mask)[0]
        return self.out_norm(queries), text


def who_sees_whom(tokens: Int[Array, "b t"], pad_id: int, kinds: tuple[int, ...], queries: int = 0) -> Mask:
    """The masks of the contrastive and of the captioning objective (figure 2), for the same text once for each.

    Queries see queries. The text that is compared sees itself, the text to predict what came before and the queries.
    Nobody sees padding.

    Args:
      tokens: ids, padded behind.
      pad_id: of padding.
      kinds: COMPARED, WRITTEN: what the texts behind the queries are, in their order.
      queries: how many come first.
    """
    t = tokens.shape[1]
    kind = jnp.concatenate([jnp.full(queries, QUERY), *(jnp.full(t, k) for k in kinds)])
    place = jnp.concatenate([jnp.arange(queries), *(jnp.arange(t) for _ in kinds)])
    sees, seen = (kind[:, None], place[:, None]), (kind[None], place[None])
    own = (sees[0] == seen[0]) & ((sees[0] != WRITTEN) | (sees[1] >= seen[1]))
    allowed = own | ((sees[0] == WRITTEN) & (seen[0] == QUERY))
    return allowed[None, None] & seen_by_all(tokens, pad_id, queries, len(kinds))


def seen_by_all(tokens: Int[Array, "b t"], pad_id: int, queries: int, texts: int = 1) -> Bool[Array, "b 1 s s"]:
    """Queries and text that is not padding, for everyone: the mask of matching, where all see all."""
    real = jnp.concatenate([jnp.ones((len(tokens), queries), bool), *[tokens != pad_id] * texts], axis=1)
    return jnp.broadcast_to(real[:, None, None], (len(real), 1, real.shape[1], real.shape[1]))


def similarities(image_features: Float[Array, "b q e"], text_features: Float[Array, "c e"]) -> Float[Array, "b c"]:
    """The scalar product of a text with that of an image's queries which is nearest to it. float32, "highest"."""
    options = {"preferred_element_type": jnp.float32, "precision": "highest"}
    return jnp.max(jnp.einsum("bqe,ce->bqc", image_features, text_features, **options), axis=1)


def hard_pairs(
    logits: Float[Array, "b b"], tokens: Int[Array, "b t"], key: Key[Array, ""]
) -> tuple[Int[Array, " 3b"], Int[Array, " 3b"], Int[Array, " 3b"]]:
    """Pairs to tell right from wrong: each image with its text, with a wrong text, each text with a wrong image.

    The wrong ones are drawn from the GLOBAL batch as the contrastive softmax has them, likelier the more alike (Li et
    al. 2021, arXiv 2107.07651). A text that is the image's own word for word is not wrong, whosever it is.

    Args:
      logits: of image row and text column.
      tokens: the texts.
      key: of the draw.

    Returns:
      Rows of the images, rows of the texts, and 1 where they belong together; 0 but in the first third, unless there
      is no wrong one to draw.
    """
    same = jnp.all(tokens[:, None] == tokens[None], axis=-1)
    wrong = jnp.where(same, jnp.finfo(jnp.float32).min, logits)
    of_images, of_texts = jax.random.split(key)
    own = jnp.arange(len(tokens))
    texts = jnp.concatenate([own, jax.random.categorical(of_images, wrong, axis=1), own])
    images = jnp.concatenate([own, own, jax.random.categorical(of_texts, wrong, axis=0)])
    return images, texts, same[images, texts].astype(jnp.int32)
