"""Where every array lives: one mesh, one table of logical axis -> mesh axis, parameter axes by path.

The same program runs on 1 CPU device and on 2,048 chips: only the mesh differs. Parameters, optimiser state and
activations are placed by the tables below and by nothing else.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("replica", "fsdp", "tensor")

# Logical axis -> mesh axes. An array that names one mesh axis twice is an error, not a guess.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": ("fsdp",),  # the model's width, of parameters
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),  # scanned
    "width": (),  # the model's width, of activations
    "head_width": (),
    "position": (),
    "patch": (),
    "latent": (),  # the contrastive space
}

# Parameter path -> logical axes; the first match wins. A stacked layer has "layers" in front of what is written here.
_PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"attention/(query|key|value)/kernel$", ("embed", "heads", "head_width")),
    (r"attention/(query|key|value)/bias$", ("heads", "head_width")),
    (r"attention/out/kernel$", ("heads", "head_width", "embed")),
    (r"mlp/up/kernel$", ("embed", "mlp")),
    (r"mlp/up/bias$", ("mlp",)),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"token_embedding/embedding$", ("vocab", "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"patch_embedding/kernel$", ("patch", "patch", "patch", "embed")),
    (r"(image|text)_projection/kernel$", ("embed", "latent")),
    (r"position_embedding$", ("position", "embed")),
    (r"pooler/query_tokens$", ("position", "embed")),
    (r"/(bias|scale|class_token|cls_embedding)$", ("width",)),
    (r"^logit_scale$", ()),
)


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of (replica, fsdp, tensor) devices, laid out for the interconnect by JAX.

    Raises:
      ValueError: the shape does not use every device.
    """
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh {dict(zip(MESH_AXES, shape, strict=True))} does not use the {len(devices)} devices")
    # Auto: the compiler propagates shardings. jax.make_mesh's default (Explicit) makes a plain Flax Dense raise.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(*axes: str | None) -> PartitionSpec:
    """Logical axes -> PartitionSpec; None is an axis that is not sharded.

    Raises:
      ValueError: an axis is not in the table, or two axes want the same mesh axis.
    """
    parts: list[Any] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not one of {', '.join(RULES)}")
        parts.append(RULES[axis] if axis else ())
    used = [name for part in parts for name in part]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {parts}")
    return PartitionSpec(*(part if len(part) > 1 else (part[0] if part else None) for part in parts))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes; does nothing where no mesh is set (a notebook, one device).

    An axis that the mesh does not divide evenly is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(spec(*axes), x.shape, dict(mesh.shape)))


def parameter_axes(path: str, ndim: int) -> tuple[str, ...]:
    """Logical axes of the parameter at a path such as `image_encoder/blocks/attention/query/kernel`.

    Raises:
      ValueError: no rule matches, or the rule does not fit the number of axes.
    """
    for pattern, axes in _PARAMETERS:
        if re.search(pattern, path):
            if "/blocks/" in path:
                axes = ("layers", *axes)
            if len(axes) != ndim:
                raise ValueError(f"parameter {path} has {ndim} axes where the table in sharding.py says {axes}")
            return axes
    raise ValueError(f"parameter {path} matches no rule: add it to the table in coca_jax/sharding.py")


def path_of(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as `a/b/c`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def tree_shardings(tree: Any, parameters: Any, mesh: Mesh) -> Any:
    """NamedShardings for any tree that holds parameters, or arrays derived from parameters (optimiser state, EMA).

    A leaf whose path ends in a parameter's path is placed like that parameter. One that has lost axes of it
    (Adafactor's row and column statistics) keeps the placement of the axes that it still has, found by their sizes.
    Everything else (counters, keys) is replicated.

    Args:
      tree: arrays or jax.ShapeDtypeStructs.
      parameters: the parameters (or their shapes), a nested dict.
      mesh: of MESH_AXES.
    """
    sizes = dict(mesh.shape)
    known = {
        path_of(path): (leaf.shape, parameter_axes(path_of(path), leaf.ndim))
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
    }

    def place(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            if (name := "/".join(parts[start:])) in known:
                axes = _surviving_axes(*known[name], leaf.shape)
                return NamedSharding(mesh, _fit(spec(*axes), leaf.shape, sizes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over replica and fsdp."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _surviving_axes(
    shape: tuple[int, ...], axes: tuple[str, ...], leaf_shape: tuple[int, ...]
) -> tuple[str | None, ...]:
    if leaf_shape == shape:
        return axes
    survivors: list[str | None] = []
    at = 0
    for size in leaf_shape:  # a statistic drops axes and keeps the order of the others
        while at < len(shape) and shape[at] != size:
            at += 1
        if at == len(shape):
            return (None,) * len(leaf_shape)
        survivors.append(axes[at])
        at += 1
    return tuple(survivors)


def _fit(partition: PartitionSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Drops the mesh axes that do not divide an array's axis: it is then replicated along them."""
    fitted = []
    for size, part in zip(shape, (*partition, *(None,) * (len(shape) - len(partition))), strict=True):
        names = part if isinstance(part, tuple) else (part,) if part else ()
        fitted.append(part if size % int(np.prod([sizes[n] for n in names], dtype=int)) == 0 else None)
    return PartitionSpec(*fitted)
