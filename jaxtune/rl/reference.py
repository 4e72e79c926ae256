"""The reference policy: the model as it was when training began."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.formats.safetensors_reader import SafetensorsFile
from jaxtune.formats.safetensors_writer import ShardWriter
from jaxtune.model import Model
from jaxtune.models.names import Leaves


def reference_leaves(model: Model) -> Leaves | None:
    """A copy of what is trained, or None where the model without its adapter is the same: that costs no memory."""
    adapter = all(".lora_" in path for path in model.trainable)
    if adapter and not any(bool(x.any()) for path, x in model.trainable.items() if path.endswith("lora_B")):
        return None
    return {path: x.copy() for path, x in model.trainable.items()}


def without_adapter(base: Leaves) -> Leaves:
    """A base whose adapters have no effect: the model as it was before they were added."""
    return {path: jnp.zeros_like(x) if path.endswith("lora_scaling") else x for path, x in base.items()}


@functools.partial(jax.jit, donate_argnums=0)
def mixed(reference: Leaves, trainable: Leaves, alpha: float) -> Leaves:
    """α · trained + (1 - α) · reference, in float32, stored as it was."""

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return (alpha * new.astype("float32") + (1 - alpha) * old.astype("float32")).astype(old.dtype)

    return {path: mix(old, trainable[path]) for path, old in reference.items()}


def save_reference(file: Path, reference: Leaves) -> None:
    """Keep a reference that has moved."""
    with ShardWriter(file.parent, list(reference), 2**62, single=file.name) as writer:
        for path, value in reference.items():
            writer.add({path: np.asarray(value)})


def load_reference(file: Path, like: Leaves) -> Leaves:
    """The reference that was kept, on the devices of the one that is there."""
    saved = SafetensorsFile(file)
    return {path: jax.device_put(saved.read(path), value.sharding) for path, value in like.items()}
