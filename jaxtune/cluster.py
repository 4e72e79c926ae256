"""Processes of one run: who is first, and what all have to agree on. jax.distributed connects them.

A run on one host is one process, for which everything here is nothing. On several hosts each starts the same command;
jax finds the others under SLURM, Open MPI and Kubernetes, or is told: see `Cluster`.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes what is written once: logs, adapters, what is printed."""
    return jax.process_index() == 0


def part() -> tuple[int, int]:
    """(this process, of how many)."""
    return jax.process_index(), jax.process_count()


def wait_for_all(where: str) -> None:
    """Until every process is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def smallest(number: int) -> int:
    """Of what the processes say."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.int64(number))))


def largest(number: int) -> int:
    """Of what the processes say."""
    return -smallest(-number)
