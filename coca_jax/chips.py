"""Published performance figures of accelerators: one table for the planner and for throughput metrics.

Peaks are dense bfloat16 products; where a vendor prints the figure with sparsity, half of it. 1 TFLOP is 10^12
operations, with a multiply-add as two; GB is 10^9 bytes, GiB 2^30.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. The two cores of a TPU v4 or v5p chip work as one device.

    Attributes:
      name: Name as in TPU topologies, or the usual one.
      device_kinds: Regular expressions for `jax.Device.device_kind`, matched from the start.
      peak_tflops: Dense bfloat16 TFLOP/s.
      hbm_gib: Device memory in GiB.
      usable_gib: GiB that a program may use: the compiler's limit on a TPU; on a GPU, the share that JAX preallocates
        by default (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75).
      hbm_gbs: Memory bandwidth in GB/s.
      interconnect_gbs: GB/s that a chip can send to its neighbors while receiving as much, over all its links.
      dimensions: Dimensions of the torus of a TPU slice; 0: not a TPU.
      source: The vendor's page.
      checked: Whether the figures were read on that page; a comment names those that were not.
      cycle_flops: Operations per clock cycle at the peak, for a TPU whose compiler reports cycles.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_tflops: float
    hbm_gib: float
    usable_gib: float
    hbm_gbs: float
    interconnect_gbs: float
    dimensions: int
    source: str
    checked: bool
    cycle_flops: int = 0


# Google's pages were read in 2026. `usable_gib` is from libtpu 0.0.52's error message for a program that is too large.
# `cycle_flops` assumes matrix units of 128 or 256 squared with two operations per cell; libtpu assumes 70 to 97% of
# that for products of 4096 and 8192 cubed.
CHIPS: tuple[Chip, ...] = (
    # The page has no link bandwidth: 6 links of 50 GB/s are from Jouppi et al. 2023 (arXiv 2304.01433), not read again.
    Chip("v4", (r"TPU v4$",), 275, 32, 30.75, 1200, 300, 3, "https://docs.cloud.google.com/tpu/docs/v4", True, 2**18),
    # The pages give link bandwidth in both directions together (400, 1200 and 800 GB/s); one way is half.
    Chip(
        "v5e",
        (r"TPU v5 ?lite$", r"TPU v5e$"),
        197,
        16,
        15.75,
        819,
        200,
        2,
        "https://docs.cloud.google.com/tpu/docs/v5e",
        True,
        2**17,
    ),
    Chip(
        "v5p",
        (r"TPU v5$", r"TPU v5p$"),
        459,
        95,
        95.73,
        2765,
        600,
        3,
        "https://docs.cloud.google.com/tpu/docs/v5p",
        True,
        2**18,
    ),
    Chip(
        "v6e",
        (r"TPU v6 ?lite$", r"TPU v6e$"),
        918,
        32,
        31.24,
        1638,
        400,
        2,
        "https://docs.cloud.google.com/tpu/docs/v6e",
        True,
        2**19,
    ),
    # NVIDIA's pages could not be read: these figures are from resellers and MLPerf submissions.
    Chip(
        "a100-80",
        (r"NVIDIA A100.*80GB",),
        312,
        80,
        60,
        2039,
        300,
        0,
        "https://www.nvidia.com/en-us/data-center/a100/",
        False,
    ),
    Chip(
        "h100",
        (r"NVIDIA H100 80GB HBM3",),
        989,
        80,
        60,
        3350,
        450,
        0,
        "https://www.nvidia.com/en-us/data-center/h100/",
        False,
    ),
    Chip(
        "h200",
        (r"NVIDIA H200",),
        989,
        141,
        105.75,
        4800,
        450,
        0,
        "https://www.nvidia.com/en-us/data-center/h200/",
        False,
    ),
)


def from_device_kind(kind: str) -> Chip | None:
    """Chip of a `jax.Device.device_kind`; None if it is not in the table (a CPU, another GPU)."""
    return next((chip for chip in CHIPS if any(re.match(pattern, kind) for pattern in chip.device_kinds)), None)


def tpu(name: str) -> Chip | None:
    """TPU with a name such as `v5e`, or None."""
    return next((chip for chip in CHIPS if chip.name == name and chip.dimensions), None)
