"""The processes of one job: how they are started together, how they talk, and how one leaves that has failed.

docs/many_hosts.md says how to start a job on each kind of cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from coca_jax import peers
from coca_jax.peers import EXIT_LOST

FLAGS = ("--coordinator", "--num_processes", "--process_id")
TIMEOUT = 300.0  # seconds in which all processes must have come together
HEARTBEAT = 100  # seconds of silence after which a process counts as lost: JAX's own default
MARGIN = 20  # seconds that JAX waits longer than `peers`: it ends a process less gently, and names nobody
_VERDICT = 0.5  # seconds within which a process that has ended is known to have
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TORCHRUN = ("MASTER_ADDR", "WORLD_SIZE", "RANK")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX finds its way by


class DistributedError(RuntimeError):
    """The processes do not come together. The message names the flag or variable, its value and the fix."""


class Absent(DistributedError):
    """Another process is not there, or is of a job that ends: nothing is to be mended, all are to be started again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What this process was told of its job.

    Attributes:
      coordinator: host and port at which process 0 waits for the others.
      count: processes.
      index: of this one.
      source: the flag or variable that named the coordinator.
      local_devices: numbers of the accelerators of this host that are this process's; None: all.
    """

    coordinator: str
    count: int
    index: int
    source: str
    local_devices: list[int] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def initialize(flags: Mapping[str, str] | None = None, timeout: float = TIMEOUT, heartbeat: int = HEARTBEAT) -> None:
    """Starts JAX as one process of several, where the flags or the environment say that it is one; else does nothing.

    The first of these that is there is taken: the flags; `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; `MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE` and `RANK` (torchrun and its like); Slurm; Open MPI;
    the hosts of a TPU slice, or of several. The last three are found by JAX itself.

    Args:
      flags: values by the names in FLAGS; an empty value is a flag that was not given.
      timeout: seconds to wait for the other processes. The process ends, saying so, when they have passed.
      heartbeat: seconds of silence after which a process counts as lost and the others end, naming it.

    Raises:
      DistributedError: what was given is incomplete or wrong.
      Absent: the coordinator does not answer, or another process was lost meanwhile.
    """
    deadline = time.monotonic() + timeout
    flags = flags or {}
    cluster = "" if any(flags.values()) else _cluster(os.environ)
    job = find_job(flags, os.environ, bool(cluster))
    if job is None and not cluster:
        return
    who = f"process {job.index} of {job.count}" if job else "this process"
    where = f"{job.source}={job.coordinator}" if job else f"the coordinator that {cluster} names"
    late = (
        f"error: {who} has waited {timeout:g} s for the others at {where}: see whether all of them were started, each "
        "with its own number and with the same count, and what they say"
    )
    if job and job.index:
        _wait_for_coordinator(job, deadline, timeout)
    elif job:
        _check_port(job)
    peers.end_instead_of_abort(who)
    with _ending_at(deadline, late):
        try:
            # Later than our own end: JAX's is an abort with a stack trace.
            later = int(timeout) + 60
            if job:
                jax.distributed.initialize(
                    job.coordinator,
                    job.count,
                    job.index,
                    job.local_devices,
                    initialization_timeout=later,
                    heartbeat_timeout_seconds=heartbeat + MARGIN,
                )
            else:
                jax.distributed.initialize(initialization_timeout=later, heartbeat_timeout_seconds=heartbeat + MARGIN)
        except Exception as error:  # of many kinds: sockets, metadata servers, JAX
            how = where if job else f"{cluster} was found, but JAX could not start from it"
            raise (Absent if _LOST.search(str(error)) else DistributedError)(
                f"{how}: {' '.join(str(error).split())}; to say it yourself: {', '.join(f'{f}=...' for f in FLAGS)}"
            ) from error
        jax.device_count()  # the devices of all are told to all
        _watch_peers(job, heartbeat)
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if not is_first():
        logging.set_verbosity(logging.WARNING)  # what goes well is told by one


def find_job(flags: Mapping[str, str], environment: Mapping[str, str], in_cluster: bool = False) -> Job | None:
    """What the flags or the environment say; None where they speak of one process, or leave it to a cluster to say.

    Raises:
      DistributedError: half of what is needed is missing, a number is none or out of range, an address has no port.
    """
    for names, values in ((FLAGS, flags), (_JAX, environment), (_TORCHRUN, environment)):
        address, count, index = (values.get(name, "") for name in names)
        if not (address or count or index):
            continue
        if in_cluster and values is not flags and not count and not index:
            continue  # an address alone, which scripts leave behind: the cluster knows the rest
        if count and _number(names[1], count, 1) == 1:
            return None
        missing = [name for name in names if not values.get(name)]
        if missing:
            given = ", ".join(f"{name}={values[name]}" for name in names if values.get(name))
            raise DistributedError(
                f"{given} but no {' and no '.join(missing)}: give all of {', '.join(names)}, or none for one process"
            )
        processes = _number(names[1], count, 1)
        process = _number(names[2], index, 0)
        if process >= processes:
            raise DistributedError(
                f"{names[2]}={index} is out of range for {names[1]}={count}: the processes are 0 .. {processes - 1}"
            )
        local = None
        if names is _TORCHRUN:
            address = _torchrun_address(address, values)
            if _number("LOCAL_WORLD_SIZE", values.get("LOCAL_WORLD_SIZE", "1"), 1) > 1:
                local = [_number("LOCAL_RANK", values.get("LOCAL_RANK", ""), 0)]
        elif names is _JAX and ":" not in address and values.get("JAX_COORDINATOR_PORT"):
            address = f"{address}:{values['JAX_COORDINATOR_PORT']}"
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise DistributedError(f"{names[0]}={address}: write it host:port, e.g. {names[0]}={host or 'node0'}:1234")
        return Job(address, processes, process, names[0], local)
    return None


def _torchrun_address(host: str, environment: Mapping[str, str]) -> str:
    port = environment.get("MASTER_PORT", "")
    if not port:
        raise DistributedError(f"MASTER_ADDR={host} but no MASTER_PORT: set it to a free port of that host, e.g. 29500")
    number = _number("MASTER_PORT", port, 1)
    # torchrun itself listens at MASTER_PORT while its processes run.
    return f"{host}:{number + (environment.get('TORCHELASTIC_USE_AGENT_STORE') == 'True')}"


def _number(name: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise DistributedError(f"{name}={value!r} is not a number of {least} or more: set {name} to one, e.g. {least}")
    return int(value)


def _cluster(environment: Mapping[str, str]) -> str:
    """What kind of cluster, of several processes, JAX will find; empty: none."""
    if _number("SLURM_NTASKS", environment.get("SLURM_NTASKS", "1"), 1) > 1:
        missing = [name for name in _SLURM if name not in environment]
        if missing and not any(environment.get(names[1]) for names in (_JAX, _TORCHRUN)):
            raise DistributedError(
                f"SLURM_NTASKS={environment['SLURM_NTASKS']}, but this process is none of its tasks ({missing[0]} is "
                "not set): start it with srun, as in `srun python -m coca_jax.main ...`, or set SLURM_NTASKS=1 for one "
                "process"
            )
        return "" if missing else "Slurm"
    if _number("OMPI_COMM_WORLD_SIZE", environment.get("OMPI_COMM_WORLD_SIZE", "1"), 1) > 1:
        return "Open MPI"
    platforms = getattr(jax.config, "jax_platforms", None)  # a name that type checkers do not know
    if platforms and "tpu" not in platforms:
        return ""  # a TPU host that is told to compute on its processor
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "TPU multislice"
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "TPU slice" if "," in hosts else ""
    # JAX sets the first where it sees TPU chips, and the second where there are none. On Compute Engine the metadata
    # server, which JAX asks, knows the other hosts.
    alone = environment.get("TPU_ML_PLATFORM") != "JAX" or "TPU_SKIP_MDS_QUERY" in environment
    return "" if alone else "TPU slice"


def _wait_for_coordinator(job: Job, deadline: float, timeout: float) -> None:
    host, _, port = job.coordinator.rpartition(":")
    reason = ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:  # not yet up, or not yet known by name
            reason = error.strerror or str(error)
        time.sleep(min(0.5, timeout / 10))
    raise Absent(
        f"{job.source}={job.coordinator} did not answer process {job.index} within {timeout:g} s ({reason}): see that "
        "process 0 runs on that host, and that the port is open between the hosts"
    )


def _check_port(job: Job) -> None:
    """JAX would wait for ever at a port that another program answers."""
    port = int(job.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise DistributedError(
            f"{job.source}={job.coordinator}: process 0 cannot listen at port {port} ({error.strerror}): choose a free "
            "port, the same for all processes"
        ) from error


_watcher: peers.Peers | None = None


def _watch_peers(job: Job | None, heartbeat: int) -> None:
    """Watches the other processes, where they can be reached; else that is JAX's alone."""
    global _watcher
    index, problem = jax.process_index(), ""
    if jax.process_count() == 1:
        return
    hosts = gather(socket.gethostname())
    try:
        _watcher = None if index else peers.Peers(0, hosts, heartbeat)
        address = gather(_watcher.address if _watcher else None)[0]
        if index:
            names = [job.coordinator.rpartition(":")[0].strip("[]")] if job else []
            _watcher = peers.Peers(index, hosts, heartbeat, [*address[:2], *names, *address[2:]])
    except OSError as error:
        problem = str(error)
    if problem:
        logging.warning(
            "process %d has no connection to process 0 beside JAX's (%s): JAX alone finds out when a process is lost, "
            "after %d s",
            *(index, problem, heartbeat + MARGIN),
        )


@contextlib.contextmanager
def _ending_at(deadline: float, message: str) -> Iterator[None]:
    """Ends the process, with the message and EXIT_LOST, if it is in the block then: JAX can only be left so."""

    def end() -> None:
        _say(message)
        os._exit(EXIT_LOST)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Talking, and leaving


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, by their index. All must call it, as often and in the same order.

    Args:
      value: what JSON can hold. With several processes tuples come back as lists.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # Few lengths, so that few programs are compiled for them.
    row = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    row[: len(data)] = data
    rows = multihost_utils.process_allgather(row)
    return [json.loads(one[:size].tobytes()) for one, size in zip(rows, sizes, strict=True)]


def check_same(values: Mapping[str, Any]) -> None:
    """Raises DistributedError where a process has another value than process 0: they would wait for one another."""
    everyone = gather(dict(values))
    for index, theirs in enumerate(everyone):
        for name in sorted({*everyone[0], *theirs}):
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise DistributedError(
                    f"{name} is {other!r} in process {index} and {first!r} in process 0: start all processes with the "
                    "same program, configuration and data"
                )


def leave(message: str, status: int = 1, patience: float = 10.0) -> str:
    """Prints the message and ends this process, one of several; where it is alone, returns the message.

    If the others fail alike, all end in peace. If they do not, they wait for this one in some computation: it leaves
    without them, and they end with its message as the cause.

    Args:
      message: what has gone wrong here.
      status: what the process exits with.
      patience: seconds to wait for the others.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return message
    time.sleep(_VERDICT)  # an error that is another process's end, which is noticed within this
    if _watcher:
        _watcher.leave(message.strip().splitlines()[-1])
    _say(f"process {jax.process_index()} of {jax.process_count()}: {message}")
    ending = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    ending.start()
    ending.join(patience)
    os._exit(status)


# What a computation says that another process has left: Gloo (CPU), NCCL (GPU), gRPC, TPU's network between slices.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket closed|unavailable|deadline.exceeded|heartbeat"
    r"|peer|coordination.?service",
    re.IGNORECASE,
)


def lost(error: BaseException) -> bool:
    """Whether an error of one process of several says that another one has left."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    # Computations raise JAX's error, and on CPUs a ValueError of Gloo's.
    computed = isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error))
    return several and computed and bool(_LOST.search(str(error)))


def wait_for_verdict(error: BaseException, heartbeat: int) -> NoReturn:
    """Ends this process, which cannot reach another one: with the name of the lost one as soon as that is known.

    Args:
      error: what a computation said.
      heartbeat: seconds after which a silent process is known to be lost; after ten more that is not waited for.
    """
    if _watcher:
        time.sleep(heartbeat + 10)
    who = f"process {jax.process_index()} of {jax.process_count()}"
    peers.end(f"{who}: another process is gone or cannot be reached ({error})")


def _say(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
