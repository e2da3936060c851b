"""The model's functions compiled over a mesh: arrays in, host arrays out, any number of rows.

Shared by evaluation during training and by loaded checkpoints. Axes: b rows, d contrastive space, t tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coca_jax import config, generate, losses
from coca_jax.data.images import normalize
from coca_jax.model import lora
from coca_jax.model.coca import CoCa
from coca_jax.model.text_decoder import last_token_position
from coca_jax.sharding import batch_sharding, replicated

Parameters = Any
_TEXTS_PER_CALL = 32  # texts per call of the likelihood function


class Apply:
    """Functions of (params, arrays). Images are uint8 `[b, size, size, 3]` and are normalized on the device.

    `params` are those of a run, including any low-rank updates. With model.head.frames, images are clips.

    An input array is either already on the mesh (from `pipeline.place`, where each process has read its own rows) or a
    host array that is equal on every process. Every process receives all rows of the result.
    """

    def __init__(self, c: config.Config, mesh: Mesh, *, bos_id: int, eos_id: int) -> None:
        """Compile the functions lazily, on first use.

        Args:
          c: Configuration; uses model, lora, data.mean, data.std, and the loss weights, which tell which parts exist.
          mesh: Device mesh with axes sharding.MESH_AXES.
          bos_id, eos_id: Ids of the tokenizer, for captions.
        """
        self.mesh = mesh
        self.has_contrastive, self.has_caption_loss = c.loss.lambda_con > 0, c.loss.lambda_cap > 0
        self.has_captioning = self.has_caption_loss and c.model.bridge.stage != 1  # the decoder is for stage two
        self.has_classes = c.loss.lambda_cls > 0
        self._shards = mesh.shape["replica"] * mesh.shape["fsdp"]
        model, pad = CoCa(c.model), c.model.text.pad_id
        self._pad_id = pad

        def apply(params: Parameters, *args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": lora.merged(c.lora, params)}, *args, **kwargs)

        def pixels(images: jax.Array) -> jax.Array:
            return normalize(images, c.data.mean, c.data.std)

        def encode_image(params: Parameters, images: jax.Array) -> jax.Array:
            return apply(params, pixels(images), captioning=False, method="encode_image").image_features

        def encode_text(params: Parameters, tokens: jax.Array) -> jax.Array:
            return apply(params, tokens, method="encode_text").text_features

        def caption_loss(params: Parameters, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = apply(params, pixels(images), tokens, contrastive=False, method="forward").hidden
            labels, weights = losses.targets(tokens, pad)
            chunk = c.loss.caption_chunk
            nll = losses.token_losses(hidden, apply(params, method="head"), labels, chunk) * weights
            return nll.sum(axis=1), weights.sum(axis=1)

        def captions(
            options: generate.Options,
            prefix: int,
            params: Parameters,
            images: jax.Array,
            prompts: jax.Array,
            seeds: jax.Array | None = None,
        ) -> tuple[generate.Captions, jax.Array | None]:
            both = apply(params, pixels(images), contrastive=self.has_contrastive, method="encode_image")
            keys = None if seeds is None else jax.vmap(jax.random.key)(seeds)
            made = generate.generate(
                c.model,
                lora.merged(c.lora, params),
                both.image_tokens,
                options,
                bos_id=bos_id,
                eos_id=eos_id,
                prompt=prompts,
                prefix=prefix,
                keys=keys,
            )
            if not self.has_contrastive:
                return made, None
            b, r, t = made.tokens.shape
            features = apply(params, made.tokens.reshape(b * r, t), method="encode_text").text_features
            return made, jnp.einsum("be,bre->br", both.image_features, features.reshape(b, r, -1))

        def image_tokens(params: Parameters, images: jax.Array) -> jax.Array:
            return apply(params, pixels(images), contrastive=False, method="encode_image").image_tokens

        def log_probs(params: Parameters, pooled: jax.Array, tokens: jax.Array) -> jax.Array:
            hidden = apply(params, tokens, method=lambda m, x: m.text_decoder.encode(x, cls=False)[0])
            hidden = jax.lax.with_sharding_constraint(hidden, replicated(mesh))
            labels, weights = losses.targets(tokens, pad)
            head = apply(params, method="head")

            def text_log_probs(text: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
                """log P of one text for every image; its unimodal hidden states are shared by all images."""
                own, label, weight = (jnp.broadcast_to(x[None], (len(pooled), *x.shape)) for x in text)
                decoded = apply(params, own, pooled, method=lambda m, x, y: m.text_decoder.decode(x, y))
                return -(losses.token_losses(decoded, head, label, c.loss.caption_chunk) * weight).sum(axis=1)

            return jax.lax.map(text_log_probs, (hidden, labels, weights)).T

        def classify(params: Parameters, images: jax.Array, tokens: jax.Array) -> jax.Array:
            return apply(params, pixels(images), tokens, method="classify")

        def attention(contrastive: bool, params: Parameters, images: jax.Array) -> jax.Array:
            results: jax.Array = apply(params, pixels(images), contrastive=contrastive, method="attention")
            side = c.model.image.size // c.model.image.patch
            return results[:, :, int(c.model.image.class_token) :].reshape(*results.shape[:2], side, side)

        self.attention = {
            pooler: self._compile(functools.partial(attention, pooler == "contrastive"))
            for pooler in ("contrastive", "generative")
        }
        self.encode_image = self._compile(encode_image)
        self.classify = self._compile(classify)
        self.encode_text = self._compile(encode_text)
        self.caption_loss = self._compile(caption_loss)

        @functools.cache
        def captioner(options: generate.Options, prefix: int) -> Callable[..., Any]:
            return self._compile(functools.partial(captions, options, prefix))

        self._captioner = captioner
        self._bos_id = bos_id
        self._image_tokens = jax.jit(image_tokens, out_shardings=batch_sharding(mesh))
        self._log_probs = jax.jit(log_probs, out_shardings=replicated(mesh))
        self._rank = jax.jit(_rank, out_shardings=replicated(mesh))

    def captions(
        self,
        params: Parameters,
        images: np.ndarray | jax.Array,
        options: generate.Options = generate.Options(),  # noqa: B008  (frozen)
        prompts: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
    ) -> tuple[generate.Captions, np.ndarray | None]:
        """Captions, `r` per image, and their cosine similarities with the image `[b, r]` from the same image pass.

        Args:
          params: Model parameters.
          images: uint8 `[b, size, size, 3]`.
          options: Decoding options.
          prompts: First tokens of the captions, int32 `[b, p]`: bos, tokens, padding. None: bos alone.
          seeds: Seeds for sampling, uint32 `[b]`.

        Returns:
          Host arrays; the similarities are None if the model has no contrastive half.
        """
        prefix = 1
        if prompts is None:
            prompts = np.full((len(images), 1), self._bos_id, np.int32)
        else:
            prefix = generate.prefix_length(1 + last_token_position(prompts, self._pad_id))
        arrays = (images, prompts) if seeds is None else (images, prompts, seeds)
        result: tuple[generate.Captions, np.ndarray | None] = self._captioner(options, prefix)(params, *arrays)
        return result

    def caption(self, params: Parameters, images: np.ndarray | jax.Array) -> np.ndarray:
        """Token ids of one greedily decoded caption per image, `[b, t]`."""
        return np.asarray(self.captions(params, images)[0].tokens[:, 0])

    def log_probs(self, params: Parameters, images: np.ndarray | jax.Array, tokens: np.ndarray) -> np.ndarray:
        """log P(text | image) in nats of every text for every image, float32 `[b, c]`; each is encoded once.

        Args:
          params: Model parameters.
          images: uint8 `[b, size, size, 3]`.
          tokens: int32 `[c, t]`, equal on every process.
        """
        rows = len(images)
        chunk = -(-_TEXTS_PER_CALL // self._shards) * self._shards
        # Trailing padding has no effect. Round the length up to a power of two so that few programs are compiled.
        longest = max(2, 1 + int(last_token_position(tokens, self._pad_id).max()))
        tokens = tokens[:, : min(tokens.shape[1], 1 << (longest - 1).bit_length())]
        results = []
        with jax.set_mesh(self.mesh):
            pooled = self._image_tokens(params, images if isinstance(images, jax.Array) else self._place(images))
            for start in range(0, len(tokens), chunk):
                part = tokens[start : start + chunk]
                padded = np.concatenate([part, np.repeat(part[-1:], chunk - len(part), axis=0)])
                made = self._log_probs(params, pooled, self._replicate(padded))
                results.append(np.asarray(made.addressable_data(0))[:rows, : len(part)])
        return np.concatenate(results, axis=1)

    def compare(self, candidates: np.ndarray) -> Callable[[np.ndarray, np.ndarray, float], tuple[Any, Any]]:
        """See `evaluate.retrieval.Comparer`: the queries are sharded over the devices, the candidates replicated."""
        with jax.set_mesh(self.mesh):
            placed = self._replicate(candidates)

        def compare_batch(queries: np.ndarray, correct: np.ndarray, margin: float) -> tuple[Any, Any]:
            with jax.set_mesh(self.mesh):
                made = self._rank(self._place(queries), self._place(correct), placed, np.float32(margin))
            return tuple(np.asarray(x.addressable_data(0))[: len(queries)] for x in made)  # type: ignore[return-value]

        return compare_batch

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, out_shardings=replicated(self.mesh))

        def call(params: Parameters, *arrays: np.ndarray | jax.Array) -> Any:
            rows = len(arrays[0])
            placed = (a if isinstance(a, jax.Array) else self._place(np.asarray(a)) for a in arrays)
            with jax.set_mesh(self.mesh):
                result = compiled(params, *placed)
            return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[:rows], result)

        return call

    def _replicate(self, x: np.ndarray) -> jax.Array:
        """Put a host array on every device."""
        return jax.make_array_from_callback(x.shape, replicated(self.mesh), lambda index: x[index])

    def _place(self, x: np.ndarray) -> jax.Array:
        """Shard a host array over the mesh, padded with copies of its last row to a multiple of the shards."""
        short = -len(x) % self._shards
        x = np.concatenate([x, np.repeat(x[-1:], short, axis=0)]) if short else x
        return jax.make_array_from_callback(x.shape, batch_sharding(self.mesh), lambda index: x[index])


def _rank(
    queries: jax.Array, correct: jax.Array, candidates: jax.Array, margin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `evaluate.retrieval.Comparer`."""
    scores = jnp.einsum("md,kd->mk", queries, candidates, precision=jax.lax.Precision.HIGHEST)
    count = scores.shape[1]
    own = jnp.take_along_axis(scores, jnp.maximum(correct, 0), axis=1)
    best = jnp.where(correct >= 0, own, -jnp.inf).max(axis=1, keepdims=True)
    at = jnp.where(correct >= 0, correct, count)
    is_correct = jax.vmap(lambda rows: jnp.zeros(count, bool).at[rows].set(True, mode="drop"))(at)
    ahead = ~(scores <= best + margin) & ~is_correct  # "not below", so that a NaN counts against
    near = (jnp.abs(scores - best) <= margin) & ~is_correct
    return ahead.sum(axis=1), jnp.packbits(near, axis=1)
