from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from coca_jax import sharding
from coca_jax.train import optimizer, state
from tests import tiny


def test_every_parameter_of_every_architecture_has_a_place() -> None:
    for kind in ("parallel", "cascade", "single"):
        c = tiny.replace(
            tiny.CONFIG, model__pooler__kind=kind, model__text__cross_mlp=True, model__image__pre_norm=True
        )
        c = tiny.replace(c, model__text__cross_kv_norm=True, model__image__class_token=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.abstract_parameters(c)):
            sharding.spec(*sharding.parameter_axes(sharding.path_of(path), leaf.ndim))


def test_an_unknown_parameter_or_axis_is_an_error() -> None:
    with pytest.raises(ValueError, match="matches no rule"):
        sharding.parameter_axes("image_encoder/surprise", 2)
    with pytest.raises(ValueError, match="has 5 axes"):
        sharding.parameter_axes("image_encoder/blocks/attention/query/kernel", 5)
    with pytest.raises(ValueError, match="'widht' is not one of"):
        sharding.spec("widht")


def test_two_axes_that_want_one_mesh_axis_collide() -> None:
    with pytest.raises(ValueError, match="twice"):
        sharding.spec("batch", "embed")


def test_shard_does_nothing_without_a_mesh() -> None:
    x = jnp.ones((4, 4))
    assert sharding.shard(x, "batch", None) is x


def test_a_mesh_must_use_every_device() -> None:
    with pytest.raises(ValueError, match="does not use the 1 devices"):
        sharding.make_mesh((1, 2, 1), jax.devices()[:1])


def check_placement() -> None:
    """Runs with 8 devices."""
    c = tiny.replace(tiny.CONFIG, optimizer__name="adafactor", model__text__vocab_size=256, model__image__width=128)
    c = tiny.replace(c, model__image__mlp_dim=256, optimizer__ema_decay=0.9)
    mesh = sharding.make_mesh((2, 2, 2))
    tx = optimizer.make_optimizer(c.optimizer, c.steps, state.abstract_parameters(c))
    with jax.set_mesh(mesh):
        real = state.real(c, tx, mesh)
    specs = {sharding.path_of(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(real)}
    query = "image_encoder/blocks/attention/query/kernel"
    assert specs[f"params/{query}"] == P(None, "fsdp", "tensor", None)
    assert specs[f"ema/{query}"] == specs[f"params/{query}"]
    assert specs["params/text_decoder/token_embedding/embedding"] == P("tensor", "fsdp")
    # Momentum lies where its parameter does; row and column statistics keep the axes they still have.
    states = {name: spec for name, spec in specs.items() if name.startswith("opt_state")}
    up = "image_encoder/blocks/mlp/up/kernel"  # [l, d, f] -> [l, d] and [l, f]
    kinds = {name.split("/" + up)[0].rsplit("/", 1)[1]: spec for name, spec in states.items() if name.endswith(up)}
    assert kinds["ema"] == P(None, "fsdp", "tensor")
    assert {kinds["v_row"], kinds["v_col"]} == {P(None, "fsdp"), P(None, "tensor")}
    # Each device holds its share and not the whole.
    kernel = real.params["image_encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size

    # The constraint is in the lowered program: under the deprecated `with mesh:` it would be silently absent.
    def pinned(x: jax.Array) -> jax.Array:
        return sharding.shard(x * 2, "batch", "mlp")

    with jax.set_mesh(mesh):
        text = jax.jit(pinned).lower(jnp.ones((8, 8))).as_text()
    assert "sharding_constraint" in text, text


def test_placement_on_eight_devices(run_python) -> None:
    run_python(check_placement)
