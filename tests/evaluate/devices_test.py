"""What the devices share of an evaluation gives what one device, and the host alone, give."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import jax
import numpy as np
import pytest

from coca_jax.apply import Apply
from coca_jax.evaluate import retrieval
from coca_jax.sharding import make_mesh
from tests import tiny
from tests.evaluate.retrieval_test import random_case

# The fixture of tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def apply_on(shape: tuple[int, int, int]) -> Apply:
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    return Apply(tiny.CONFIG, mesh, bos_id=2, eos_id=1)


def shared() -> None:
    """Run with 8 devices."""
    one, eight = apply_on((1, 1, 1)), apply_on((2, 4, 1))
    undecided = 0

    def counted(compare: retrieval.Comparer) -> retrieval.Comparer:
        def of(candidates):
            some = compare(candidates)

            def call(*arguments):
                nonlocal undecided
                ahead, near = some(*arguments)
                undecided += int(np.unpackbits(near).sum())
                return ahead, near

            return call

        return of

    for seed, levels in ((0, None), (1, 3), (2, 2)):
        image, text, truth = random_case(seed, images=61, texts=97, levels=levels)
        text[5] = 0.0  # scores nothing with anyone
        inverse = retrieval.invert(truth, len(text))
        # All at once, and a few queries at a time.
        for apply, chunk in ((one, 1 << 20), (eight, 1 << 20), (eight, 4 * 97 * 8)):
            for a, b, right in ((image, text, truth), (text, image, inverse)):
                found = retrieval.ranks(a, b, right, chunk, compare=counted(apply.compare))
                np.testing.assert_array_equal(found, retrieval.ranks(a, b, right))
    assert undecided > 1000, "no score was near another: the host was never asked"
    # So many ties that the host takes whole rows.
    same = np.ones((70, 8), np.float32) / np.sqrt(np.float32(8)), np.ones((900, 8), np.float32) / np.sqrt(np.float32(8))
    assert (retrieval.ranks(*same, [[3]] * 70, compare=eight.compare) == 900).all()
    # What is no number is measured by the host alone.
    same[1][7] = np.nan
    np.testing.assert_array_equal(retrieval.ranks(*same, [[7], *[[3]] * 69], compare=eight.compare), [901, *[900] * 69])

    params, rng = tiny.parameters(tiny.MODEL), np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    tokens = tiny.tokens(tiny.MODEL, [3, 5, 9, 2, 7, *rng.integers(2, 8, 30).tolist()])
    found = one.log_probs(params, images, tokens)
    assert found.shape == (5, 35) and (found < 0).all()
    np.testing.assert_allclose(eight.log_probs(params, images, tokens), found, rtol=2e-5, atol=2e-5)
    for text, likely in zip(tokens, found.T, strict=True):
        nll, _ = one.caption_loss(params, images, np.repeat(text[None], 5, axis=0))
        np.testing.assert_allclose(likely, -nll, rtol=2e-5, atol=2e-5)
    # Short texts alone are computed in fewer positions, which changes nothing.
    np.testing.assert_allclose(one.log_probs(params, images, tokens[:2]), found[:, :2], rtol=2e-5, atol=2e-5)
    print("the same")


@pytest.mark.slow
def test_ranks_and_likelihoods_are_the_same_on_eight_devices(run_python: RunPython) -> None:
    assert run_python(shared).stdout == "the same\n"
