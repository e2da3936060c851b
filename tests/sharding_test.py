from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from coca_jax import config, sharding
from coca_jax.train import optimizer, state
from tests import tiny


def test_every_parameter_of_every_architecture_has_logical_axes() -> None:
    for kind in ("parallel", "cascade", "single"):
        c = tiny.replace(
            tiny.CONFIG, model__pooler__kind=kind, model__text__cross_mlp=True, model__image__pre_norm=True
        )
        c = tiny.replace(c, model__text__cross_kv_norm=True, model__image__class_token=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.abstract_parameters(c)):
            sharding.spec(*sharding.parameter_axes(sharding.path_of(path), leaf.ndim))


def test_unknown_parameters_and_axes_are_rejected() -> None:
    with pytest.raises(ValueError, match="matches no rule"):
        sharding.parameter_axes("image_encoder/surprise", 2)
    with pytest.raises(ValueError, match="has 5 axes"):
        sharding.parameter_axes("image_encoder/blocks/attention/query/kernel", 5)
    with pytest.raises(ValueError, match="'widht' is not one of"):
        sharding.spec("widht")


def test_two_logical_axes_of_one_mesh_axis_are_rejected() -> None:
    with pytest.raises(ValueError, match="twice"):
        sharding.spec("batch", "embed")


def test_shard_does_nothing_without_a_mesh() -> None:
    x = jnp.ones((4, 4))
    assert sharding.shard(x, "batch", None) is x


@pytest.mark.parametrize(
    ("platform", "sizes", "constrained"),
    [("gpu", (1, 1, 1), True), ("gpu", (2, 4, 1), False), ("cpu", (1, 1, 1), False), ("tpu", (1, 1, 1), False)],
)
def test_only_a_single_gpu_gets_a_layout_constraint(platform: str, sizes: Any, constrained: bool) -> None:
    device = jax.sharding.AbstractDevice("", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES, abstract_device=device)
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.make_jaxpr(sharding.keep_axis_order)(x)
    assert [equation.primitive.name for equation in found.eqns] == ["layout_constraint"] * constrained
    assert not jax.make_jaxpr(sharding.keep_axis_order)(x).eqns  # without a mesh


def test_a_mesh_must_use_every_device() -> None:
    with pytest.raises(ValueError, match="2 devices, but there are 1"):
        sharding.make_mesh((1, 2, 1), jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """Stand-in for an absent device, with the attributes that JAX's mesh layout reads."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "stand-in"


def slices_of(mesh: Any, axis: str, attribute: str = "slice_index") -> set[tuple[int, ...]]:
    """Slices visited along an axis, for each index of the other axes."""
    lines = np.moveaxis(mesh, sharding.MESH_AXES.index(axis), -1).reshape(
        -1, mesh.shape[sharding.MESH_AXES.index(axis)]
    )
    return {tuple(getattr(device, attribute) for device in line) for line in lines}


@pytest.fixture
def plain_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return meshes of stand-ins as arrays, because JAX creates a Mesh of its own devices only."""
    monkeypatch.setattr(sharding, "Mesh", lambda array, *_, **__: array)


# Devices in a possible order: those of a slice need not be adjacent.
SLICES = [Chip(id=i, process_index=i // 2, slice_index=i % 2) for i in range(16)]
NODES = [Chip(id=i, process_index=i // 8) for i in range(16)]


@pytest.mark.parametrize(("devices", "attribute"), [(SLICES, "slice_index"), (NODES, "process_index")])
def test_an_axis_crosses_slices_only_where_dcn_says_so(devices: list[Any], attribute: str, plain_mesh: None) -> None:
    assert sharding.slice_count(devices) == 2
    mesh: Any = sharding.make_mesh((2, 4, 2), devices, dcn=(2, 1, 1))
    assert mesh.shape == (2, 4, 2) and len(set(mesh.flat)) == 16
    assert slices_of(mesh, "replica", attribute) == {(0, 1)}
    assert slices_of(mesh, "fsdp", attribute) == {(0, 0, 0, 0), (1, 1, 1, 1)}
    assert slices_of(mesh, "tensor", attribute) == {(0, 0), (1, 1)}
    mesh = sharding.make_mesh((2, 4, 2), devices, dcn=(1, 2, 1))
    assert slices_of(mesh, "replica", attribute) == {(0, 0), (1, 1)}
    assert slices_of(mesh, "fsdp", attribute) == {(0, 0, 1, 1)}  # one step between slices
    assert slices_of(mesh, "tensor", attribute) == {(0, 0), (1, 1)}


def test_dcn_that_does_not_fit_the_slices_is_rejected() -> None:
    for dcn in ((4, 1, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"2 slices by dcn=\("):
            sharding.make_mesh((4, 4, 1), SLICES, dcn=dcn)


COMPILE_FOR_TWO_SLICES = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from coca_jax import config, sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
mesh = config.Mesh(dcn_replica=-1, tensor=2)
slices = sharding.slice_count(devices)
shape = config.mesh_shape(mesh, len(devices), slice_count=slices, platform="tpu")
mesh = sharding.make_mesh(shape, devices, dcn=config.dcn_shape(mesh, slices))
assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}, mesh
assert [{d.slice_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding.batch_sharding(mesh))
with jax.set_mesh(mesh):
    program = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh)).lower(x).compile()
assert "all-reduce" in program.as_text()
"""


@pytest.mark.slow
def test_a_program_compiles_for_two_tpu_slices(run_python) -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu: pip install libtpu")
    run_python(COMPILE_FOR_TWO_SLICES, 1, env={"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})


def mesh_of(replica: int, fsdp: int, tensor: int) -> Any:
    return jax.sharding.AbstractMesh((replica, fsdp, tensor), sharding.MESH_AXES)


def find(c: config.Config, mesh: Any, large: int = 1) -> dict[str, sharding.Unsharded]:
    return {found.path: found for found in sharding.unsharded(state.abstract_parameters(c), mesh, large=large)}


def test_large_unsharded_parameters_are_found_with_a_fix() -> None:
    c = tiny.replace(tiny.CONFIG, model__text__vocab_size=1001, model__text__width=64, model__text__mlp_dim=64)
    embedding, head = "text_decoder/token_embedding/embedding", "text_decoder/lm_head/kernel"
    assert find(c, mesh_of(8, 1, 1)) == {}  # copies along replica are intended
    split = find(c, mesh_of(1, 4, 2), large=20_000)  # 1001 x 64 in float32, over fsdp: 64,064 bytes a device
    assert list(split) == [head, embedding]
    assert split[embedding].device_bytes == 1001 * 64 * 4 // 4 and split[embedding].shape == (1001, 64)
    assert split[embedding].reason == (
        "vocab=1001 is not divisible by mesh.tensor=2: use 1000 or 1002, or mesh.tensor=1"
    )
    assert find(c, mesh_of(1, 1, 14), large=20_000)[embedding].reason.endswith("use 994 or 1008, or mesh.tensor=13")
    # The suggested fixes work.
    for vocabulary, mesh in ((1002, (1, 4, 2)), (1008, (1, 1, 14)), (1001, (1, 1, 13))):
        c = tiny.replace(c, model__text__vocab_size=vocabulary)
        assert embedding not in find(c, mesh_of(*mesh), large=9_000), vocabulary
    # Without fsdp no axis of a projection is split.
    whole = find(c, mesh_of(1, 1, 2), large=1000)["text_projection/kernel"]
    assert whole.device_bytes == 64 * 8 * 4 and whole.reason == "only mesh.fsdp would split it"


def test_unsharded_parameters_are_logged_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    parameters = {"lm_head": {"kernel": jax.ShapeDtypeStruct((1024, 5001), jnp.float32)}}
    with caplog.at_level(logging.WARNING, logger="absl"):
        sharding.warn_unsharded(parameters, mesh_of(1, 2, 2))
        messages = [record.getMessage() for record in caplog.records]
        sharding.warn_unsharded(parameters, mesh_of(1, 2, 3))  # 5001 = 3 x 1667
    assert len(caplog.records) == 1
    assert messages[0].startswith(
        "lm_head/kernel (1024x5001) holds 9.8 MiB on each device: vocab=5001 is not divisible by"
    )


def check_shardings() -> None:
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
    # Momentum is sharded like its parameter; row and column statistics keep the sharding of their remaining axes.
    states = {name: spec for name, spec in specs.items() if name.startswith("opt_state")}
    up = "image_encoder/blocks/mlp/up/kernel"  # [l, d, f] -> [l, d] and [l, f]
    kinds = {name.split("/" + up)[0].rsplit("/", 1)[1]: spec for name, spec in states.items() if name.endswith(up)}
    assert kinds["ema"] == P(None, "fsdp", "tensor")
    assert {kinds["v_row"], kinds["v_col"]} == {P(None, "fsdp"), P(None, "tensor")}
    # Each device holds its shard, not the whole.
    kernel = real.params["image_encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size

    # The lowered program has the constraint; under the deprecated `with mesh:` it would be silently missing.
    def pinned(x: jax.Array) -> jax.Array:
        return sharding.shard(x * 2, "batch", "mlp")

    with jax.set_mesh(mesh):
        text = jax.jit(pinned).lower(jnp.ones((8, 8))).as_text()
    assert "sharding_constraint" in text, text


def test_state_is_sharded_by_the_tables_on_eight_devices(run_python) -> None:
    run_python(check_shardings)
