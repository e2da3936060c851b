"""Sharding of all arrays: one mesh, one table from logical to mesh axes, logical axes of parameters by path.

The same program runs on 1 CPU device and on 2,048 chips; only the mesh differs. The tables below alone decide the
placement of parameters, optimizer state and activations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("replica", "fsdp", "tensor")

# Logical axis -> mesh axes. An array that uses one mesh axis twice is an error.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "replicas": ("replica",),  # a batch with all its rows on each device of a replica, split by columns
    "embed": ("fsdp",),  # model width of parameters
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),  # scanned over
    "width": (),  # model width of activations
    "head_width": (),
    "position": (),
    "patch": (),
    "latent": (),  # contrastive space
    "classes": (),  # of a classification task
    "rank": (),  # rank of a low-rank update
}

# Parameter path -> logical axes; the first match wins. Stacked layers have "layers" in front of these.
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
    (r"^(classifier/linear|bridge/matching)/kernel$", ("embed", "classes")),
    (r"^bridge/projection/kernel$", ("embed", "width")),
    (r"^classifier/frame_embedding$", ("position", "embed")),
    (r"position_embedding$", ("position", "embed")),
    (r"(pooler|bridge)/query_tokens$", ("position", "embed")),
    (r"/(bias|scale|class_token|cls_embedding)$", ("width",)),
    (r"^logit_(scale|bias)$", ()),
)


def slice_count(devices: Sequence[jax.Device] | None = None) -> int:
    """Number of device groups with a fast network: TPU slices, GPU nodes as JAX reports them, otherwise processes.

    The slower network between groups is called DCN in `config.Mesh`.
    """
    return len({_slice_of(d) for d in (jax.devices() if devices is None else devices)})


def make_mesh(
    shape: tuple[int, int, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    dcn: tuple[int, int, int] = (1, 1, 1),
) -> Mesh:
    """Mesh of (replica, fsdp, tensor) devices, arranged for the interconnect by JAX.

    Args:
      shape: Sizes of the axes over the whole job.
      devices: Devices to use; None for all of the job.
      dcn: Number of slices along each axis. Along an axis, the devices of one slice are consecutive, with `dcn - 1`
        steps from one slice to the next.

    Raises:
      ValueError: The shape does not use every device, or dcn does not use every slice or does not divide the shape.
    """
    devices = jax.devices() if devices is None else devices
    named = dict(zip(MESH_AXES, shape, strict=True))
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh {named} has {math.prod(shape)} devices, but there are {len(devices)}")
    if math.prod(dcn) > 1:
        if math.prod(dcn) != slice_count(devices) or any(n % d for n, d in zip(shape, dcn, strict=True)):
            raise ValueError(f"mesh {named} cannot be split over {slice_count(devices)} slices by dcn={dcn}")
        inside = [n // d for n, d in zip(shape, dcn, strict=True)]
        # JAX splits a physical axis only as a last resort, where no whole axes make up the shape.
        array = mesh_utils.create_hybrid_device_mesh(
            inside, dcn, devices, process_is_granule=not _has_slices(devices[0]), allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: the compiler propagates shardings. With jax.make_mesh's default (Explicit), a plain Flax Dense raises.
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _has_slices(device: jax.Device) -> bool:
    return getattr(device, "slice_index", None) is not None


def _slice_of(device: jax.Device) -> int:
    return device.slice_index if _has_slices(device) else device.process_index


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of logical axes; None is an axis that is not sharded.

    Raises:
      ValueError: An axis is not in the table, or two axes need the same mesh axis.
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
    """Constrain an activation to its logical axes; no-op without a mesh (a notebook, one device).

    Axes that the mesh does not divide evenly are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(spec(*axes), x.shape, dict(mesh.shape)))


def per_shard(
    function: Callable[..., jax.Array], *arrays: tuple[jax.Array | None, tuple[str | None, ...]]
) -> jax.Array:
    """Run `function(*arrays)` on each device with its shards, for kernels that the compiler cannot partition.

    Args:
      function: Function of the arrays' shards whose result for a shard depends on that shard alone. The result has the
        axes of the first array.
      *arrays: Arrays with their logical axes, as for `shard`. An axis that the mesh does not divide evenly is
        replicated. None is passed through.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*(x for x, _ in arrays))
    sizes = dict(mesh.shape)
    specs = tuple(None if x is None else _fit(spec(*axes), x.shape, sizes) for x, axes in arrays)
    # check_vma: a kernel does not declare over which axes its result varies.
    mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*(x for x, _ in arrays))


def keep_axis_order(x: jax.Array) -> jax.Array:
    """Keep an activation in the memory order of its axes on a single GPU; no-op elsewhere.

    In a program for one GPU, XLA (jaxlib 0.10.2) otherwise moves the batch of images innermost, and every norm then
    reads a token's values from far apart. Sharded programs do not have this problem, and the constraint would gather x
    there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None or device.platform != "gpu" or mesh.size > 1:
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def parameter_axes(path: str, ndim: int) -> tuple[str, ...]:
    """Logical axes of the parameter at a path such as `image_encoder/blocks/attention/query/kernel`.

    Raises:
      ValueError: No rule matches, or the rule has another number of axes.
    """
    if found := re.fullmatch(r"lora/(.*)/(a|b)", path):
        layers = _table_axes(found[1])[: "/blocks/" in path]
        inputs, outputs = low_rank_axes(found[1])
        axes = (*layers, *inputs, "rank") if found[2] == "a" else (*layers, "rank", *outputs)
    else:
        axes = _table_axes(path)
    if len(axes) != ndim:
        raise ValueError(f"parameter {path} has {ndim} axes, but the table in coca_jax/sharding.py lists {axes}")
    return axes


def low_rank_axes(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical input axes and output axes of the kernel at a path, without the layer axis of a stack."""
    axes = tuple(axis for axis in _table_axes(path) if axis != "layers")
    count = {"heads": 2, "patch": 3}.get(axes[0], 1)
    return axes[:count], axes[count:]


def _table_axes(path: str) -> tuple[str, ...]:
    for pattern, axes in _PARAMETERS:
        if re.search(pattern, path):
            return ("layers", *axes) if "/blocks/" in path else axes
    raise ValueError(f"parameter {path} matches no rule: add it to the table in coca_jax/sharding.py")


def path_of(key_path: tuple[Any, ...]) -> str:
    """JAX key path as `a/b/c`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def tree_shardings(tree: Any, parameters: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters, or of arrays derived from parameters (optimizer state, EMA).

    A leaf whose path ends in a parameter's path is sharded like that parameter. If it lacks some of the parameter's
    axes (Adafactor's row and column statistics), the remaining ones, matched by size, keep their sharding. All other
    leaves (counters, keys) are replicated.

    Args:
      tree: Arrays or jax.ShapeDtypeStructs.
      parameters: The parameters or their shapes, a nested dict.
      mesh: Device mesh with axes MESH_AXES.
    """
    sizes = dict(mesh.shape)
    known = {
        path_of(path): (leaf.shape, parameter_axes(path_of(path), leaf.ndim))
        for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
    }

    def leaf_sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            if (name := "/".join(parts[start:])) in known:
                axes = _surviving_axes(*known[name], leaf.shape)
                return NamedSharding(mesh, _fit(spec(*axes), leaf.shape, sizes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


LARGE = 2**20  # bytes per device from which an incompletely sharded parameter is reported


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """A large parameter that is replicated over some devices.

    Attributes:
      path, shape: Path and shape of the parameter.
      device_bytes: Bytes of it on each device.
      reason: One line with the cause and a fix.
    """

    path: str
    shape: tuple[int, ...]
    device_bytes: int
    reason: str


def unsharded(parameters: Any, mesh: Mesh, *, large: int = LARGE) -> list[Unsharded]:
    """Large parameters that the mesh splits less than it could, largest first.

    Either an axis that should be split does not divide evenly, so that each device holds all of it, or this mesh splits
    no axis of the parameter. Copies along `replica` are intended and not reported.

    Args:
      parameters: Arrays or jax.ShapeDtypeStructs, a nested dict.
      mesh: Device mesh with axes MESH_AXES.
      large: Bytes per device from which a parameter is reported.
    """
    sizes = dict(mesh.shape)
    found: list[Unsharded] = []
    if sizes["fsdp"] * sizes["tensor"] == 1:
        return found
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        path = path_of(key_path)
        axes = parameter_axes(path, leaf.ndim)
        sharding = NamedSharding(mesh, _fit(spec(*axes), leaf.shape, sizes))
        held = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if held < large:
            continue
        reasons = []
        for axis, size in zip(axes, leaf.shape, strict=True):
            parts = math.prod(sizes[name] for name in RULES[axis])
            if size % parts:
                name = " x ".join(f"mesh.{name}" for name in RULES[axis])
                fits = max(n for n in range(1, parts) if size % n == 0)
                below, above = size // parts * parts, -(-size // parts) * parts
                fitting = f"{below} or {above}" if below else f"{above}"
                reasons.append(f"{axis}={size} is not divisible by {name}={parts}: use {fitting}, or {name}={fits}")
        if not reasons and sharding.is_fully_replicated:
            wanted = sorted({name for axis in axes for name in RULES[axis]})
            reasons = [f"only mesh.{' and mesh.'.join(wanted)} would split it" if wanted else "no rule splits it"]
        if reasons:
            found.append(Unsharded(path, tuple(leaf.shape), held, "; ".join(reasons)))
    return sorted(found, key=lambda u: (-u.device_bytes, u.path))


def warn_unsharded(parameters: Any, mesh: Mesh) -> None:
    """Log a warning for each parameter that `unsharded` finds, on the first process."""
    for found in unsharded(parameters, mesh) if jax.process_index() == 0 else ():
        shape, size = "x".join(map(str, found.shape)), found.device_bytes / 2**20
        logging.warning("%s (%s) holds %.1f MiB on each device: %s", found.path, shape, size, found.reason)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the first axis over replica and fsdp."""
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
    for size in leaf_shape:  # a statistic drops axes and keeps the order of the rest
        while at < len(shape) and shape[at] != size:
            at += 1
        if at == len(shape):
            return (None,) * len(leaf_shape)
        survivors.append(axes[at])
        at += 1
    return tuple(survivors)


def _fit(partition: PartitionSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Drop mesh axes that do not divide an array's axis; the array is then replicated along them."""
    fitted = []
    for size, part in zip(shape, (*partition, *(None,) * (len(shape) - len(partition))), strict=True):
        names = part if isinstance(part, tuple) else (part,) if part else ()
        fitted.append(part if size % int(np.prod([sizes[n] for n in names], dtype=int)) == 0 else None)
    return PartitionSpec(*fitted)
