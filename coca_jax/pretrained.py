"""A trained model in three lines: `coca = coca_jax.load(workdir)`, then `encode_image`, `encode_text`, `caption`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from coca_jax import config, generate, sharding
from coca_jax.apply import Apply
from coca_jax.data import classes
from coca_jax.data.images import Preprocessor
from coca_jax.data.tokenizer import Tokenizer
from coca_jax.interop.weights import Weights
from coca_jax.model.image_encoder import resize_parameters
from coca_jax.stored import read_weights
from coca_jax.train.checkpoint import digest


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption of a picture.

    Attributes:
      text: without control tokens, the prompt included.
      log_prob: log P(caption | picture, prompt) under the model, nats.
      score: what decoding ranked it by, see `generate.Captions`.
      similarity: cosine of its text feature and the picture's, -1..1; None where the model has no contrastive half.
    """

    text: str
    log_prob: float
    score: float
    similarity: float | None


class Pretrained:
    """A model with its parameters, tokenizer and preprocessing.

    Attributes:
      config: that it was trained with (with the image size that it was loaded for).
      params: nested dict; `CoCa(config.model).apply({"params": params}, ...)` takes them.
      tokenizer, preprocessor: as in training; the tokenizer is None where none came with the weights.
      step: of training that the parameters are from.
      labels: what its classifier tells apart, by number; empty without one.
    """

    def __init__(self, weights: Weights) -> None:
        c, self.tokenizer = weights.config, weights.tokenizer
        self.config, self.params, self.step, self.labels = c, weights.params, weights.step, weights.labels
        self.preprocessor = Preprocessor.from_config(c.model.image.size, c.data)
        mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
        ids = self.tokenizer
        self._apply = Apply(c, mesh, bos_id=ids.bos_id if ids else -1, eos_id=ids.eos_id if ids else -1)

    def encode_image(self, images: Any, *, batch_size: int = 64) -> Float[np.ndarray, "b d"]:
        """Unit-length float32 features of pictures; of a bridge in stage one `[b, q, d]`, the nearest of which counts.

        Args:
          images: one, or several in a list, an iterator or an array: paths, encoded bytes, PIL images or uint8
            arrays `[h, w, 3]`, of any size.
          batch_size: pictures that are computed at a time.
        """
        return self.encode_pixels(self.preprocessor.pixels(_several(images)), batch_size=batch_size)

    def encode_pixels(self, pixels: UInt8[np.ndarray, "b s s 3"], *, batch_size: int = 64) -> Float[np.ndarray, "b d"]:
        """`encode_image` of what `preprocessor.pixels` has made ready."""
        self._needs(self._apply.has_contrastive, "lambda_con")
        return self._rows(self._apply.encode_image, [pixels], batch_size)

    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 64) -> Float[np.ndarray, "b d"]:
        """Unit-length float32 features of texts. `encode_image(...) @ encode_text(...).T` are the similarities."""
        self._needs(self._apply.has_contrastive, "lambda_con")
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = self._tokenizer().encode_batch(texts, self.config.model.text.length)
        return self._rows(self._apply.encode_text, [tokens], batch_size)

    def attention(
        self, images: Any, *, pooler: str = "generative", batch_size: int = 64
    ) -> Float[np.ndarray, "b q y x"]:
        """Where a pooler's queries look: their weights over the patches, mean over heads, float32.

        The patches are those of the square that `preprocessor.pixels` makes of a picture, rows from its top, columns
        from its left. The weights of a query sum to 1, less what it gives to a class token. With `pooler.kind=cascade`
        the contrastive one's are a product of two attentions (`CoCa.attention`).

        Args:
          images: as in `encode_image`.
          pooler: generative, whose q queries the decoder reads, or contrastive: q = 1, of the picture's feature.
          batch_size: pictures that are computed at a time.

        Raises:
          ValueError: the model has no such pooler.
        """
        return self.attention_pixels(self.preprocessor.pixels(_several(images)), pooler=pooler, batch_size=batch_size)

    def attention_pixels(
        self, pixels: UInt8[np.ndarray, "b s s 3"], *, pooler: str = "generative", batch_size: int = 64
    ) -> Float[np.ndarray, "b q y x"]:
        """`attention` of what `preprocessor.pixels` has made ready."""
        if self.config.model.bridge.stage:
            raise ValueError("this model has a bridge in the place of poolers")
        if pooler not in self._apply.attention:
            raise ValueError(f"pooler={pooler!r} must be one of {', '.join(self._apply.attention)}")
        if pooler == "contrastive":
            self._needs(self._apply.has_contrastive, "lambda_con")
        else:
            self._needs(self._apply.has_captioning, "lambda_cap")
        return self._rows(self._apply.attention[pooler], [pixels], batch_size)

    def log_likelihood(
        self, images: Any, texts: str | Sequence[str], *, batch_size: int = 64
    ) -> Float[np.ndarray, "b c"]:
        """log P(text | picture) in nats of every text for every picture, float32: what captioning alone makes of them.

        Short and common texts are likelier whatever the picture shows: to choose a text for a picture, compare with how
        likely each is for other pictures (`coca_jax.evaluate.likelihood.pmi` does, over the pictures given).

        Args:
          images: as in `encode_image`.
          texts: each as long as the model has positions at most; what is beyond is cut.
          batch_size: pictures that are computed at a time.

        Raises:
          ValueError: nothing was given, or the model was trained without captions.
        """
        self._needs(self._apply.has_captioning, "lambda_cap")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("no text was given: name one or more")
        tokens = self._tokenizer().encode_batch(texts, self.config.model.text.length)
        pixels = self.preprocessor.pixels(_several(images))
        return self._rows(lambda params, part: self._apply.log_probs(params, part, tokens), [pixels], batch_size)

    def classify(self, images: Any, *, top: int = 5, batch_size: int = 64) -> list[list[classes.Label]]:
        """The likeliest classes of each picture, the likeliest first.

        Args:
          images: as in `encode_image`; of a model for clips a list of clips, each a list of pictures in order.
          top: how many classes.
          batch_size: pictures that are computed at a time.

        Raises:
          ValueError: the model has no classifier, or one that answers questions.
        """
        self._classifies(reads_text=False)
        pixels = self._clips(images)
        blank = np.full((len(pixels), self.config.model.text.length), self.config.model.text.pad_id, np.int32)
        return classes.likeliest(self._rows(self._apply.classify, [pixels, blank], batch_size), self.labels, top)

    def answer(
        self, images: Any, questions: str | Sequence[str], *, top: int = 5, batch_size: int = 64
    ) -> list[list[classes.Label]]:
        """The likeliest answers to a question for each picture, or to one for all. Otherwise as `classify`."""
        self._classifies(reads_text=True)
        pixels = self._clips(images)
        texts = [questions] * len(pixels) if isinstance(questions, str) else list(questions)
        if len(texts) != len(pixels):
            raise ValueError(f"{len(texts)} questions for {len(pixels)} pictures: give one for all, or one for each")
        tokens = self._tokenizer().encode_batch(texts, self.config.model.text.length)
        return classes.likeliest(self._rows(self._apply.classify, [pixels, tokens], batch_size), self.labels, top)

    def _clips(self, images: Any) -> np.ndarray:
        if (frames := self.config.model.head.frames) == 1:
            return self.preprocessor.pixels(_several(images))
        return np.stack([self.preprocessor.pixels(clip) for clip in classes.of_clips(images, frames)])

    def _classifies(self, *, reads_text: bool) -> None:
        if not self._apply.has_classes:
            raise ValueError("this model was trained with config.loss.lambda_cls=0 and has no classifier")
        if reads_text != (self.config.model.head.reads == "decoder"):
            fits = "looks at pictures alone: classify(images)" if reads_text else "answers: answer(images, questions)"
            raise ValueError(f"this model's classifier {fits}")

    def caption(self, images: Any, prompt: str = "", *, batch_size: int = 64, **options: Any) -> list[str]:
        """The best caption of each picture. Arguments as of `captions`."""
        return [found[0].text for found in self.captions(images, prompt, batch_size=batch_size, **options)]

    def captions(
        self,
        images: Any,
        prompt: str | Sequence[str] = "",
        *,
        rerank: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        **options: Any,
    ) -> list[list[Caption]]:
        """Captions of pictures, several of each if asked for, the best first; fewer where beam search finds no more.

        Args:
          images: as in `encode_image`.
          prompt: what the captions begin with; one for all pictures, or one for each.
          rerank: the best are those most similar to the picture in the contrastive space, not those likeliest.
          seed: of sampling; the n-th picture draws the same whatever is computed beside it.
          batch_size: pictures that are computed at a time.
          **options: of `generate.Options`, e.g. `method="beam", returns=3` or `method="sample", top_p=0.9`.

        Raises:
          ValueError: an option does not exist or cannot be, a prompt is too long, or the model lacks that half.
        """
        pixels = self.preprocessor.pixels(_several(images))
        return self.caption_pixels(pixels, prompt, rerank=rerank, seed=seed, batch_size=batch_size, **options)

    def caption_pixels(
        self,
        pixels: UInt8[np.ndarray, "b s s 3"],
        prompt: str | Sequence[str] = "",
        *,
        rerank: bool = False,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> list[list[Caption]]:
        """`captions` of what `preprocessor.pixels` has made ready.

        Args:
          pixels: pictures.
          numbers: by which pictures draw, so that a set captioned in parts draws as it would in one; None: 0, 1, ...
          prompt, rerank, seed, batch_size, **options: as there.
        """
        self._needs(self._apply.has_captioning, "lambda_cap")
        if rerank:
            self._needs(self._apply.has_contrastive, "lambda_con")
        tokenizer = self._tokenizer()
        if unknown := set(options) - {field.name for field in dataclasses.fields(generate.Options)}:
            known = ", ".join(field.name for field in dataclasses.fields(generate.Options))
            raise ValueError(f"{sorted(unknown)[0]} is no option of decoding; there are {known}")
        how = generate.Options(**options)
        prompts = [prompt] * len(pixels) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(pixels):
            raise ValueError(f"{len(prompts)} prompts for {len(pixels)} pictures: give one for all, or one for each")
        rows = [pixels, tokenizer.encode_prompts(prompts)]
        if how.method == "sample":
            of = range(len(pixels)) if numbers is None else numbers
            rows.append(np.array([np.random.SeedSequence([seed, n]).generate_state(1)[0] for n in of]))
        made, similarity = self._rows(
            lambda params, *arrays: self._apply.captions(params, arrays[0], how, *arrays[1:]), rows, batch_size
        )
        found = []
        for row in range(len(pixels)):
            whole = [at for at in range(how.returns) if made.scores[row, at] != -np.inf]
            if not whole:
                raise ValueError(f"{how} leave no caption of this vocabulary: allow shorter ones, or repetitions")
            captions = [
                Caption(
                    tokenizer.decode(made.tokens[row, at]),
                    float(made.log_probs[row, at].sum()),
                    float(made.scores[row, at]),
                    None if similarity is None else float(similarity[row, at]),
                )
                for at in whole
            ]
            found.append(sorted(captions, key=lambda c: -(c.similarity or 0.0)) if rerank else captions)
        return found

    def digest(self) -> str:
        """Tells the model from another one at the same path and step: other weights, preprocessing or vocabulary."""
        found = hashlib.sha256(json.dumps(self.preprocessor.to_json()).encode())
        found.update(digest.of_whole(digest.combined([digest.of_process(self.params)])).encode())
        found.update(self.tokenizer.to_bytes() if self.tokenizer else b"")
        return found.hexdigest()[:16]

    def _rows(self, function: Any, rows: Sequence[np.ndarray], batch_size: int) -> Any:
        """`function(params, *rows)` for some rows at a time; host arrays, or a tree of them."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        parts = []
        for start in range(0, len(rows[0]), batch_size):
            part = [x[start : start + batch_size] for x in rows]
            count = len(part[0])
            # Filled up to a power of two, so that many sizes share few compiled programs.
            size = min(batch_size, 1 << (count - 1).bit_length())
            filled = [np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)]) for x in part]
            parts.append(jax.tree.map(lambda x, n=count: x[:n], function(self.params, *filled)))
        if not parts:
            raise ValueError("nothing was given to encode")
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def _needs(self, present: bool, weight: str) -> None:
        if not present:
            stage_one = self.config.model.bridge.stage == 1 and weight == "lambda_cap"
            why = "is stage one of a bridge" if stage_one else f"was trained with config.loss.{weight}=0"
            raise ValueError(f"this model {why} and has no such half")

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model came without its tokenizer: load it with tokenizer=PATH, or convert it first, with "
                "python -m coca_jax.convert --tokenizer=PATH"
            )
        return self.tokenizer


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    image_size: int | None = None,
    tokenizer: epath.PathLike = "",
    name: str = "",
) -> Pretrained:
    """Opens a trained model, whatever it was written by.

    Args:
      path: a workdir, a directory of `coca_jax.convert`, or open_clip's (`stored.read_weights` says what each holds).
      image_size: another resolution than it was trained at, a multiple of the patch: learned positions are resized.
      step, tokenizer, name: as of `stored.read_weights`.

    Raises:
      CheckpointError, ConversionError: as `stored.read_weights` does.
      ConfigError: image_size is no number of pixels, or not a multiple of the patch.
    """
    weights = read_weights(path, step=step, tokenizer=tokenizer, name=name)
    # The kernels belong to the machine that it was trained on; XLA computes the same function anywhere.
    c, params = weights.config, weights.params
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, attention="xla"))
    if image_size is not None:
        if not (isinstance(image_size, int | np.integer) and image_size > 0):
            raise config.ConfigError(f"image_size={image_size!r} must be a whole number above 0, of pixels")
        image = dataclasses.replace(c.model.image, size=image_size)
        c = dataclasses.replace(c, model=dataclasses.replace(c.model, image=image))
        config.check_model(c.model)
        params = resize_parameters(params, c.model)
    return Pretrained(dataclasses.replace(weights, config=c, params=params))


def _several(images: Any) -> Iterable[Any]:
    if isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Iterable):
        return [images]
    # An array of one axis holds paths, as a column of a table does; of four pictures; of others it is a picture.
    return images if getattr(images, "ndim", 1) in (1, 4) else [images]
