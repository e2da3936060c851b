"""What the page answers: a model and a folder's index, pictures and texts in, plain values and pixels out.

Axes: q queries of a pooler, y x rows and columns of patches, d the contrastive space.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from coca_jax import pictures
from coca_jax.data import label_names
from coca_jax.data.records import DataError
from coca_jax.evaluate import zero_shot
from coca_jax.evaluate.splits import TextKeys
from coca_jax.pretrained import Caption, Pretrained

METHODS = ("beam", "sample", "greedy")
MOST_CAPTIONS, MOST_FOUND, MOST_TEXTS = 8, 48, 16_000  # what one question may ask for, whoever asks
_VIEW = 336  # pixels a side of what is shown, at least
_QUERIES = 4  # of the generative pooler that are shown one by one
_UNLIT = 0.15  # brightness of a patch without weight


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture that was given, as far as later questions need it.

    Attributes:
      pixels: what the model is given.
      feature: unit length; None where the model has no contrastive half.
    """

    pixels: UInt8[np.ndarray, "s s 3"]
    feature: Float[np.ndarray, " d"] | None


@dataclasses.dataclass(frozen=True)
class Index:
    """The features of a folder's pictures, as `coca_jax.embed` writes them."""

    paths: Sequence[str]
    features: Float[np.ndarray, "n d"]


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """A word, its probability by the contrastive half, and the cosine of its text feature and the picture's."""

    word: str
    probability: float
    cosine: float


class Answers:
    """The functions behind the page. What cannot be answered raises DataError or ValueError, with what is wrong."""

    def __init__(self, coca: Pretrained, index: Index | None = None) -> None:
        """Raises DataError where the index is of another model's space, or the model half of one."""
        self.coca, self.index = coca, index
        self.captions_pictures = coca.config.loss.lambda_cap > 0
        self.compares = coca.config.loss.lambda_con > 0
        bridge = coca.config.model.bridge.stage
        if bridge == 1:
            raise DataError("stage one of a bridge, whose pictures have several features each: try its second stage")
        self._has_poolers = not bridge
        wanted = coca.config.model.embed_dim
        if index is not None and index.features.shape[1] != wanted:
            raise DataError(f"features of {index.features.shape[1]} values, and this model's have {wanted}")

    def see(self, encoded: bytes) -> tuple[Seen, list[tuple[np.ndarray, str]]]:
        """A picture's file -> what is kept of it, and views of it: what the model sees, and where it looks.

        Raises:
          BadExample: it is no picture, is damaged or too large.
        """
        look = self.coca.preprocessor
        pixels = look.pixels([encoded])
        shown = dataclasses.replace(look, size=max(look.size, _VIEW)).pixels([encoded])[0]
        views = [(shown, "what the model sees")]
        feature = None
        if self.compares:
            feature = self.coca.encode_pixels(pixels)[0]
        if self.compares and self._has_poolers:
            weights = self.coca.attention_pixels(pixels, pooler="contrastive")[0]
            views.append((lit(shown, weights[0]), f"where its feature is from: {_peak(weights[0])}"))
        if self.captions_pictures and self._has_poolers:
            weights = self.coca.attention_pixels(pixels, pooler="generative")[0]
            mean = weights.mean(axis=0)
            views.append(
                (lit(shown, mean), f"what captions are read from, mean of {len(weights)} queries: {_peak(mean)}")
            )
            for query in sorted(np.argsort(-weights.max(axis=(1, 2)), kind="stable")[:_QUERIES]):
                views.append((lit(shown, weights[query]), f"query {query}: {_peak(weights[query])}"))
        return Seen(pixels[0], feature), views

    def captions(self, seen: Seen, method: str, count: int, prompt: str = "", seed: int = 0) -> list[Caption]:
        """Captions, the best first; greedy gives one, whatever the count."""
        if method not in METHODS or not 1 <= count <= MOST_CAPTIONS:
            raise ValueError(f"{count} captions by {method!r}: 1 to {MOST_CAPTIONS} by one of {', '.join(METHODS)}")
        options: dict[str, Any] = {} if method == "greedy" else {"returns": int(count)}
        if method == "beam":
            options["beams"] = max(6, int(count))
        return self.coca.caption_pixels(seen.pixels[None], prompt, seed=seed, method=method, **options)[0]

    def labels(self, seen: Seen, words: str, prompts: str = "{}") -> list[LabelScore]:
        """Words, the likeliest first. The probabilities are those of the loss that the model was trained with.

        Args:
          seen: the picture.
          words: with commas, semicolons or line ends between.
          prompts: with | between, each with {} for the word; a word's feature is the mean (`zero_shot.class_features`).
        """
        if seen.feature is None:
            raise ValueError("this model was trained with config.loss.lambda_con=0 and compares no words with pictures")
        names = list(dict.fromkeys(word.strip() for word in re.split(r"[,;\n]", words) if word.strip()))
        if not names:
            raise ValueError("no words to choose from: type some, with commas between")
        templates = zero_shot.expand([prompt.strip() for prompt in prompts.split("|") if prompt.strip()])
        if len(names) * len(templates) > MOST_TEXTS:
            raise ValueError(
                f"{len(names)} words in {len(templates)} prompts are more than {MOST_TEXTS} texts: use fewer"
            )
        said = [label_names.words_of(name) for name in names]
        if self.coca.tokenizer is not None:  # words that the model reads alike are one, with one probability
            keys = TextKeys(self.coca.tokenizer, self.coca.config.model.text.length)(said)
            kept = [keys.index(key) for key in dict.fromkeys(keys)]
            names, said = [names[at] for at in kept], [said[at] for at in kept]
        features = zero_shot.class_features(self.coca.encode_text, [(text,) for text in said], templates)
        cosine = features @ seen.feature.astype(np.float64)
        probability = self._probability(cosine)
        order = np.argsort(-cosine, kind="stable")
        return [LabelScore(names[at], float(probability[at]), float(cosine[at])) for at in order]

    def nearest(self, text: str, count: int) -> tuple[list[tuple[np.ndarray, str]], list[str]]:
        """Pictures of the index nearest to a text, with their cosine and name, and what could not be shown."""
        if self.index is None:
            raise ValueError("no folder was indexed: start with --pictures=FOLDER")
        if not text.strip():
            raise ValueError("no text to look for: type some")
        if not 1 <= count <= MOST_FOUND:
            raise ValueError(f"{count} pictures: 1 to {MOST_FOUND} can be shown")
        scores = self.index.features @ self.coca.encode_text(text.strip())[0]
        found, unread = [], []
        thumbnail = dataclasses.replace(self.coca.preprocessor, size=_VIEW, crop=1.0)
        for at in np.argsort(-scores, kind="stable")[: int(count)]:
            path = self.index.paths[at]
            try:
                found.append((thumbnail.pixels([path])[0], f"{scores[at]:.3f}  {path.rsplit('/', 1)[-1]}"))
            except (DataError, OSError) as error:
                unread.append(str(error))
        return found, unread

    def _probability(self, cosine: np.ndarray) -> np.ndarray:
        scale = float(np.exp(np.float64(self.coca.params["logit_scale"])))
        logits = scale * cosine
        if self.coca.config.loss.contrastive == "sigmoid":  # each pair by itself: they need not sum to 1
            bias = float(np.float64(self.coca.params.get("logit_bias", 0.0)))
            return np.asarray(1 / (1 + np.exp(-(logits + bias))))
        e = np.exp(logits - logits.max())
        return np.asarray(e / e.sum())


def lit(shown: UInt8[np.ndarray, "v v 3"], weights: Float[np.ndarray, "y x"]) -> UInt8[np.ndarray, "v v 3"]:
    """The picture, each patch as bright as its weight is of the largest; patches are not smoothed into one another."""
    side = len(shown)
    rows, columns = (np.arange(side) * n // side for n in weights.shape)
    light = (weights / max(float(weights.max()), 1e-12))[rows][:, columns]
    bright = _UNLIT + (1 - _UNLIT) * light[:, :, None]
    return (shown * bright).round().astype(np.uint8)


def _peak(weights: np.ndarray) -> str:
    return f"brightest patch {100 * weights.max():.1f}%, each {100 / weights.size:.1f}% if it looked nowhere"


def open_index(output: str, coca: Pretrained, checkpoint: str, folder: str = "") -> tuple[Index, str]:
    """The index of a folder, made or completed first; of all that is in it where no folder is named.

    Args:
      output: file or folder as `coca_jax.embed --output` writes them.
      coca: the model.
      checkpoint: what it was loaded from: an index of another is refused.
      folder: pictures at any depth; only these are found.

    Returns:
      The index, and a line that says what was done.

    Raises:
      DataError: nothing to index, an index of another model, a damaged one, or one that another process is writing.
    """
    pictures.open_rows(output)
    paths = pictures.find([folder]) if folder else []
    if not folder and not pathlib.Path(output).exists():
        raise DataError(f"--output={output}: no such index; --pictures=FOLDER makes it")
    names: list[str] = []
    with pictures.begun(output, checkpoint, coca, texts=""):
        done = pictures.embed(paths, coca, output, batch_size=32) if folder else output
        if pathlib.Path(output).exists():
            names, features = pictures.open_rows(output).features()
    if folder:
        wanted = set(paths)
        kept = [at for at, name in enumerate(names) if name in wanted]
        names, features = [names[at] for at in kept], features[kept] if kept else np.zeros((0, 0))
    if not names:
        raise DataError(f"{folder or output}: none of its pictures could be read, see {output}.bad.jsonl")
    return Index(names, features), done
