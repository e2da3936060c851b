"""Image-text retrieval: recall at 1, 5 and 10 and the median rank, both ways, with chance and a pixel baseline beside.

A query's rank is 1 plus the number of wrong candidates that score at least as high as its best right one. Ties
therefore count against the model, and one that gives everything the same feature has a recall of 0, not of chance.
Scores are taken in float64, so that what ties is decided by the features and not by the order of a sum; a right answer
whose score is not a number is a miss. The matrix of scores is never held whole: `chunk_bytes` of it at a time.

Where there are devices to share the work (a `Comparer`), they take all scores in float32, and the host only those that
lie so near to the right one that float32 cannot tell: the ranks are the same to the last, whatever the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

KS = (1, 5, 10)
_TIE = 1e-9  # scores closer than this are equal: float64 sums of unit vectors differ by less than 1e-12
_CHUNK_BYTES = 128 << 20

Truth = Sequence[Sequence[int]]  # the right candidates of each query, by row
Measures = dict[str, dict[str, float]]


class Comparer(Protocol):
    """Scores on the devices: given the candidates, float32 `[k, d]`, a function of some queries at a time.

    That takes queries float32 `[m, d]`, their right candidates int32 `[m, r]` (filled up with -1) and a margin, and
    gives for each query how many wrong candidates score above the best right one by more than the margin (or are not a
    number), int `[m]`, and one bit for each candidate, `np.packbits` of `[m, k]`: whether it is wrong and within it.
    """

    def __call__(
        self, candidates: np.ndarray
    ) -> Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]: ...


def unique_texts(
    captions: Sequence[Sequence[str]], keys: Sequence[Sequence[str]] | None = None
) -> tuple[list[str], list[list[int]]]:
    """Distinct texts in order of appearance, and for each image the rows of its own.

    A text that several images carry is one candidate, right for each of them.

    Args:
      captions: The texts of each image.
      keys: For each caption what it is compared by: captions with equal keys are the same text, which is then the first
        of them. None compares the captions themselves.
    """
    rows: dict[str, int] = {}
    texts: list[str] = []
    image_to_text = []
    for own, own_keys in zip(captions, captions if keys is None else keys, strict=True):
        for text, key in zip(own, own_keys, strict=True):
            if rows.setdefault(key, len(texts)) == len(texts):
                texts.append(text)
        image_to_text.append(list(dict.fromkeys(rows[key] for key in own_keys)))
    return texts, image_to_text


def invert(truth: Truth, candidates: int) -> list[list[int]]:
    """The pairs from the candidates' side: `[candidates]` lists of query rows. IndexError for a row out of range."""
    inverse: list[list[int]] = [[] for _ in range(candidates)]
    for query, rows in enumerate(truth):
        for row in rows:
            if not 0 <= row < candidates:
                raise IndexError(f"query {query} names candidate {row}, but there are {candidates}: rows start at 0")
            inverse[row].append(query)
    return inverse


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    truth: Truth,
    chunk_bytes: int = _CHUNK_BYTES,
    compare: Comparer | None = None,
) -> np.ndarray:
    """Rank of each query's best right answer, counted from 1.

    Args:
      queries: float `[m, d]`, unit length; or of either side several vectors a row, `[m, q, d]`, see `scores`.
      candidates: float `[k, d]`, unit length.
      truth: for each query the rows of its right candidates.
      chunk_bytes: memory for scores, bytes.
      compare: shares the work over devices; None: the host alone. The ranks are the same.

    Returns:
      int64 `[m]`; k + 1 where a query has no right answer or its score is not finite.
    """
    queries, candidates = np.asarray(queries, np.float64), np.asarray(candidates, np.float64)
    dims = queries.ndim, candidates.ndim
    if dims not in ((2, 2), (3, 2), (2, 3)) or queries.shape[-1] != candidates.shape[-1]:
        raise ValueError(f"features of shapes {queries.shape} and {candidates.shape} are not [m, d] and [k, d]")
    if sum(dims) > 4:
        chunk_bytes //= (queries if dims[0] == 3 else candidates).shape[1]
        return _ranks(lambda a, b: scores(queries[a:b], candidates), truth, len(queries), len(candidates), chunk_bytes)
    finite = len(queries) and len(candidates) and np.isfinite(queries).all() and np.isfinite(candidates).all()
    if compare is not None and finite:
        return _compared(compare, queries, candidates, truth, chunk_bytes)
    return _ranks(lambda a, b: queries[a:b] @ candidates.T, truth, len(queries), len(candidates), chunk_bytes)


def ranks_of(scores: np.ndarray, truth: Truth) -> np.ndarray:
    """`ranks` from the scores themselves, `[m, k]`."""
    scores = np.asarray(scores, np.float64)
    return _ranks(lambda a, b: scores[a:b], truth, len(scores), scores.shape[1], _CHUNK_BYTES)


def top(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Rows of the best candidates of each query, best first: int64 `[m, min(count, k)]`. For a handful of queries."""
    found = scores(np.asarray(queries, np.float64), np.asarray(candidates, np.float64))
    return np.argsort(-found, axis=1, kind="stable")[:, :count]


def scores(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Scalar products `[m, k]`; where a row of one side has several vectors, `[m, q, d]`, that of the nearest."""
    if candidates.ndim == 3:
        return scores(candidates, queries).T
    products: np.ndarray = queries @ candidates.T
    return products.max(axis=1) if queries.ndim == 3 else products


def recall(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_to_text: Truth,
    chunk_bytes: int = _CHUNK_BYTES,
    compare: Comparer | None = None,
) -> Measures:
    """Recall at 1, 5 and 10 (shares of the queries) and median rank, image to text and text to image.

    A picture may have several texts and a text several pictures: any of them in the top k is a hit. A row with no
    partner is a candidate for the others but no query.

    Args:
      image_features: float `[m, d]`, unit length.
      text_features: float `[k, d]`, unit length.
      image_to_text: for each picture the rows of its texts.
      chunk_bytes, compare: see `ranks`.

    Returns:
      `{"image_to_text": {"r1", "r5", "r10", "median_rank"}, "text_to_image": {...}, "chance": {...}}`, where chance is
      what a random ranking gives, the mean over both ways (they are equal where texts and pictures pair one to one).

    Raises:
      ValueError: shapes that do not fit, or no pair at all.
      IndexError: a text row out of range.
    """
    if len(image_features) != len(image_to_text):
        raise ValueError(f"{len(image_features)} image features for {len(image_to_text)} rows of image_to_text")
    text_to_image = invert(image_to_text, len(text_features))
    m, k = len(image_features), len(text_features)
    forward = ranks(image_features, text_features, image_to_text, chunk_bytes, compare)
    backward = ranks(text_features, image_features, text_to_image, chunk_bytes, compare)
    ways = (chance(image_to_text, k), chance(text_to_image, m))
    return {
        "image_to_text": measures(forward, image_to_text, k),
        "text_to_image": measures(backward, text_to_image, m),
        "chance": {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]},
    }


def chance(truth: Truth, candidates: int) -> dict[str, float]:
    """Expected recall of a random ranking, exactly, and the median of its rank.

    With c of n candidates right, the best of them ranks below r with probability C(n - c, r) / C(n, r); the mean over
    the queries gives recall at k as 1 minus that at r = k, and the median as the first r where it is 1/2 or less.

    Args:
      truth: for each query the rows of its right candidates; queries without any are left out.
      candidates: how many there are to rank.
    """
    counts = np.array([len(set(rows)) for rows in truth if len(rows)])
    if not len(counts):
        raise ValueError("no query has a right answer: there is nothing to measure")
    below = np.zeros(candidates + 1)
    steps = np.arange(candidates)
    for count, queries in zip(*np.unique(counts, return_counts=True), strict=True):
        factors = np.maximum(candidates - count - steps, 0) / (candidates - steps)
        below += queries / len(counts) * np.concatenate([[1.0], np.cumprod(factors)])
    result = {f"r{k}": float(1 - below[min(k, candidates)]) for k in KS}
    return result | {"median_rank": float(np.argmax(below <= 0.5 + 1e-12))}


def pixel_baseline(
    images: np.ndarray,
    image_to_text: Truth,
    texts: Sequence[str],
    reference_images: np.ndarray,
    reference_names: Sequence[Sequence[str]],
    chunk_bytes: int = _CHUNK_BYTES,
) -> Measures:
    """Retrieval by nearest pixels: what a lookup of training pictures achieves with no learning at all.

    The distance of a picture to a name is the L2 distance, in RGB, to the nearest reference picture of that name. A
    picture is answered with the names of the nearest references, a name with the pictures nearest to its reference.
    The candidates are the evaluation set's own, as for the model: references of other names are left out. A name that
    no reference carries can neither be proposed nor asked for, so its queries are misses, of rank k + 1.

    Args:
      images: uint8 `[m, s, s, 3]`, the held-out pictures.
      image_to_text: for each of them the rows of its names in `texts`.
      texts: the distinct names, `[k]`.
      reference_images: uint8 `[r, s, s, 3]`, pictures seen in training.
      reference_names: for each of those its names.
      chunk_bytes: memory for distances, bytes.

    Returns:
      `{"image_to_text": {"r1", "r5", "r10", "median_rank"}, "text_to_image": {...}}`.
    """
    if images.shape[1:] != reference_images.shape[1:] and len(reference_images):
        raise ValueError(f"pictures of shapes {images.shape[1:]} and {reference_images.shape[1:]} cannot be compared")
    text_to_image = invert(image_to_text, len(texts))
    rows = {text: row for row, text in enumerate(texts)}
    pairs = sorted({(rows[name], i) for i, names in enumerate(reference_names) for name in names if name in rows})
    named = np.array([text for text, _ in pairs], np.int64)  # the text of each column below, ascending
    # Whole numbers below 2^53 in float64: distances are exact, and equal pictures tie whatever the chunking.
    flat = images.reshape(len(images), -1).astype(np.float64)
    columns = reference_images[[i for _, i in pairs]].reshape(len(pairs), flat.shape[1]).astype(np.float64)
    flat_norm, column_norm = (flat**2).sum(1), (columns**2).sum(1)

    def nearness(a: int, b: int, c: int, d: int) -> np.ndarray:
        """Minus the squared distances of pictures a..b to texts c..d: `[b - a, d - c]`, -inf without a reference."""
        result = np.full((b - a, d - c), -np.inf)
        low, high = np.searchsorted(named, (c, d))
        if low < high:
            distance = flat_norm[a:b, None] + column_norm[low:high] - 2 * flat[a:b] @ columns[low:high].T
            present, starts = np.unique(named[low:high], return_index=True)
            result[:, present - c] = -np.minimum.reduceat(distance, starts, axis=1)
        return result

    m, k = len(images), len(texts)
    chunk_bytes //= 2  # distances and the nearest of them are held together
    forward = _ranks(lambda a, b: nearness(a, b, 0, k), image_to_text, m, k, chunk_bytes)
    backward = _ranks(lambda a, b: nearness(0, m, a, b).T, text_to_image, k, m, chunk_bytes)
    return {
        "image_to_text": measures(forward, image_to_text, k),
        "text_to_image": measures(backward, text_to_image, m),
    }


def _compared(
    compare: Comparer, queries: np.ndarray, candidates: np.ndarray, truth: Truth, chunk_bytes: int
) -> np.ndarray:
    """`ranks` of finite features: the devices count what is surely ahead, the host looks at what is near."""
    m, k = len(queries), len(candidates)
    # Twice the most that a float32 product of two rows can be off, in any order of the sum (d roundings of the sum, and
    # those of the factors), for each of the two scores that are compared.
    length = np.linalg.norm(queries, axis=1).max() * np.linalg.norm(candidates, axis=1).max()
    margin = float(4 * (queries.shape[1] + 4) * 2.0**-24 * length + _TIE)
    width = max([1, *map(len, truth)])
    width = 1 << (width - 1).bit_length()  # powers of two: few compiled programs
    right = np.array([[*rows, *[-1] * (width - len(rows))] for rows in truth], np.int32).reshape(m, width)
    step = 1 << max(0, (chunk_bytes // (4 * k)).bit_length() - 1)
    step = min(step, 1 << (m - 1).bit_length())
    result, heavy = np.full(m, k + 1, np.int64), []
    some = compare(candidates.astype(np.float32))
    for a in range(0, m, step):
        rows = np.minimum(np.arange(a, a + step), m - 1)  # the last again, so that all chunks have one shape
        ahead, near = some(queries[rows].astype(np.float32), right[rows], margin)
        for row in range(a, min(a + step, m)):
            if not len(truth[row]):
                continue
            close = np.flatnonzero(np.unpackbits(near[row - a], count=k))
            if len(close) > max(256, k // 64):
                heavy.append(row)  # a row of the whole matrix costs less than so many of its places
                continue
            best = (candidates[list(truth[row])] @ queries[row]).max()
            result[row] = 1 + ahead[row - a] + np.count_nonzero(candidates[close] @ queries[row] >= best - _TIE)
    some_truth = [truth[row] for row in heavy]
    result[heavy] = _ranks(lambda a, b: queries[heavy[a:b]] @ candidates.T, some_truth, len(heavy), k, chunk_bytes)
    return result


def _ranks(
    scores: Callable[[int, int], np.ndarray], truth: Truth, queries: int, candidates: int, chunk_bytes: int
) -> np.ndarray:
    """Ranks of all queries from `scores(a, b)`, the float64 `[b - a, candidates]` scores of queries a..b."""
    result = np.empty(queries, np.int64)
    step = max(1, chunk_bytes // (8 * max(candidates, 1)))
    for a in range(0, queries, step):
        b = min(a + step, queries)
        row = np.repeat(np.arange(b - a), [len(right) for right in truth[a:b]])
        column = np.array([candidate for right in truth[a:b] for candidate in right], np.int64)
        best = np.full(b - a, -np.inf)
        with np.errstate(invalid="ignore"):  # a model that diverged is measured, not reported by a warning
            block = scores(a, b)
            right = block[row, column]
            # Infinity for NaN: both make the query a miss, and maximum.at warns of NaN in spite of errstate.
            np.maximum.at(best, row, np.where(np.isnan(right), np.inf, right))
            ahead = ~(block < (best - _TIE)[:, None])  # "not below", so that a NaN counts against
        ahead[row, column] = False
        result[a:b] = np.where(np.isfinite(best), 1 + ahead.sum(1), candidates + 1)
    return result


def measures(rank: np.ndarray, truth: Truth, candidates: int) -> dict[str, float]:
    """Recalls and median of the ranks of those queries that have a right answer."""
    asked = rank[np.array([len(right) > 0 for right in truth], bool)]
    if not len(asked):
        raise ValueError("no query has a right answer: there is nothing to measure")
    # min: a miss is one among five candidates, too.
    recalls = {f"r{k}": float(np.mean(asked <= min(k, candidates))) for k in KS}
    return recalls | {"median_rank": float(np.median(asked))}
