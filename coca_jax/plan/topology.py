"""TPU slices by name, such as `v4:8x16x16`, parsed without JAX."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from coca_jax import chips
from coca_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips.

    Attributes:
      name: Name of one slice, e.g. `v4:8x16x16`.
      slices: Number of slices, connected by the data center's network.
      chip: Chip type, from chips.py.
      slice_chips: Chips in one slice.
    """

    name: str
    slices: int
    chip: chips.Chip
    slice_chips: int

    @property
    def chips(self) -> int:
        return self.slices * self.slice_chips

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    def options(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc`."""
        # A v4 chip has two cores. Cloud TPU VMs merge them into one device; libtpu's description does so on request.
        megacore = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        several = {"num_slices": self.slices} if self.slices > 1 else {}
        return {"platform": "tpu", "topology_name": self.name, **megacore, **several}


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parse a topology name.

    Raises:
      ConfigError: The chip is unknown, or the sizes do not describe a slice.
    """
    known = [chip.name for chip in chips.CHIPS if chip.dimensions]
    kind, _, sizes = name.partition(":")
    chip = chips.tpu(kind)
    examples = "v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16"
    if chip is None:
        raise ConfigError(f"--topology={name}: {kind!r} is not one of {', '.join(known)}; examples: {examples}")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or sizes.count("x") + 1 != chip.dimensions:
        shape = "x".join("ABC"[: chip.dimensions])
        raise ConfigError(f"--topology={name}: write a slice of {kind} as {kind}:{shape}; examples: {examples}")
    if slices < 1:
        raise ConfigError(f"--slices={slices} must be 1 or more")
    count = math.prod(int(size) for size in sizes.split("x"))
    if not count:
        raise ConfigError(f"--topology={name} has no chips; examples: {examples}")
    return Topology(name, slices, chip, count)
