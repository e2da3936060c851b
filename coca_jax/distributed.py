"""Starting the processes of one job: by the environment, or not at all where there is one process."""

from __future__ import annotations

import os

import jax
from absl import logging


def initialize() -> None:
    """`jax.distributed.initialize` where the environment says that this is one process of several; else nothing.

    Recognised: a TPU pod slice (`TPU_WORKER_HOSTNAMES` with several hosts, or Megascale), Slurm (`SLURM_NTASKS` above
    1), Open MPI, and `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            coordinator_address=environment["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(environment.get("JAX_NUM_PROCESSES", "1")),
            process_id=int(environment.get("JAX_PROCESS_ID", "0")),
        )
    elif (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or int(environment.get("SLURM_NTASKS", "1")) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    ):
        jax.distributed.initialize()
    if jax.process_count() > 1:
        logging.info("process %d of %d", jax.process_index(), jax.process_count())
