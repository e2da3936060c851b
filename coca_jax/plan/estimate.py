"""From a measured program to a plan: whether it fits, its time and its cost. Times are estimates.

A chip runs one operation at a time, a matrix product or another, while memory prefetches and collectives run in the
background:

    max(products + traffic of the rest / bandwidth, all traffic / bandwidth, overlapped collectives / links)
        + collectives that the program waits for / links

with products = max(executed FLOPs / (efficiency x peak), the compiler's expectation). Each operation takes what limits
it, after the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785). Not included: latency, kernel time
beyond their products, contention on the links, the network between slices, input, evaluation, checkpoints, restarts.
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
      c, topology, measured: Configuration, the chips it was compiled for, and measurements of the program.
      efficiency: Assumed share of the chip's peak that matrix products reach.
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
    def slice_mesh(self) -> tuple[int, int, int]:
        """Mesh sizes within one slice, as set by the keys config.mesh.replica, fsdp and tensor."""
        replica, fsdp, tensor = config.dcn_shape(self.c.mesh, self.topology.slices)
        return self.mesh[0] // replica, self.mesh[1] // fsdp, self.mesh[2] // tensor

    @property
    def fits(self) -> bool:
        """Whether the program compiled and fits in the chip's memory."""
        return not self.measured.error and self.measured.needed <= self.topology.chip.usable_gib * GIB

    @property
    def hbm_gib(self) -> float | None:
        """GiB needed per chip, also if it is too much; None if unknown."""
        return self.measured.needed / GIB or None

    @property
    def missing_gib(self) -> float:
        """GiB that a chip lacks; 0 if the plan fits or nothing is known."""
        return max(0.0, (self.hbm_gib or 0.0) - self.topology.chip.usable_gib)

    @property
    def model_flops(self) -> float:
        """Model FLOPs per step over all chips, without recomputation."""
        return flops.train_step_flops(self.c)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step of products, other operations' memory, all memory, overlapped and exposed collectives."""
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
        """Estimated seconds per step; None if there is no program."""
        if self.measured.error:
            return None
        products, apart, *overlapping, exposed = self.seconds.values()
        return max(products + apart, *overlapping) + exposed

    @property
    def mfu(self) -> float | None:
        """Model FLOPs as a share of the chips' peak in the estimated time."""
        step = self.step_seconds
        peak = self.topology.chips * self.topology.chip.peak_tflops * 1e12
        return None if step is None else self.model_flops / (step * peak)

    @property
    def hours(self) -> float | None:
        """Estimated hours of the whole run."""
        step = self.step_seconds
        return None if step is None else step * self.c.steps / 3600

    def advice(self) -> list[str]:
        """Changes that would reduce memory, most effective first, written as flags."""
        c, m = self.c, self.measured
        found = []
        policies = list(config.REMAT)
        for key in ("model.image.remat", "model.text.remat"):
            at = policies.index(config.get(c, key))
            found += [f"--config.{key}={policies[-1]}"] if at < len(policies) - 1 else []
        shards = self.mesh[0] * self.mesh[1]
        # Assume that all memory grows with the batch; take as many as would then fit, or as the batch allows.
        wanted = c.microbatches * max(2.0, m.needed / (self.topology.chip.usable_gib * GIB))
        parts = [n for i in range(1, 20) if not c.batch_size % ((n := c.microbatches * 2**i) * shards)]
        found += [f"--config.microbatches={min((n for n in parts if n >= wanted), default=parts[-1])}"] if parts else []
        state = sum(m.memory.get(kind, 0.0) for kind in ("parameters", "optimizer", "moving average"))
        replica, fsdp, _ = self.slice_mesh
        if replica > 1 and (not m.memory or state > 0.2 * m.needed):
            n = next(n for n in range(2, replica + 1) if not replica % n)  # half of the copies, if possible
            found.append(f"--config.mesh.replica={replica // n} --config.mesh.fsdp={n * fsdp}")
        if c.optimizer.state_dtype != "bfloat16":
            found.append("--config.optimizer.state_dtype=bfloat16")
        if c.optimizer.name != "adafactor" and c.optimizer.second_moment_dtype != "bfloat16":
            found.append("--config.optimizer.second_moment_dtype=bfloat16")
        return [*found, "more chips, or a smaller --config.batch_size"]

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values; unknown ones are None."""
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
