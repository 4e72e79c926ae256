"""Streams a checkpoint into a model's leaves, a few tensors at a time, quantised on arrival.

The leaves are allocated once; every tensor is read, converted on the device and written into its layer in place, so
the peak is the finished model plus the tensors under way. The 16-bit model never exists whole.

On an accelerator a few tensors are under way at a time: while one is copied from the file's pages, another is on the
bus or being quantised, and the scales of a third are quantised in turn on the host.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxtune.devices import ONE_DEVICE, Layout, without_layers
from jaxtune.hub import BnbTensor, Checkpoint
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import NF4Weight
from jaxtune.models.names import Leaves, Slot, expected_names, is_stacked, leaf_shapes, module_at
from jaxtune.quant import dequantize_nf4, from_bnb, on_device, quantize_nf4

# Under way at a time, each in pieces of at most quant.PIECE_BYTES, of which the host holds a copy.
TENSORS_AHEAD = 4


def _blank(shapes: dict[str, jax.ShapeDtypeStruct]) -> Leaves:
    """Zeros of these shapes and shardings: one program, where one a shape would each be compiled."""
    zeros = lambda: {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}  # noqa: E731
    return jax.jit(zeros, out_shardings={path: shape.sharding for path, shape in shapes.items()})()


@partial(jax.jit, donate_argnums=0)
def _write(stacks: dict[str, Any], values: dict[str, Any], index) -> dict[str, Any]:
    """Puts the fields of one weight into row `index` of their stacks, in place; one program for weights of a shape."""

    def put(stack: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), index, 0)

    return jax.tree.map(put, stacks, values)


@partial(jax.jit, static_argnums=1)
def _cast(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype)


def in_order[T](call: Callable[..., T], arguments: Iterable[tuple], ahead: int) -> Iterator[T]:
    """call(*a) of each of `arguments`, in their order, at most `ahead` of them begun and not yet taken."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        for each in arguments:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(call, *each))
        while waiting:
            yield waiting.popleft().result()


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


def _convert(value: np.ndarray | BnbTensor, target, dtype, name: str) -> dict[str, Any]:
    """One tensor as the leaves it becomes: {"": array} or the fields of an NF4 weight."""
    if isinstance(value, BnbTensor):
        stored = from_bnb(value.tensors, name, flat=not isinstance(target, NF4Weight))
    elif isinstance(target, NF4Weight):
        stored = quantize_nf4(value, double_quant=target.absmax_scale is not None)
    else:
        array = on_device(value)
        return {"": array if array.dtype == dtype else _cast(array, dtype)}
    if isinstance(target, NF4Weight):
        return {f".{field}": leaf for field, leaf in stored._asdict().items() if leaf is not None}
    return {"": dequantize_nf4(stored, dtype).reshape(value.shape)}


def load_weights(
    checkpoint: Checkpoint,
    model: CausalLM,
    *,
    progress: bool = True,
    ahead: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> Leaves:
    """Fills the leaves of a model of shapes (before any adapter is attached) from a checkpoint.

    Args:
      checkpoint, model: from, into.
      progress: show a bar.
      ahead: tensors under way at a time; None: TENSORS_AHEAD, on a CPU 1, where they share cores and memory.
      layout: where the leaves are to lie. Every process reads all of the checkpoint, tensor by tensor.

    Returns:
      path -> array.

    Raises:
      ValueError: tensors are missing, unused or of another shape than config.json says.
    """
    expected = expected_names(model)
    check_names(set(checkpoint.names()), set(expected), model.lm_head is None)
    if ahead is None:
        ahead = 1 if jax.default_backend() == "cpu" else TENSORS_AHEAD
    shapes = leaf_shapes(model)
    specs = layout.specs(model, shapes)
    leaves = _blank(
        {
            path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.sharding(specs[path]))
            for path, shape in shapes.items()
            if is_stacked(model, path)
        }
    )

    def fetch(name: str, slot: Slot, leaf: str) -> tuple[Slot, str, dict[str, Any]]:
        target, value = getattr(module_at(model, slot.path), leaf), checkpoint.read(name)
        shape = leaf_shapes_of(target)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: config.json asks for shape {list(shape)}, the checkpoint has {list(tuple(value.shape))}"
            )
        return slot, leaf, _convert(value, target, model.dtype, name)

    bar = tqdm(
        in_order(fetch, ((name, *where) for name, where in expected.items()), ahead),
        desc="Loading weights",
        total=len(expected),
        unit="tensor",
        disable=None if progress else True,
        leave=False,
    )
    for slot, leaf, fields in bar:
        place = f"{slot.path}.{leaf}"
        stacked = slot.index is not None
        fields = {
            field: layout.put(
                array, without_layers(specs[place + field]) if stacked else specs[place + field]
            )
            for field, array in fields.items()
        }
        if slot.index is not None:
            fields = _write({field: leaves[place + field] for field in fields}, fields, np.int32(slot.index))
        leaves |= {place + field: array for field, array in fields.items()}
    return leaves


def leaf_shapes_of(target) -> tuple[int, ...]:
    """The matrix shape of a weight leaf, quantised or not."""
    if isinstance(target, NF4Weight):
        out, half = target.codes.get_value().shape
        return out, 2 * half
    return tuple(target.get_value().shape)
