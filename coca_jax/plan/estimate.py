"""From a measured program to a plan: does it fit, how long will it take, what does it cost. Times are estimates.

A chip computes one operation after the other, a product or something else, while memory is read ahead and collectives
run in the background:

    max(products + traffic of the rest / bandwidth, all traffic / bandwidth, overlapped collectives / links)
        + collectives that the program waits for / links

with products = max(executed FLOPs / (efficiency x peak), what the compiler expects of them): for each operation what
limits it, after the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785). Left out: latency, the time of
kernels beyond their products, contention on the links, the network between slices, input, evaluation, checkpoints,
restarts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from coca_jax import config
from coca_jax.model import flops
from coca_jax.plan.compiled import GIB, Measured
from coca_jax.plan.topology import Topology

# Share of the peak that large matrix products reach. 8192^3 in bfloat16 on an H100: 798 of 989 TFLOP/s, 0.81. Not
# measured on a TPU; MaxText publishes an MFU of up to 0.71 for whole steps of large language models on v5p.
EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Plan:
    """One configuration on one topology.

    Attributes:
      c, topology, measured: what was compiled for what, and what was found.
      efficiency: share of the chip's peak that matrix products are taken to reach.
    """

    c: config.Config
    topology: Topology
    measured: Measured
    efficiency: float = EFFICIENCY

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of (replica, fsdp, tensor)."""
        slices = self.topology.slices
        return config.mesh_shape(self.c.mesh, self.topology.chips, slice_count=slices, platform="tpu")

    @property
    def mesh_of_a_slice(self) -> tuple[int, int, int]:
        """The same inside one slice: what the keys config.mesh.replica, fsdp and tensor stand for."""
        replica, fsdp, tensor = config.dcn_shape(self.c.mesh, self.topology.slices)
        return self.mesh[0] // replica, self.mesh[1] // fsdp, self.mesh[2] // tensor

    @property
    def fits(self) -> bool:
        """The program compiled, and takes no more than the chip has."""
        return not self.measured.error and self.measured.needed <= self.topology.chip.usable_gib * GIB

    @property
    def hbm_gib(self) -> float | None:
        """GiB a chip, also where it is too much; None where not even that is known."""
        return self.measured.needed / GIB or None

    @property
    def missing_gib(self) -> float:
        """GiB that a chip lacks; 0 where it fits or nothing is known."""
        return max(0.0, (self.hbm_gib or 0.0) - self.topology.chip.usable_gib)

    @property
    def model_flops(self) -> float:
        """Of a step, over all chips, without recomputation."""
        return flops.of_step(self.c)

    @property
    def seconds(self) -> dict[str, float]:
        """Of one step, by what takes them: products, the rest's memory, all memory, links beside, links waited for."""
        chip, m = self.topology.chip, self.measured
        peak = chip.peak_tflops * 1e12
        overlapped = sum(m.collectives.values()) - m.exposed
        return {
            "products": max(m.executed_flops / (peak * self.efficiency), m.product_cycles * chip.cycle_flops / peak),
            "memory_apart": m.hbm_apart / (chip.hbm_gbs * 1e9),
            "memory": m.hbm / (chip.hbm_gbs * 1e9),
            "interconnect_overlapped": overlapped / (chip.interconnect_gbs * 1e9),
            "interconnect_exposed": m.exposed / (chip.interconnect_gbs * 1e9),
        }

    @property
    def step_seconds(self) -> float | None:
        """The estimate; None where there is no program."""
        if self.measured.error:
            return None
        products, apart, *overlapping, exposed = self.seconds.values()
        return max(products + apart, *overlapping) + exposed

    @property
    def mfu(self) -> float | None:
        """Model FLOPs by what the chips could do in the estimated time."""
        step = self.step_seconds
        peak = self.topology.chips * self.topology.chip.peak_tflops * 1e12
        return None if step is None else self.model_flops / (step * peak)

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        step = self.step_seconds
        return None if step is None else step * self.c.steps / 3600

    def advice(self) -> list[str]:
        """What would make it smaller, most likely first; flags as they are written."""
        c, m = self.c, self.measured
        found = []
        policies = list(config.REMAT)
        for key in ("model.image.remat", "model.text.remat"):
            at = policies.index(config.get(c, key))
            found += [f"--config.{key}={policies[-1]}"] if at < len(policies) - 1 else []
        shards = self.mesh[0] * self.mesh[1]
        # As if all of it grew with the batch: as many as would fit then, or as the batch allows.
        wanted = c.microbatches * max(2.0, m.needed / (self.topology.chip.usable_gib * GIB))
        parts = [n for i in range(1, 20) if not c.batch_size % ((n := c.microbatches * 2**i) * shards)]
        found += [f"--config.microbatches={min((n for n in parts if n >= wanted), default=parts[-1])}"] if parts else []
        state = sum(m.memory.get(kind, 0.0) for kind in ("parameters", "optimizer", "moving average"))
        replica, fsdp, _ = self.mesh_of_a_slice
        if replica > 1 and (not m.memory or state > 0.2 * m.needed):
            n = next(n for n in range(2, replica + 1) if not replica % n)  # half of the copies, if that can be
            found.append(f"--config.mesh.replica={replica // n} --config.mesh.fsdp={n * fsdp}")
        if c.optimizer.state_dtype != "bfloat16":
            found.append("--config.optimizer.state_dtype=bfloat16")
        if c.optimizer.name != "adafactor" and c.optimizer.second_moment_dtype != "bfloat16":
            found.append("--config.optimizer.second_moment_dtype=bfloat16")
        return [*found, "more chips, or a smaller --config.batch_size"]

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values; what is not known is None."""
        m, (replica, fsdp, tensor) = self.measured, self.mesh
        hours = self.hours
        return {
            "fits": self.fits,
            "error": m.error or None,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": {"replica": replica, "fsdp": fsdp, "tensor": tensor},
            "microbatches": self.c.microbatches,
            "remat": {"image": self.c.model.image.remat, "text": self.c.model.text.remat},
            "batch_size": self.c.batch_size,
            "steps": self.c.steps,
            "hbm_gib_per_chip": self.hbm_gib,
            "hbm_limit_gib": self.topology.chip.usable_gib,
            "hbm_missing_gib": self.missing_gib,
            "hbm_gib_by_kind": {kind: size / GIB for kind, size in m.memory.items()},
            "model_flops_per_step": self.model_flops,
            "executed_flops_per_step": m.executed_flops * self.topology.chips or None,
            "uncounted": list(m.uncounted),
            "collective_bytes_per_chip": m.collectives,
            "collective_bytes_exposed_per_chip": m.exposed,
            "hbm_bytes_per_chip": m.hbm,
            "hbm_bytes_apart_per_chip": m.hbm_apart,
            "product_cycles_per_chip": m.product_cycles,
            "loops_of_unknown_length": m.unknown_loops,
            "estimate": {"efficiency": self.efficiency, "seconds": None if m.error else self.seconds},
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "hours": hours,
            "chip_hours": None if hours is None else hours * self.topology.chips,
            "compile_seconds": m.compile_seconds,
        }
