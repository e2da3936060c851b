"""What XLA is told before JAX starts: compiler flags for each platform, where compiled programs are kept, and what
becomes of the memory that a step on CPUs frees.

`setup` does it, once, before JAX is imported. The tables `TPU` and `GPU` are the one place for flags;
docs/launch.md says how to change or leave them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import platform
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from coca_jax import cache

SWITCH = "COCA_JAX_COMPILER_FLAGS"  # "off" leaves the flags below out
CACHE_DIR = "JAX_COMPILATION_CACHE_DIR"  # JAX's own variable


@dataclasses.dataclass(frozen=True)
class Flag:
    """A compiler flag, why it is set, and who recommends it."""

    name: str
    value: str
    reason: str
    source: str


_MAXTEXT = "MaxText, benchmarks/xla_flags_library.py"
_JAX_DOCS = "JAX documentation, XLA compiler flags"
_NVIDIA = "NVIDIA JAX-Toolbox, Tips for High-Performance LLMs with JAX and XLA"

# All of them are known to libtpu 0.0.42 and 0.0.50, which jax[tpu] 0.10.2 and 0.12.0 install, and to 0.0.52. libtpu
# ends the process at a flag that it does not know. Both sources also set
# xla_tpu_enable_async_collective_fusion_fuse_all_gather, with which libtpu 0.0.52 compiles for v5e alone.
TPU = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "Starts collectives early and waits for them late, with computation in between. On by default: pinned.",
        "libtpu 0.0.42 to 0.0.52 know it",
    ),
    Flag(
        "xla_enable_async_all_gather",
        "true",
        "All-gathers run in the background: fsdp gathers the next layer's parameters while this one computes.",
        f"{_MAXTEXT} (CF_FOR_ALL_GATHER); {_JAX_DOCS}",
    ),
    Flag(
        "xla_enable_async_collective_permute",
        "true",
        "So do the steps of a ring, as in the contrastive losses that pass features from device to device.",
        _JAX_DOCS,
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "Fuses a collective in the background with the computation beside it. On by default on most chips: pinned.",
        f"{_MAXTEXT} (CF_FOR_ALL_GATHER); {_JAX_DOCS}",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "One collective may stretch over several computations: a layer's parameters are large.",
        f"{_MAXTEXT} (CF_FOR_ALL_GATHER); {_JAX_DOCS}",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "Communication and computation share a TensorCore, where a chip has no second one.",
        f"{_MAXTEXT} (CF_FOR_ALL_GATHER); {_JAX_DOCS}",
    ),
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "Several slices: the gradients' all-reduce over the data-centre network overlaps with the backward pass.",
        f"{_MAXTEXT} (DATA_PARALLEL_OVERLAP); {_JAX_DOCS}",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "Several slices: also where the gradients of scanned layers differ in size. May take more memory.",
        f"{_MAXTEXT} (DATA_PARALLEL_OVERLAP); {_JAX_DOCS}",
    ),
)

# All of them are known to jaxlib 0.10.2 and 0.12.0, which end the process at a flag that they do not know. Nothing here
# was measured on several GPUs, hence left out: combine thresholds (they depend on the model),
# while_loop_double_buffering (loops take more memory), triton_gemm=false (the autotuner tries Triton's and cuBLAS's
# kernels for each product).
GPU = (
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "Starts collectives early and waits for them late, with computation in between.",
        f"{_NVIDIA} (and set in its images); {_JAX_DOCS}",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        "In a loop over layers, the all-gather of the next layer's parameters starts a turn early.",
        f"{_NVIDIA}; {_JAX_DOCS}",
    ),
    Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        "In the same loop backwards, the reduce-scatter of a layer's gradients ends a turn late.",
        f"{_NVIDIA}; {_JAX_DOCS}",
    ),
    Flag(
        "xla_gpu_enable_pipelined_all_reduce",
        "true",
        "The same for replicas' all-reduce.",
        f"{_NVIDIA}; {_JAX_DOCS}",
    ),
)

# Platform -> the environment variable that carries its flags, and the flags.
PLATFORMS = {"tpu": ("LIBTPU_INIT_ARGS", TPU), "gpu": ("XLA_FLAGS", GPU)}


def setup(platforms: Sequence[str] | None = None) -> None:
    """Sets the compiler flags and the cache of compiled programs, in the environment of this process; `keep_memory`.

    To be called before JAX is imported; afterwards it has no effect. What the user has set is never changed: a flag
    that is in the platform's variable already, and `JAX_COMPILATION_CACHE_DIR`, empty (no cache) or not.

    Args:
      platforms: of `PLATFORMS`; None: those that `found_platforms` finds.
    """
    if os.environ.get(SWITCH, "").lower() not in ("off", "0", "false", "no"):
        for name in found_platforms() if platforms is None else platforms:
            set_flags(*PLATFORMS[name])
    set_cache()
    keep_memory()


def found_platforms() -> tuple[str, ...]:
    """The keys of `PLATFORMS` that JAX may start here.

    `JAX_PLATFORMS` decides where it is set; otherwise what is installed: libtpu, or one of JAX's plugins for CUDA.
    """
    asked = {name.strip().lower() for name in os.environ.get("JAX_PLATFORMS", "").split(",")} - {""}
    if asked:
        return tuple(name for name, names in (("tpu", {"tpu"}), ("gpu", {"gpu", "cuda", "rocm"})) if names & asked)
    installed = {
        "tpu": ("libtpu",),
        "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    }
    return tuple(
        name for name, modules in installed.items() if any(importlib.util.find_spec(module) for module in modules)
    )


def set_flags(variable: str, flags: Sequence[Flag]) -> None:
    """Appends flags to an environment variable, but for those that are in it already.

    Does nothing where `XLA_FLAGS` names a file of flags, as XLA reads it when it starts with anything but a dash.
    """
    present = os.environ.get(variable, "").split()
    if variable == "XLA_FLAGS" and present and not present[0].startswith("-"):
        return
    names = {flag.lstrip("-").partition("=")[0] for flag in present}
    added = [f"--{flag.name}={flag.value}" for flag in flags if flag.name not in names]
    os.environ[variable] = " ".join([*present, *added])


# ---------------------------------------------------------------------------------------------------------------------
# Memory of CPUs

KEEP_MEMORY = "COCA_JAX_KEEP_MEMORY"  # "on": see below
# Of glibc's mallopt: one arena for all threads, no block mapped by itself, nothing handed back. XLA computes in threads
# whose own arenas cannot hold more than 64 MB, and whose larger blocks are therefore mapped and unmapped each time.
_MALLOPT = ((-8, 1), (-4, 0), (-1, -1))  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_memory() -> bool:
    """Keeps, where the user asks for it, what a step on CPUs frees for the next one, which the system has otherwise.

    XLA for CPUs takes the memory of a program anew at every call, and the system clears it page by page: 0.5 of the
    6.4 s of a step with 2.6 GB of it, and more where the system has to find the pages first (docs/log.md). Not the
    default: the process never gives anything back, and as long as the block that a program left is a few bytes too
    small for its next call, it takes another (up to five were seen).

    To be called before JAX is imported. Without glibc it does nothing but say so.

    Returns:
      Whether it is kept.
    """
    if os.environ.get(KEEP_MEMORY, "").lower() not in ("on", "1", "true", "yes"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    kept = mallopt is not None and all(mallopt(option, value) == 1 for option, value in _MALLOPT)
    if not kept:
        print(f"{KEEP_MEMORY} has no effect: it needs Linux with glibc's malloc", file=sys.stderr)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Compiled programs


def set_cache() -> None:
    """Keeps compiled programs (that took longer than a second) for the next start, one folder a kind of processor.

    JAX looks at the chip, the program, the flags and its own version, but not at the kind of processor, and programs
    for the CPU that were compiled on one kind may not run on another.
    """
    if CACHE_DIR in os.environ:
        return
    if "://" in (bucket := os.environ.get("COCA_JAX_CACHE", "")):  # its objects appear whole or not at all
        os.environ[CACHE_DIR] = f"{bucket.rstrip('/')}/xla/{processor()}"
        return
    folder = cache.folder() / "xla" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drop_damaged(folder)
    except OSError as error:
        reason = f"compiled programs are not kept: {error}"
        print(f"{reason}; set {CACHE_DIR} to a folder that can be written", file=sys.stderr)
        return
    os.environ[CACHE_DIR] = str(folder)


def processor() -> str:
    """12 hexadecimal digits that tell processors apart that cannot run each other's programs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.processor(), *kinds]).encode()).hexdigest()[:12]


def drop_damaged(folder: Path) -> None:
    """Removes entries that were left half-written.

    JAX 0.10 to 0.12 write an entry straight to its place. A process that is killed meanwhile leaves a part of it, which
    JAX then finds at every start, warns of, and never replaces. An entry is looked at once, when it is new. To remove
    one that another process is writing at this moment costs that process's entry and nothing else.
    """
    stamp = folder / ".checked"
    seen = stamp.stat().st_mtime if stamp.exists() else 0.0
    # The folder's own clock, before the first look: what is written from now on is looked at next time.
    new_stamp = folder / f".checked-{os.getpid()}"
    new_stamp.touch()
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process drops it too
            if entry.stat().st_mtime >= seen and not _whole(entry):
                entry.unlink()
    new_stamp.replace(stamp)


def _whole(entry: Path) -> bool:
    """Whether a compressed file ends where its stream does. Only zlib's format is looked into, which JAX writes where
    no zstandard is installed; a Zstandard file is taken for whole."""
    stream = zlib.decompressobj()
    with entry.open("rb") as file:
        start = file.read(4)
        if start == b"\x28\xb5\x2f\xfd":  # a Zstandard frame
            return True
        try:
            stream.decompress(start)
            while block := file.read(1 << 20):
                stream.decompress(block)
        except zlib.error:
            return False
    return stream.eof
