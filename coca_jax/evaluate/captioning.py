"""Captioning: loss and perplexity over a set, and the captions themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coca_jax.data.tokenizer import Tokenizer


def summary(nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Loss of a set, every token counting the same.

    Args:
      nll: float `[m]`, each example's sum of negative log-likelihoods, nats.
      tokens: int `[m]`, each example's non-pad target tokens.

    Returns:
      `caption_loss`, nats a token, and `perplexity`, e to that power (infinite where it overflows).

    Raises:
      ValueError: no token at all.
    """
    count = np.sum(tokens, dtype=np.int64)
    if not count:
        raise ValueError("no target token in the set: the captions are empty")
    loss = np.sum(nll, dtype=np.float64) / count
    with np.errstate(over="ignore"):
        return {"caption_loss": float(loss), "perplexity": float(np.exp(loss))}


def captions(
    generate: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    tokenizer: Tokenizer,
    batch_size: int,
) -> list[str]:
    """Captions of some pictures.

    All batches have one shape, so that `generate` is compiled once; the last is filled up with copies.

    Args:
      generate: uint8 images `[b, s, s, 3]` -> int tokens `[b, t]`.
      images: uint8 `[m, s, s, 3]`.
      tokenizer: turns tokens into text.
      batch_size: most pictures at a time.
    """
    if not len(images):
        return []
    size = min(batch_size, len(images))
    texts: list[str] = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        tokens = np.asarray(generate(fill(part, size)))
        texts += [tokenizer.decode(row) for row in tokens[: len(part)].tolist()]
    return texts


def fill(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows with copies of the last behind them: `[size, ...]`."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def exact(text: str, references: Sequence[str], tokenizer: Tokenizer, length: int) -> bool:
    """Whether a caption is one of its references, word for word.

    References go through the tokenizer first: what it cannot write (it normalises letters, and cuts at `length` tokens)
    is not held against the model. Runs of spaces count as one.
    """
    same = [" ".join(tokenizer.decode(row).split()) for row in tokenizer.encode_batch(references, length).tolist()]
    return " ".join(text.split()) in same
