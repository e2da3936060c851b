"""What is frozen costs no gradient, no moments and no backward pass, and does not change by a bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config, sharding
from coca_jax.model import flops
from coca_jax.train import frozen, guard, state
from coca_jax.train.optimizer import make_optimizer
from coca_jax.train.step import gradients_of, train_step
from tests import tiny

LENGTHS = [9, 2, 9, 2, 9, 2, 9, 3]
# Unrolled: the compiler counts the body of a loop once.
SMALL = {"model__image__depth": 1, "model__text__n_uni": 1, "model__text__n_multi": 1}
ALL = tiny.replace(tiny.CONFIG, **SMALL, model__image__scan_unroll=0, optimizer__ema_decay=0.9)
LOCKED = tiny.replace(ALL, optimizer__freeze=("image_encoder/.*",))


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def cost(c: config.Config) -> tuple[float, int]:
    """Operations of the gradients, and bytes beside what goes in and comes out."""
    params, batch = state.abstract_parameters(c), tiny.batch(c.model, LENGTHS)
    compiled = jax.jit(lambda p, b: gradients_of(c, p, b)).lower(params, batch).compile()
    memory = compiled.memory_analysis()
    return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_a_frozen_encoder_has_no_backward_pass() -> None:
    (operations, size), (fewer, smaller) = cost(ALL), cost(LOCKED)
    forward = flops.forward(ALL.model, batch_size=0).image_encoder * len(LENGTHS)
    # Twice the forward pass's products; and what the compiler counts beside products (softmax, norms, gelu).
    assert 2 * forward < operations - fewer < 3.5 * forward
    encoder = sum(leaf.size for leaf in jax.tree.leaves(state.abstract_parameters(ALL)["image_encoder"]))
    assert smaller < size - 4 * encoder  # its gradients, and what its forward pass kept for them


def test_frozen_parameters_keep_their_bits() -> None:
    c = tiny.replace(LOCKED, microbatches=2)
    params, batch = tiny.parameters(c.model), tiny.batch(c.model, LENGTHS)
    params["image_encoder"]["patch_embedding"]["bias"][:3] = [-0.0, 0.0, 1e-40]  # what adding 0 would change
    optimizer = make_optimizer(c.optimizer, c.steps, params)
    moments = optimizer.init(frozen.split(params, c.optimizer.freeze)[0])
    assert not any("image_encoder" in sharding.path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(moments))
    before = state.TrainState(np.zeros((), np.int32), params, moments, params, jax.random.key(0), guard.fresh())
    after, _ = jax.jit(lambda s, b: train_step(c, optimizer, s, b))(before, batch)
    for tree in (after.params, after.ema):
        kept = flat(tree["image_encoder"])
        assert all(kept[path].tobytes() == leaf.tobytes() for path, leaf in flat(params["image_encoder"]).items())
        moved, head = tree["text_decoder"]["lm_head"], params["text_decoder"]["lm_head"]
        assert not np.array_equal(moved["kernel"], head["kernel"])


@pytest.mark.slow
def test_the_others_have_the_gradients_that_they_would_have() -> None:
    params, batch = tiny.parameters(ALL.model), tiny.batch(ALL.model, LENGTHS)
    trained = jax.jit(lambda p, b: gradients_of(LOCKED, p, b)[0])(params, batch)
    everything = jax.jit(lambda p, b: gradients_of(ALL, p, b)[0])(params, batch)
    assert everything.keys() - trained.keys() == {"image_encoder"}
    for path, gradient in flat(trained).items():
        np.testing.assert_allclose(gradient, flat(everything)[path], atol=1e-5, err_msg=path)
