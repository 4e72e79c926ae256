"""The processes of one run: how they find each other, who is first, and what all have to agree on.

A run on one host is one process, for which everything here is nothing. On several hosts each starts the same command;
jax.distributed connects them, watches that all live, and brings news of a preemption to all. What is saved goes to a
folder that all see.
"""

import os
import pickle
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.config import ClusterArguments

# Of a launcher: how many processes it has started, and which one this is.
LAUNCHERS = {
    "SLURM (srun)": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),
}


def launcher() -> str | None:
    """What has started several processes of this command, by their environment; None: nothing did."""
    for name, (count, rank) in LAUNCHERS.items():
        if rank in os.environ and int(os.environ.get(count, 1)) > 1:
            return name
    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return "Kubernetes" if indexed else None


def connect(arguments: ClusterArguments) -> None:
    """Joins the other processes of the run, if there are any; before anything asks JAX for its devices.

    Raises:
      ValueError, RuntimeError: the others are not found.
    """
    found = launcher()
    if arguments.coordinator is None and found is None:
        return
    jax.distributed.initialize(
        coordinator_address=arguments.coordinator,
        num_processes=arguments.num_processes,
        process_id=arguments.process_id,
        cluster_detection_method="mpi4py" if found == "MPI" else None,
        heartbeat_timeout_seconds=arguments.heartbeat_timeout,
        shutdown_timeout_seconds=arguments.heartbeat_timeout,
    )


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
    return min(gathered(lambda: number))


def gathered[T](make: Callable[[], T]) -> list[T]:
    """What `make` gives in each process, in their order: what can be pickled, less than 2 GiB in each.

    Raises:
      Exception: that of this process, or RuntimeError where another's failed; so all go on or none does.
    """
    if jax.process_count() == 1:
        return [make()]
    failure, made, message = None, None, None
    try:
        made = make()
    except Exception as error:  # noqa: BLE001  the others have to hear of any
        failure, message = error, f"{type(error).__name__}: {error}"
    found = [pickle.loads(one) for one in _all_bytes(pickle.dumps((made, message)))]
    if failure is not None:
        raise failure
    for number, (_, message) in enumerate(found):
        if message is not None:
            raise RuntimeError(f"process {number} failed: {message}")
    return [value for value, _ in found]


def _all_bytes(own: bytes) -> list[bytes]:
    """Those of each process."""
    lengths = multihost_utils.process_allgather(np.int32(len(own)))  # JAX would cut 64 bits
    padded = np.frombuffer(own.ljust(int(np.max(lengths)), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def is_preempted(step: int) -> bool:
    """Whether some process was told to end (SIGTERM) and all are to save after this step; to be asked at every step."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
