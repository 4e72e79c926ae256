"""Marking what a layer may keep for its backward pass; `models.remat` chooses among the marks."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels import target


def keep(x: Any, name: str) -> Any:
    """Marks the arrays of a pytree as what `Remat.keep` means by `name`.

    On a GPU behind a barrier: without it XLA fuses the product that makes an array with the copy into the stack of
    kept ones, and runs it again for whoever else reads it.
    """
    if target.capability() is not None:
        x = jax.lax.optimization_barrier(x)
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)
