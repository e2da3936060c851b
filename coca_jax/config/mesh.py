"""Sizes of the mesh: which devices there are, and how many lie along each axis."""

from __future__ import annotations

import math

from coca_jax.config.keys import ConfigError, Mesh


def divisors(number: int) -> str:
    """What a message offers: 1, 2, 3, 6 for 6."""
    return ", ".join(map(str, all_divisors(number)))


def all_divisors(number: int) -> list[int]:
    """In ascending order, in time that grows with the square root of the number."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def mesh_shape(
    mesh: Mesh, device_count: int, *, slice_count: int = 1, platform: str | None = None
) -> tuple[int, int, int]:
    """Sizes of (replica, fsdp, tensor) in the whole job, with -1 resolved.

    Args:
      mesh: what is configured.
      device_count: devices of the whole job.
      slice_count: groups of devices with a fast network inside: `sharding.slice_count()`.
      platform: cpu | gpu | tpu. Slices of TPUs must be given an axis; elsewhere the devices may also be taken in order.

    Raises:
      ConfigError: the devices or the slices do not fit.
    """
    dcn = dcn_shape(mesh, slice_count)
    slices = math.prod(dcn)
    if platform == "tpu" and slices != slice_count:
        raise ConfigError(
            f"config.mesh(dcn_replica=1, dcn_fsdp=1) gives no axis to the {slice_count} slices that these "
            f"{device_count} chips are: set config.mesh.dcn_replica=-1 (or dcn_fsdp=-1, where a slice cannot hold the "
            "model)"
        )
    where = f" of each of the {slices} slices" if slices > 1 else ""
    sizes = {"replica": mesh.replica, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    if mesh.replica == -1 and mesh.tensor >= 1 and mesh.fsdp * mesh.tensor > device_count // slices >= mesh.tensor:
        # Fewer devices than a copy of the model is meant to lie on hold one copy: a pod's recipe starts on them.
        sizes |= {"replica": 1, "fsdp": -1}
    inside = _resolve(sizes, device_count // slices, f"devices{where}")
    return inside[0] * dcn[0], inside[1] * dcn[1], inside[2] * dcn[2]


def dcn_shape(mesh: Mesh, slice_count: int) -> tuple[int, int, int]:
    """Slices along (replica, fsdp, tensor), with -1 resolved; (1, 1, 1) where none are configured.

    Raises:
      ConfigError: the slices do not fit.
    """
    if (mesh.dcn_replica, mesh.dcn_fsdp) == (1, 1):
        return 1, 1, 1
    replica, fsdp = _resolve({"dcn_replica": mesh.dcn_replica, "dcn_fsdp": mesh.dcn_fsdp}, slice_count, "slices")
    return replica, fsdp, 1


def _resolve(sizes: dict[str, int], count: int, of: str) -> list[int]:
    text = ", ".join(f"{k}={v}" for k, v in sizes.items())
    if any(v < 1 and v != -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"config.mesh({text}): each axis is 1 or more, and at most one is -1 (the rest)")
    known = math.prod(v for v in sizes.values() if v != -1)
    if -1 in sizes.values():
        if count % known:
            raise ConfigError(
                f"config.mesh({text}): {known} does not divide the {count} {of}; what does: {divisors(count)}"
            )
    elif known != count:
        raise ConfigError(
            f"config.mesh({text}) names {known} {of} where there are {count}: set one axis to -1 (the rest)"
        )
    return [count // known if v == -1 else v for v in sizes.values()]
