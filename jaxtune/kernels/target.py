"""The GPU that programs are traced for: the one in this machine, or one that is only compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

Capability = tuple[int, int]  # CUDA compute capability, (9, 0) for an H100 or H200
_assumed: ContextVar[Capability | None] = ContextVar("assumed", default=None)


def capability() -> Capability | None:
    """Compute capability of the NVIDIA GPU that the program being traced will run on; None: no such GPU."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    device = jax.devices()[0]
    found = getattr(device, "compute_capability", "")
    if device.platform != "gpu" or "." not in found:  # an AMD GPU has a name there
        return None
    major, minor = found.split(".")
    return int(major), int(minor)


def multiplies(dtype) -> bool:
    """Whether the device that a program is traced for has products of a 16-bit dtype: NVIDIA GPUs have those of
    bfloat16 from Ampere on, CPUs none of float16."""
    gpu = capability()
    if gpu is None:
        return dtype != jnp.float16
    return gpu >= ((8, 0) if dtype == jnp.bfloat16 else (7, 0))


@contextmanager
def tracing_for(assumed: Capability) -> Iterator[None]:
    """Programs traced inside are for a GPU of this capability, whatever this machine has.

    For compiling and checking without the device; jit keeps what it traced, so trace fresh functions.
    """
    token = _assumed.set(assumed)
    try:
        yield
    finally:
        _assumed.reset(token)
