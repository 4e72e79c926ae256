"""The reference policy: the model as it was when training began."""

import jax.numpy as jnp

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
