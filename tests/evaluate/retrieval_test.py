from __future__ import annotations

import numpy as np
import pytest

from coca_jax.evaluate import retrieval


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def brute(queries, candidates, truth):
    """Ranks by the definition, one pair at a time."""
    ranks = []
    for query, right in zip(queries, truth, strict=True):
        scores = [float(np.dot(query.astype(np.float64), c.astype(np.float64))) for c in candidates]
        best = max(scores[r] for r in right)
        ranks.append(1 + sum(s >= best - 1e-12 for j, s in enumerate(scores) if j not in right))
    return np.array(ranks)


def random_case(seed, images=60, texts=90, width=8, levels=None):
    """Features and a truth in which every text has a picture and most pictures several texts."""
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(images, width)), rng.normal(size=(texts, width))
    if levels:  # few distinct values: many exact ties
        image, text = np.sign(image[:, :levels]), np.sign(text[:, :levels])
    owner = np.concatenate([np.arange(images), rng.integers(images, size=texts - images)])
    truth = [np.flatnonzero(owner == i).tolist() for i in range(images)]
    truth[0] = [*truth[0], *truth[1]]  # texts that two pictures share
    return unit(image).astype(np.float32), unit(text).astype(np.float32), truth


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_brute_force(seed, levels):
    image, text, truth = random_case(seed, levels=levels)
    found = retrieval.recall(image, text, truth)
    expected = {
        "image_to_text": brute(image, text, truth),
        "text_to_image": brute(text, image, retrieval.invert(truth, len(text))),
    }
    if levels:
        assert len(np.unique(text, axis=0)) <= 8  # the case does have ties
    for way, ranks in expected.items():
        for k in retrieval.KS:
            assert found[way][f"r{k}"] == pytest.approx(np.mean(ranks <= k))
        assert found[way]["median_rank"] == np.median(ranks)


@pytest.mark.parametrize("levels", [None, 3])
def test_chunks_do_not_matter(levels):
    image, text, truth = random_case(7, levels=levels)
    whole = retrieval.recall(image, text, truth)
    for chunk_bytes in (1, 8 * len(text) * 7, 8 * len(text) * 33):
        assert retrieval.recall(image, text, truth, chunk_bytes) == whole


def test_collapsed_and_broken_features_never_hit():
    image, text, truth = random_case(1)
    same = retrieval.recall(np.ones_like(image), np.ones_like(text), truth)
    broken = retrieval.recall(np.full_like(image, np.nan), text, truth)
    for way in ("image_to_text", "text_to_image"):
        assert same[way]["r10"] == broken[way]["r10"] == 0
    assert broken["image_to_text"]["median_rank"] == len(text) + 1


def test_a_right_candidate_that_is_nan_is_a_miss_without_a_warning():
    text = np.eye(3)
    text[2] = np.nan  # numpy 2.5 warns of it in maximum.at, and warnings are errors here
    assert retrieval.ranks(np.eye(3)[:2], text, [[0, 2], [2]]).tolist() == [4, 4]


def test_a_wrong_candidate_that_is_nan_counts_against():
    text = np.eye(3)
    text[2] = np.nan
    assert retrieval.ranks(np.eye(3)[:2], text, [[0], [1]]).tolist() == [2, 2]


def test_perfect_features_are_perfect():
    eye = np.eye(20, dtype=np.float32)
    found = retrieval.recall(eye, eye, [[i] for i in range(20)])
    assert found["image_to_text"] == found["text_to_image"] == {"r1": 1, "r5": 1, "r10": 1, "median_rank": 1}


def test_texts_without_a_picture_only_distract():
    image, text = np.eye(2), np.array([[1.0, 0], [0, 1], [1, 0]])
    found = retrieval.recall(image, text, [[0], [1]])
    assert found["image_to_text"]["r1"] == 0.5  # the third text ties with the first
    assert found["text_to_image"]["r1"] == 1  # and is not asked about


@pytest.mark.parametrize("case", [0, 1])
def test_chance_equals_simulation(case):
    rng = np.random.default_rng(case)
    candidates = (30, 7)[case]  # fewer than 10: everything is in the top 10
    truth = [rng.choice(candidates, size, replace=False).tolist() for size in rng.integers(1, 5, size=12)]
    expected = retrieval.chance([*truth, []], candidates)
    runs = 4000
    ranks = np.empty((runs, len(truth)))
    for run in range(runs):
        position = rng.permuted(np.tile(np.arange(1, candidates + 1), (len(truth), 1)), axis=1)
        ranks[run] = [position[i, right].min() for i, right in enumerate(truth)]
    for k in retrieval.KS:
        assert expected[f"r{k}"] == pytest.approx(np.mean(ranks <= k), abs=4 * 0.5 / np.sqrt(ranks.size))
    assert abs(expected["median_rank"] - np.median(ranks)) <= 1


def test_chance_of_single_answers_is_k_over_n():
    found = retrieval.chance([[0]] * 5, 200)
    assert [found[f"r{k}"] for k in retrieval.KS] == pytest.approx([1 / 200, 5 / 200, 10 / 200])
    assert found["median_rank"] == 100


def test_random_features_score_as_chance_says():
    rng = np.random.default_rng(0)
    truth = [[i] for i in range(2000)]
    found = retrieval.recall(unit(rng.normal(size=(2000, 16))), unit(rng.normal(size=(2000, 16))), truth)
    assert found["image_to_text"]["r10"] == pytest.approx(found["chance"]["r10"], abs=4 * np.sqrt(0.005 / 2000))
    assert found["image_to_text"]["median_rank"] == pytest.approx(found["chance"]["median_rank"], rel=0.1)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="2 image features for 1 rows"):
        retrieval.recall(np.eye(2), np.eye(2), [[0]])
    with pytest.raises(IndexError, match="query 1 names candidate 2"):
        retrieval.recall(np.eye(2), np.eye(2), [[0], [2]])
    with pytest.raises(ValueError, match="nothing to measure"):
        retrieval.recall(np.eye(2), np.eye(2), [[], []])
    with pytest.raises(ValueError, match="are not"):
        retrieval.ranks(np.eye(2), np.eye(3), [[0], [1]])


def test_unique_texts_share_rows():
    texts, rows = retrieval.unique_texts([("cat", "pet"), ("dog", "pet", "dog"), ("cat",)])
    assert texts == ["cat", "pet", "dog"]
    assert rows == [[0, 1], [2, 1], [0]]
    assert retrieval.invert(rows, 3) == [[0, 2], [0, 1], [1]]


def test_top_lists_best_first():
    assert retrieval.top(np.array([[1.0, 0.1]]), np.array([[0, 1.0], [1, 0], [-1, 0]]), 2).tolist() == [[1, 0]]
    assert retrieval.top(np.eye(2), np.eye(2), 5).shape == (2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def brute_pixels(images, truth, texts, references, names):
    far = np.inf
    distance = np.full((len(images), len(texts)), far)
    for i, image in enumerate(images):
        for reference, its in zip(references, names, strict=True):
            d = ((image.astype(np.int64) - reference.astype(np.int64)) ** 2).sum()
            for name in set(its) & set(texts):
                j = texts.index(name)
                distance[i, j] = min(distance[i, j], d)
    ranks = []
    for matrix, right_ones in ((distance, truth), (distance.T, retrieval.invert(truth, len(texts)))):
        way = []
        for row, right in zip(matrix, right_ones, strict=True):
            if not right:
                continue  # no query
            best = min(row[r] for r in right)
            wrong = sum(d <= best for j, d in enumerate(row) if j not in right)
            way.append(len(row) + 1 if best == far else 1 + wrong)
        ranks.append(np.array(way))
    return ranks


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 20])
def test_pixel_baseline_equals_brute_force(chunk_bytes):
    rng = np.random.default_rng(3)
    texts = [f"name {i}" for i in range(25)]
    truth = [[i] for i in range(20)] + [[0, 21], [22, 23], [24], [5], [6]]
    images = rng.integers(0, 2, size=(25, 2, 2, 3), dtype=np.uint8) * 255  # few pixels, few values: ties
    names = [(f"name {i}",) for i in range(18)] + [("name 3", "name 21"), ("another",), ("name 22",)]
    references = rng.integers(0, 2, size=(len(names), 2, 2, 3), dtype=np.uint8) * 255
    found = retrieval.pixel_baseline(images, truth, texts, references, names, chunk_bytes)
    for way, ranks in zip(found, brute_pixels(images, truth, texts, references, names), strict=True):
        assert found[way]["median_rank"] == np.median(ranks)
        for k in retrieval.KS:
            assert found[way][f"r{k}"] == pytest.approx(np.mean(ranks <= k))


def test_pixel_baseline_misses_names_without_a_reference():
    images = np.arange(2 * 12, dtype=np.uint8).reshape(2, 2, 2, 3)
    found = retrieval.pixel_baseline(images, [[0], [1]], ["seen", "unseen"], images[:1], [("seen",)])
    # Even with two candidates in all, the second picture's name is not within the first ten.
    assert found["image_to_text"] == found["text_to_image"] == {"r1": 0.5, "r5": 0.5, "r10": 0.5, "median_rank": 2.0}
    nothing = retrieval.pixel_baseline(images, [[0], [1]], ["a", "b"], images[:0], [])
    assert nothing["image_to_text"]["r10"] == nothing["text_to_image"]["r10"] == 0


def test_pixel_baseline_refuses_other_sizes():
    with pytest.raises(ValueError, match="cannot be compared"):
        small, large = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 3, 3, 3), np.uint8)
        retrieval.pixel_baseline(small, [[0]], ["a"], large, [("a",)])
