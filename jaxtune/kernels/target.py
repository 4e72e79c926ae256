"""The GPU that programs are traced for: the one in this machine, or one that is only compiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

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
