"""Parameters given to a fresh state, of which each device takes its shards. tests/start_test.py has one device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from coca_jax import config, sharding
from coca_jax.train import init
from coca_jax.train import optimizer as optimizers
from coca_jax.train import state as states
from tests import tiny

# Half of a model, which compiles in half the time.
CONFIG = tiny.replace(
    tiny.CONFIG, optimizer__ema_decay=0.9, model__param_dtype="bfloat16", loss__lambda_cap=0.0, model__text__n_multi=0
)


def fresh(make: Callable[..., Any]) -> Any:
    """A state, or its shapes."""
    optimizer = optimizers.make_optimizer(CONFIG.optimizer, CONFIG.steps, states.abstract_parameters(CONFIG))
    mesh = sharding.make_mesh(config.mesh_shape(config.Mesh(), jax.device_count()))
    with jax.set_mesh(mesh):
        return make(CONFIG, optimizer, mesh)


def given_parameters_are_there() -> None:
    before = fresh(states.real)
    given = {"image_encoder": tiny.parameters(CONFIG.model)["image_encoder"]}
    after = init.with_parameters(before, given)
    for tree, dtype in ((after.params, jax.numpy.bfloat16), (after.ema, np.float32)):
        assert tree.keys() == before.params.keys()
        same = jax.tree.map(
            lambda x, value, dtype=dtype: x.dtype == dtype and np.array_equal(x, np.asarray(value, dtype)),
            tree["image_encoder"],
            given["image_encoder"],
        )
        assert jax.tree.all(same)
    untouched = [(s.opt_state, s.params["text_decoder"], s.ema["text_decoder"], s.step) for s in (before, after)]
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, untouched), strict=True))
    places = [jax.tree.map(lambda x: x.sharding, s.replace(rng=None)) for s in (before, after)]
    assert places[0] == places[1]
    kernel = after.params["image_encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * jax.device_count() == kernel.size
    print("as given")


def test_each_of_eight_devices_takes_its_shards(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "as given" in run_python(given_parameters_are_there, devices=8).stdout


@pytest.mark.parametrize(("path", "shape"), [("text", (3,)), ("logit_scale", (2,))])
def test_what_is_no_parameter_is_refused(path: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{path} is given with shape"):
        init.with_parameters(fresh(states.abstract), {path: np.zeros(shape, np.float32)})
