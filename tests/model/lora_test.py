"""Low-rank updates: zero at first, then products of low rank, with gradients for them alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import traverse_util

from coca_jax import config, sharding
from coca_jax.config import ConfigError
from coca_jax.model import lora
from coca_jax.train import frozen, state
from tests import tiny

EVERY = (r".*/(attention|cross_attention)/\w+/kernel", ".*/mlp/.*/kernel", ".*/patch_embedding/kernel")
C = tiny.replace(tiny.CONFIG, lora=config.Lora(2, 4.0, EVERY))


def test_updates_are_products_of_the_configured_rank() -> None:
    shapes = state.abstract_parameters(C)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), np.float32), shapes)
    plain = {path: leaf for path, leaf in params.items() if path != "lora"}
    merged = traverse_util.flatten_dict(lora.merged(C.lora, params), sep="/")
    before = traverse_util.flatten_dict(plain, sep="/")
    assert merged.keys() == before.keys()
    changed = [path for path in before if not np.array_equal(before[path], merged[path])]
    updates = traverse_util.flatten_dict(params["lora"], sep="/")
    assert sorted({path[:-2] for path in updates}) == sorted(changed)
    path = "image_encoder/blocks/attention/query/kernel"
    a, b = updates[f"{path}/a"], updates[f"{path}/b"]
    assert a.shape == (2, 16, 2) and b.shape == (2, 2, 2, 8)
    np.testing.assert_allclose(merged[path] - before[path], 2.0 * np.einsum("ldr,lrhk->ldhk", a, b), atol=1e-5)
    path = "text_decoder/multimodal/blocks/attention/out/kernel"
    a, b = updates[f"{path}/a"], updates[f"{path}/b"]
    assert a.shape == (2, 2, 8, 2) and b.shape == (2, 2, 16)
    np.testing.assert_allclose(merged[path] - before[path], 2.0 * np.einsum("lhkr,lrd->lhkd", a, b), atol=1e-5)
    # Each update has a sharding, and only updates are trained.
    for name, leaf in updates.items():
        assert "rank" in sharding.parameter_axes(f"lora/{name}", leaf.ndim)
    assert frozen.split(params, frozen.patterns(C))[0].keys() == {"lora"}


def test_initial_updates_are_zero() -> None:
    c = tiny.replace(C, model__image__depth=1, model__text__n_uni=1, model__text__n_multi=1)
    params = jax.jit(lambda: state.init_parameters(c, jax.random.key(0)))()
    without = jax.jit(lambda: state.init_parameters(tiny.replace(c, lora=config.Lora()), jax.random.key(0)))()
    merged = lora.merged(c.lora, params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, merged, without)))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [(".*attentoin.*", "matches no parameter"), (".*attention/query/.*", "bias, which is not a kernel")],
)
def test_patterns_that_match_no_kernel_are_rejected(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        state.abstract_parameters(tiny.replace(C, lora__kernels=(pattern,)))
