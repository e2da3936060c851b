"""What holds in every test: strict JAX on the CPU, compiled programs kept between runs, and a way to start a process.

Warnings are errors too (`filterwarnings` in pyproject.toml). A test of several devices runs in a process of its own,
because the number of devices is fixed when JAX starts: see `run_python`.
"""

from __future__ import annotations

import inspect
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Read by JAX when it is imported, here and in the processes that tests start.
STRICT = {
    "JAX_PLATFORMS": "cpu",
    # [b] + [b, d] must be written out: broadcasting by rank is how a wrong axis stays unseen.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}
os.environ |= STRICT
# For tests that start many processes: each would compile 1,500 modules of Python anew, 3 s of it, where the environment
# says that what was compiled is not to be kept. It is kept here, beside pytest's own.
BYTECODE = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(REPOSITORY / ".pytest_cache/bytecode"),
}
# Small programs run for a moment and are compiled for seconds: without the optimiser's passes, half as long.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]).strip()

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if _WORKER and hasattr(os, "sched_setaffinity"):
    # One core for each of pytest-xdist's workers, before JAX counts them: XLA's threads wait for each other at every
    # operation, so that two workers that share two cores are slower than one.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_WORKER.removeprefix("gw")) % len(_cores)]})

import jax  # noqa: E402  (after its environment)

from coca_jax import compiler  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    # Compiled programs are kept for the next run, about three times quicker to load than to compile and bit-identical.
    # Only for this process: one that a test kills would leave half-written entries, and one could read the entry that
    # another is writing. One folder for each kind of processor, which JAX does not look at. `pytest --cache-clear`
    # empties them.
    folder = config.cache.mkdir(f"jax-{compiler.processor()}-{_WORKER or 'main'}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as it is in a terminal. The tests may run under nohup, and what they start would ignore it too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process of its own, with several CPU devices; returns its CompletedProcess (output as text).

    `run_python(program, devices=8, *, env=None, cwd=REPOSITORY, timeout=300, check=True)`:

    Args:
      program: one of
        a snippet of code, indented as it likes;
        the arguments of the interpreter, e.g. `["-m", "coca_jax.main", "--config=configs/debug.py"]`;
        a function of a test's module without arguments: the module is executed in the new process and the function
        called. What it prints is the output.
      devices: CPU devices that JAX sees there.
      env: set beside the strict settings above.
      cwd: folder in which it runs.
      timeout: seconds.
      check: fail the test, showing the output, where the exit status is not 0.
    """
    return _run_python


def _run_python(
    program: str | Sequence[str | os.PathLike[str]] | Callable[[], object],
    devices: int = 8,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] = REPOSITORY,
    timeout: float = 300,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    if isinstance(program, str):
        arguments = ["-c", textwrap.dedent(program)]
    elif callable(program):
        name = getattr(program, "__qualname__", "")
        assert name.isidentifier(), f"{name!r}: only a function at the top of its module can be called elsewhere"
        call = f"import runpy; runpy.run_path({inspect.getfile(program)!r})[{name!r}]()"
        arguments = ["-c", call]
    else:
        arguments = [os.fspath(a) for a in program]
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    environment = {
        **os.environ,
        **STRICT,
        **BYTECODE,
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        # Threads that XLA's CPU devices share. By default as many as devices: collectives of a loop and of the program
        # around it may wait at the same time, and with every thread waiting for another device nothing moves any more.
        "PJRT_NPROC": str(8 * devices),
        # So that the repository is found from any cwd, its configs/ and tests/ included.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        **(env or {}),
    }
    command = [sys.executable, *arguments]
    shown = f"{' '.join(arguments)[:2000]}\n({devices} devices, in {os.fspath(cwd)})"
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"still running after {timeout} s: {shown}\n{_output(error.stdout, error.stderr)}", pytrace=False)
    if check and done.returncode:
        text = _output(done.stdout, done.stderr)
        pytest.fail(f"exit status {done.returncode} of: {shown}\n{text}", pytrace=False)
    return done


def _output(*streams: str | bytes | None) -> str:
    """The ends of standard output and standard error, each under its name."""
    parts = []
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        text = stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""
        parts.append(f"---- {name}\n{text[-6000:].rstrip() or '(nothing)'}")
    return "\n".join(parts)
