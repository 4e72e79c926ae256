"""Streams a checkpoint into a model's leaves, one tensor at a time, quantised on arrival.

The leaves are allocated once; every tensor is read, converted on the device and written into its layer in place, so
the peak is the finished model plus one tensor. The 16-bit model never exists whole.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxtune.hub import BnbTensor, Checkpoint
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import NF4Weight
from jaxtune.models.names import Leaves, expected_names, leaf_shapes, module_at
from jaxtune.quant import dequantize_nf4, from_bnb, quantize_nf4


@partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), index, 0)


@partial(jax.jit, static_argnums=1)
def _cast(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype)


def check_names(found: set[str], expected: set[str], tied: bool) -> None:
    """Raises ValueError naming the tensors that are missing from, or left over in, a checkpoint."""
    redundant = {name for name in found if name.endswith("rotary_emb.inv_freq")} | (
        {"lm_head.weight"} if tied else set()
    )
    missing, unused = sorted(expected - found), sorted(found - expected - redundant)
    if missing or unused:
        show = lambda names: ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")  # noqa: E731
        parts = [f"{len(missing)} missing: {show(missing)}"] if missing else []
        parts += [f"{len(unused)} unused: {show(unused)}"] if unused else []
        raise ValueError(
            "the checkpoint's tensors do not fit the model of its config.json; " + "; ".join(parts)
        )


def _convert(value: np.ndarray | BnbTensor, target, dtype, name: str) -> dict[str, jax.Array]:
    """One tensor as the leaves it becomes: {"": array} or the fields of an NF4 weight."""
    if isinstance(value, BnbTensor):
        stored = from_bnb(value.tensors, name)
    elif isinstance(target, NF4Weight):
        stored = quantize_nf4(value, double_quant=target.absmax_scale is not None)
    else:
        return {"": _cast(jnp.asarray(value), dtype)}
    if isinstance(target, NF4Weight):
        return {f".{field}": leaf for field, leaf in stored._asdict().items() if leaf is not None}
    return {"": dequantize_nf4(stored, dtype)}


def load_weights(checkpoint: Checkpoint, model: CausalLM, *, progress: bool = True) -> Leaves:
    """Fills the leaves of a model of shapes (before any adapter is attached) from a checkpoint.

    Returns:
      path -> array, on the default device.

    Raises:
      ValueError: tensors are missing, unused or of another shape than config.json says.
    """
    expected = expected_names(model)
    check_names(set(checkpoint.names()), set(expected), model.lm_head is None)
    leaves = {path: jnp.zeros(s.shape, s.dtype) for path, s in leaf_shapes(model).items()}
    bar = tqdm(
        expected.items(),
        desc="Loading weights",
        unit="tensor",
        disable=None if progress else True,
        leave=False,
    )
    for name, (slot, leaf) in bar:
        target = getattr(module_at(model, slot.path), leaf)
        value = checkpoint.read(name)
        shapes = leaf_shapes_of(target)
        if tuple(value.shape) != shapes:
            raise ValueError(
                f"{name}: config.json asks for shape {list(shapes)}, the checkpoint has {list(tuple(value.shape))}"
            )
        for field, array in _convert(value, target, model.dtype, name).items():
            path = f"{slot.path}.{leaf}{field}"
            leaves[path] = array if slot.index is None else _write(leaves[path], array, slot.index)
    return leaves


def leaf_shapes_of(target) -> tuple[int, ...]:
    """The matrix shape of a weight leaf, quantised or not."""
    if isinstance(target, NF4Weight):
        out, half = target.codes.get_value().shape
        return out, 2 * half
    return tuple(target.get_value().shape)
