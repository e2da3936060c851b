"""CoCa (Yu et al. 2022, arXiv 2205.01917): one image pass and one text pass serve both objectives.

Axes: b batch, n patch tokens, q pooled image tokens, t text tokens, d width, e contrastive space, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from coca_jax import config
from coca_jax.model.bridge import Bridge, hard_pairs, similarities
from coca_jax.model.heads import Classifier, last_text_token
from coca_jax.model.image_encoder import ImageEncoder
from coca_jax.model.poolers import Pooler
from coca_jax.model.text_decoder import DecoderCache, TextDecoder, output_logits
from coca_jax.sharding import shard

MAX_LOG_SCALE = math.log(100.0)  # the logit scale is clipped to [1, 100] (Radford et al. 2021, section 2.5)


@flax.struct.dataclass
class Output:
    """Results of a forward pass; parts that were not requested are None.

    Attributes:
      image_features: `[b, e]` float32, unit length; `[b, q, e]` for a bridge in stage one.
      text_features: `[b, e]` float32, unit length.
      image_tokens: `[b, q, d]`, the input of the multimodal decoder's cross-attention.
      hidden: `[b, t, d]`, output of the multimodal decoder; `hidden @ head` gives the logits.
      logits: `[b, t, v]` float32; position i predicts token i + 1.
      class_logits: `[b, c]` float32, from model.head.
      similarities: `[b, b]` float32, only for a bridge in stage one: each text with the nearest of an image's queries.
      match_logits: `[3b, 2]` float32, for the pairs of `bridge.hard_pairs`.
      matches: `[3b]`, 1 where such a pair belongs together.
      logit_scale: float32 scalar, exp of the parameter; the contrastive logits are `logit_scale * image @ text`.
      logit_bias: float32 scalar, added to the contrastive logits; None where model.logit_bias is 0.
    """

    image_features: Float[Array, "b *q e"] | None = None
    text_features: Float[Array, "b e"] | None = None
    image_tokens: Float[Array, "b q d"] | None = None
    hidden: Float[Array, "b t d"] | None = None
    logits: Float[Array, "b t v"] | None = None
    class_logits: Float[Array, "b c"] | None = None
    similarities: Float[Array, "b b"] | None = None
    match_logits: Float[Array, "3b 2"] | None = None
    matches: Int[Array, " 3b"] | None = None
    logit_scale: Float[Array, ""] | None = None
    logit_bias: Float[Array, ""] | None = None


class Projection(nn.Module):
    """Linear map without bias into the contrastive space, normalized to unit length in float32."""

    model: config.Model

    @nn.compact
    def __call__(self, x: Float[Array, "b *q d"]) -> Float[Array, "b *q e"]:
        shape = (x.shape[-1], self.model.embed_dim)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape, jnp.dtype(self.model.param_dtype))
        y = jnp.einsum("...d,de->...e", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        # The bound keeps the gradient of a zero vector finite.
        return y / jnp.sqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))


class CoCa(nn.Module):
    """The model. `config` alone decides the architecture; only the initialized parts have parameters.

    Usage: `CoCa(config.model).apply({"params": params}, images, tokens)`, or with `method="encode_image"` and so on.
    """

    config: config.Model

    def setup(self) -> None:
        c = self.config
        self.image_encoder = ImageEncoder(c)
        # With kind=single, query 0 is contrastive and the others feed the decoder (open_clip).
        self.generative_pooler = Pooler(c, c.pooler.queries, c.image.width)
        if c.pooler.kind != "single":
            self.contrastive_pooler = Pooler(c, 1, c.image.width if c.pooler.kind == "parallel" else c.text.width)
        self.image_projection = Projection(c)
        self.text_decoder = TextDecoder(c)
        self.text_projection = Projection(c)
        self.classifier = Classifier(c)
        if c.bridge.stage:
            self.bridge = Bridge(c)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(c.temperature)), ())
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(c.logit_bias), ()) if c.logit_bias else None

    def __call__(self, images: Float[Array, "b y x 3"], tokens: Int[Array, "b t"]) -> Output:
        """Run every part of the model, logits included.

        Args:
          images: Normalized images, `[b, size, size, 3]`.
          tokens: Token ids `[b, t]`, padded at the end; t is at most `text.length`.
        """
        output = self.forward(images, tokens, captioning=self.config.text.n_multi > 0)
        if output.hidden is None:
            return output
        return dataclasses.replace(output, logits=output_logits(output.hidden, self.head()))

    def forward(
        self,
        images: Float[Array, "b *f y x 3"],
        tokens: Int[Array, "b t"],
        *,
        contrastive: bool = True,
        captioning: bool = True,
        classes: bool = False,
        matching: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> Output:
        """Training pass: hidden states instead of logits, and only the requested parts.

        Without captioning, the multimodal decoder and the generative pooler are skipped (except a pooler that the
        contrastive feature is read from: kind=cascade and single). Without contrastive, the contrastive pooler, [CLS]
        and the projections are skipped. With classes alone, the text decoder is skipped unless model.head reads it.

        Args:
          images: Normalized images; clips are `[b, f, size, size, 3]`, whose frames' tokens the poolers read together.
          tokens: Token ids `[b, t]`.
          contrastive, captioning, classes: Which parts to compute.
          matching: Compute the matching logits of a bridge in stage one.
          key: Random key for drawing the wrong pairs of matching.

        Raises:
          ValueError: The classifier's pooler has position embeddings for another number of frames.
        """
        frames, frame_count = self.config.head.frames, images.shape[1] if images.ndim == 5 else 1
        if classes and self.config.head.reads == "pooler" and frames not in (1, frame_count):
            raise ValueError(
                f"images of shape {images.shape} given to a classifier for clips of {frames} frames: pass "
                f"[b, {frames}, size, size, 3]"
            )
        patch_tokens = self._patch_tokens(images)
        if self.config.bridge.stage == 1:
            assert not classes
            return self._stage_one(patch_tokens, tokens, contrastive, captioning, key if matching else None)
        reads = self.config.head.reads if classes else ""
        image_tokens, pooled = self._pool(
            patch_tokens, contrastive or reads == "contrastive", captioning or reads == "decoder"
        )
        output = Output(image_tokens=image_tokens)
        if contrastive:
            assert pooled is not None
            output = dataclasses.replace(
                output,
                image_features=self.image_projection(pooled),
                logit_scale=jnp.exp(self.logit_scale),
                logit_bias=self.logit_bias,
            )
        hidden = None
        if contrastive or captioning or reads == "decoder":
            text_hidden, cls = self.text_decoder.encode(tokens, cls=contrastive)
            if contrastive:
                assert cls is not None
                output = dataclasses.replace(output, text_features=self.text_projection(cls))
            if captioning or reads == "decoder":
                assert image_tokens is not None
                hidden = self.text_decoder.decode(text_hidden, image_tokens)
        if captioning:
            output = dataclasses.replace(output, hidden=hidden)
        if classes:
            if reads == "pooler":
                pooled = self.classifier.pool(patch_tokens)
            elif reads == "decoder":
                assert hidden is not None
                pooled = last_text_token(hidden, tokens, self.config.text.pad_id)
            assert pooled is not None
            output = dataclasses.replace(output, class_logits=self.classifier(pooled))
        return output

    def _stage_one(
        self,
        patch_tokens: Float[Array, "b n d"],
        tokens: Int[Array, "b t"],
        contrastive: bool,
        captioning: bool,
        matching: Key[Array, ""] | None,
    ) -> Output:
        queries, cls, hidden = self.bridge.read(patch_tokens, tokens, contrastive=contrastive, captioning=captioning)
        output = Output(hidden=hidden)
        if not contrastive:
            return output
        assert cls is not None
        image, text, scale = self.image_projection(queries), self.text_projection(cls), jnp.exp(self.logit_scale)
        alike = similarities(image, text)
        output = dataclasses.replace(
            output,
            image_features=image,
            text_features=text,
            similarities=alike,
            logit_scale=scale,
            logit_bias=self.logit_bias,
        )
        if matching is None:
            return output
        rows, texts, matches = hard_pairs(jax.lax.stop_gradient(alike * scale), tokens, matching)
        image_tokens = shard(patch_tokens[rows], "batch", None, "width")
        match_logits = self.bridge.match(image_tokens, shard(tokens[texts], "batch", None))
        return dataclasses.replace(output, match_logits=match_logits, matches=matches)

    def second_stage(self, tokens: Int[Array, "b t"]) -> Array:
        """Logits of the text decoder alone. Called to create its parameters, which stage one keeps for stage two."""
        c = self.config
        image_tokens = jnp.zeros((len(tokens), c.bridge.queries, c.text.width), jnp.dtype(c.dtype))
        hidden = self.text_decoder.decode(self.text_decoder.encode(tokens, cls=False)[0], image_tokens)
        return self.text_decoder.logits(hidden)

    def classify(self, images: Float[Array, "b *f y x 3"], tokens: Int[Array, "b t"]) -> Float[Array, "b c"]:
        """Class logits of model.head in float32; `tokens` hold the questions if the head reads the decoder."""
        logits = self.forward(images, tokens, contrastive=False, captioning=False, classes=True).class_logits
        assert logits is not None
        return logits

    def encode_image(
        self, images: Float[Array, "b y x 3"], *, contrastive: bool = True, captioning: bool = True
    ) -> Output:
        """`image_features` and `image_tokens` of normalized images."""
        if self.config.bridge.stage == 1:
            return Output(image_features=self.image_projection(self.bridge.queries(self._patch_tokens(images))))
        image_tokens, pooled = self._pool(self._patch_tokens(images), contrastive, captioning)
        output = Output(image_tokens=image_tokens)
        if contrastive:
            assert pooled is not None
            output = dataclasses.replace(output, image_features=self.image_projection(pooled))
        return output

    def attention(self, images: Float[Array, "b y x 3"], *, contrastive: bool) -> Float[Array, "b q n"]:
        """Attention of a pooler's queries over patch tokens and class token, `[b, q, n]` float32 with row sums of 1.

        With kind=cascade the contrastive query reads the generative pooler's output: its weights are multiplied with
        those over the patches (attention rollout, Abnar and Zuidema 2020, ignoring the values in between).

        Args:
          images: Normalized images.
          contrastive: Use the query of the contrastive feature; otherwise the queries that the decoder reads.
        """
        tokens, kind = self._patch_tokens(images), self.config.pooler.kind
        if contrastive and kind == "parallel":
            return self.contrastive_pooler.weights(tokens)
        weights = self.generative_pooler.weights(tokens)
        if kind == "single":
            return weights[:, :1] if contrastive else weights[:, 1:]
        if not contrastive:
            return weights
        return jnp.einsum("bqp,bpn->bqn", self.contrastive_pooler.weights(self.generative_pooler(tokens)), weights)

    def encode_text(self, tokens: Int[Array, "b t"]) -> Output:
        """`text_features` of token ids."""
        cls = self.bridge.text(tokens) if self.config.bridge.stage == 1 else self.text_decoder.encode(tokens)[1]
        assert cls is not None
        return Output(text_features=self.text_projection(cls))

    def head(self) -> Float[Array, "d v"]:
        """Kernel of the output softmax."""
        return self.bridge.head() if self.config.bridge.stage == 1 else self.text_decoder.head()

    def prefill(
        self, tokens: Int[Array, "b s"], image_tokens: Float[Array, "b q d"], length: int
    ) -> tuple[Float[Array, "b s v"], DecoderCache]:
        """Start decoding: logits of a prompt (at least bos), and a cache with room for `length` tokens in total.

        Raises:
          ValueError: The cache is longer than the model's positions or shorter than the prompt.
        """
        positions = self.config.text.length
        if not tokens.shape[1] <= length <= positions:
            raise ValueError(
                f"cache length={length} does not fit a prompt of shape {tokens.shape}: it must be at least the "
                f"prompt's length and at most text.length={positions}"
            )
        cache = self.text_decoder.empty_cache(tokens.shape[0], length)
        return self.text_decoder.step(tokens, cache, image_tokens)

    def decode_step(self, tokens: Int[Array, "b s"], cache: DecoderCache) -> tuple[Float[Array, "b s v"], DecoderCache]:
        """Continue decoding: logits after the next tokens (usually one), and the updated cache."""
        return self.text_decoder.step(tokens, cache)

    def _patch_tokens(self, images: Float[Array, "b *f y x 3"]) -> Float[Array, "b n d"]:
        """Patch tokens of each image, or of all frames of each clip in order."""
        if images.ndim == 4:
            return self.image_encoder(images)
        b, f = images.shape[:2]
        frames = self.image_encoder(images.reshape(b * f, *images.shape[2:]))
        return frames.reshape(b, -1, frames.shape[-1])

    def _pool(
        self, patch_tokens: Float[Array, "b n d"], contrastive: bool, captioning: bool
    ) -> tuple[Float[Array, "b q d"] | None, Float[Array, "b d"] | None]:
        """Image tokens for the decoder, and the vector that the contrastive feature is projected from."""
        kind = self.config.pooler.kind
        image_tokens = pooled = None
        if self.config.bridge.stage:
            return self.bridge.image_tokens(patch_tokens), None
        if captioning or (contrastive and kind != "parallel"):
            image_tokens = self.generative_pooler(patch_tokens)
        if kind == "single":
            if image_tokens is not None:
                pooled, image_tokens = image_tokens[:, 0], image_tokens[:, 1:]
        elif contrastive:
            tokens = patch_tokens if kind == "parallel" else image_tokens
            assert tokens is not None
            pooled = self.contrastive_pooler(tokens)[:, 0]
        return image_tokens, pooled
