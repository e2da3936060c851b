"""Names of TPU slices, such as `v4:8x16x16`: read and checked without JAX."""

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
      name: of one slice, e.g. `v4:8x16x16`.
      slices: how many, joined by the data centre's network.
      chip: of the table in chips.py.
      slice_chips: in one slice.
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
        # A v4 chip has two cores. Cloud TPU VMs join them into one device, libtpu's description only if it is asked to.
        megacore = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        several = {"num_slices": self.slices} if self.slices > 1 else {}
        return {"platform": "tpu", "topology_name": self.name, **megacore, **several}


def read(name: str, slices: int = 1) -> Topology:
    """A topology by its name.

    Raises:
      ConfigError: there is no such chip, or the sizes are not those of a slice.
    """
    known = [chip.name for chip in chips.CHIPS if chip.dimensions]
    kind, _, sizes = name.partition(":")
    chip = chips.tpu(kind)
    examples = "v4:8x16x16, v5e:16x16, v5p:8x8x8, v6e:16x16"
    if chip is None:
        raise ConfigError(f"--topology={name}: {kind!r} is not one of {', '.join(known)}; examples: {examples}")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or sizes.count("x") + 1 != chip.dimensions:
        shape = "x".join("ABC"[: chip.dimensions])
        raise ConfigError(f"--topology={name}: a slice of {kind} is written {kind}:{shape}; examples: {examples}")
    if slices < 1:
        raise ConfigError(f"--slices={slices} must be 1 or more")
    count = math.prod(int(size) for size in sizes.split("x"))
    if not count:
        raise ConfigError(f"--topology={name} has no chips; examples: {examples}")
    return Topology(name, slices, chip, count)
