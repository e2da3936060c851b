"""Search for a fast mesh, microbatches and remat policy that fit, within a number of compilations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from coca_jax import config
from coca_jax.config import ConfigError
from coca_jax.plan.estimate import Plan
from coca_jax.plan.topology import Topology


class Choice(NamedTuple):
    """Settings that the search varies."""

    mesh: tuple[int, int, int]  # sizes within a slice
    microbatches: int
    remat: str  # policy of both towers


def configured(c: config.Config, choice: Choice) -> config.Config:
    """The configuration with a choice applied."""
    replica, fsdp, tensor = choice.mesh
    model = dataclasses.replace(
        c.model,
        image=dataclasses.replace(c.model.image, remat=choice.remat),
        text=dataclasses.replace(c.model.text, remat=choice.remat),
    )
    mesh = dataclasses.replace(c.mesh, replica=replica, fsdp=fsdp, tensor=tensor)
    return dataclasses.replace(c, model=model, mesh=mesh, microbatches=choice.microbatches)


def possible(c: config.Config, choice: Choice, topology: Topology) -> bool:
    """Whether a choice passes the configuration's checks."""
    try:
        config.check(configured(c, choice), topology.chips, slice_count=topology.slices, platform="tpu")
    except ConfigError:
        return False
    return True


def meshes(topology: Topology) -> Iterator[tuple[int, int, int]]:
    """Meshes of one slice worth trying: fsdp 8, 16, ..., then smaller; tensor 1, then 2 and 4."""
    powers = [2**i for i in range(topology.slice_chips.bit_length())]
    for tensor in (1, 2, 4):
        for fsdp in (*(n for n in powers if n >= 8), *(n for n in reversed(powers) if n < 8)):
            if topology.slice_chips % (fsdp * tensor) == 0:
                yield topology.slice_chips // (fsdp * tensor), fsdp, tensor


def search(c: config.Config, topology: Topology, plan: Callable[[config.Config], Plan | None]) -> list[Plan]:
    """Try choices, each once and promising ones first.

    Configured microbatches come first, with the image tower's policy, so that the result is no worse than the recipe;
    they are also tried later. Less recomputation is faster but needs more memory, so the first policy that fits, from
    least to most recomputation, is the fastest of a mesh without microbatches. If none fits, increasing numbers of
    microbatches are tried with most recomputation. Then other meshes are tried with the best choice so far, and finally
    lighter policies with microbatches on the best mesh.

    Args:
      c: Configuration; settings that are not searched keep their values.
      topology: Chips to compile for.
      plan: Compiles one configuration; returns None when the budget is used up.

    Returns:
      All plans in the order tried.
    """
    tried: dict[Choice, Plan] = {}
    exhausted = False

    def attempt(choice: Choice) -> Plan | None:
        nonlocal exhausted
        if exhausted or not possible(c, choice, topology):
            return None
        if choice not in tried:
            result = plan(configured(c, choice))
            if result is None:
                exhausted = True
                return None
            tried[choice] = result
        return tried[choice]

    def best() -> Choice | None:
        fitting = {choice: p.step_seconds or 0.0 for choice, p in tried.items() if p.fits}
        return min(fitting, key=fitting.__getitem__) if fitting else None

    shape = config.mesh_shape(c.mesh, topology.chips, slice_count=topology.slices, platform="tpu")
    dcn = config.dcn_shape(c.mesh, topology.slices)
    inside = (shape[0] // dcn[0], shape[1] // dcn[1], shape[2] // dcn[2])
    policies = list(config.REMAT)
    parts = sorted({n for n in (*(2**i for i in range(1, 9)), c.microbatches) if 1 < n <= c.batch_size})

    if c.microbatches > 1:
        attempt(Choice(inside, c.microbatches, c.model.image.remat))
    for remat in policies:
        if (p := attempt(Choice(inside, 1, remat))) and p.fits:
            break
    if best() is None:
        for n in parts:
            if (p := attempt(Choice(inside, n, policies[-1]))) and p.fits:
                break
    start = best()
    for mesh in meshes(topology):
        at = start or Choice(inside, 1, policies[-1])
        attempt(at._replace(mesh=mesh))
    if result := best():
        for n in dict.fromkeys((*parts[:2], *(n for n in parts if n == c.microbatches))):
            for remat in policies[: policies.index(result.remat)]:
                attempt(result._replace(microbatches=n, remat=remat))
    return list(tried.values())
