"""How a model and its batches lie on several devices: the one place that knows the mesh.

A mesh has two axes. Batches are split over both, row by row; what is trained lies whole on every device, and the
gradients are summed.

    data   devices that hold the same part of the frozen weights: nothing else is sent
    fsdp   devices that share one copy of the frozen weights. Each holds a part of every matrix; a layer's NF4 codes are
           gathered when the layer is run, forwards and again backwards, and dequantised where they are used

(4, 1) is the layout called data, (1, 4) is fsdp, and (2, 4) on two hosts of four gathers inside a host only. Programs
are written for one device and run under `jax.shard_map`; kernels know nothing of it. Rows of one process are
neighbours, so a batch's part of each process is a slice.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Embedding, Frozen, Linear, NF4Weight
from jaxtune.models.names import Leaves, leaf_shapes

DATA, FSDP = AXES = ("data", "fsdp")
WHOLE, ROWS, STEP_ROWS = PartitionSpec(), PartitionSpec(AXES), PartitionSpec(None, AXES)
_ONE_AT_A_TIME = threading.Lock()
BASE_SHARE = 0.6  # of a device's memory that frozen weights may take before "auto" splits them


@dataclass(frozen=True)
class Layout:
    """A mesh of devices [data, fsdp], or None: one device, where every method gives back what it was given."""

    mesh: Mesh | None = None

    @property
    def data(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def fsdp(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[FSDP]

    @property
    def size(self) -> int:
        """Devices, each of which takes as many rows of a batch."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        if self.mesh is None:
            return "1 device"
        copies = "the base whole on each" if self.fsdp == 1 else f"the base split over {self.fsdp}"
        return f"{self.size} devices (data={self.data}, fsdp={self.fsdp}: {copies}), batches split over all"

    # -- programs --------------------------------------------------------------------------------------------

    def spread[**P, R](self, function: Callable[P, R], in_specs: Any, out_specs: Any) -> Callable[P, R]:
        """A function of each device's part of its arguments, as one of the whole arrays; see jax.shard_map.

        Gradients through it sum what WHOLE arguments get on each device.
        """
        if self.mesh is None:
            return function
        # Kernels and custom gradients do not say what differs between devices, so it cannot be checked.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def sum[T](self, tree: T) -> T:
        """Inside `spread`: summed over all devices."""
        return tree if self.mesh is None else jax.lax.psum(tree, AXES)

    def graphdef(self, module: CausalLM) -> nnx.GraphDef:
        """Of the model as a device sees it inside `spread`: it gathers what is split, when it is used."""
        return nnx.split(_divided(module, self.fsdp)[0])[0]

    def specs(self, module: CausalLM, leaves: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """How each of these leaves of a model is split."""
        dims = _divided(module, self.fsdp)[1]
        return {path: _spec(dims[path]) if path in dims else WHOLE for path in leaves}

    # -- arrays ----------------------------------------------------------------------------------------------

    def sharding(self, spec: PartitionSpec = WHOLE) -> NamedSharding | None:
        """For jax.jit and its kin; None on one device, which leaves the choice to JAX."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def put(self, value: Any, spec: PartitionSpec = WHOLE) -> Any:
        """An array that this process has whole, put where `spec` says; no device gets more than its part."""
        sharding = self.sharding(spec)
        if sharding is None or getattr(value, "sharding", None) == sharding:
            return value
        if isinstance(value, jax.Array) and isinstance(value.sharding, NamedSharding):
            return jax.jit(_same, out_shardings=sharding)(value)  # compiled once for arrays of one shape
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def put_leaves(self, module: CausalLM, leaves: Leaves) -> Leaves:
        """A model's leaves, where this layout has them."""
        specs = self.specs(module, leaves)
        return {path: self.put(leaf, specs[path]) for path, leaf in leaves.items()}

    def put_rows(self, batch: Mapping[str, Any], rows_dim: int) -> dict[str, Any]:
        """A batch of this process's rows [.., B, ..] as one of all rows; arrays without that dimension lie whole."""
        if self.mesh is None:
            return dict(batch)
        rows = NamedSharding(self.mesh, PartitionSpec(*[None] * rows_dim, AXES))
        whole = NamedSharding(self.mesh, WHOLE)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                rows if np.ndim(x) > rows_dim else whole, np.asarray(x)
            ),
            dict(batch),
        )

    def put_all_rows(self, batch: Mapping[str, Any], rows_dim: int) -> dict[str, Any]:
        """A batch of the rows of all processes, which each of them has; else as `put_rows`."""
        rows = PartitionSpec(*[None] * rows_dim, AXES)
        return jax.tree.map(lambda x: self.put(x, rows if np.ndim(x) > rows_dim else WHOLE), dict(batch))

    @property
    def own_devices(self) -> list[jax.Device]:
        """This process's."""
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.local_devices)

    def on_one_device(self, leaves: Leaves, number: int = 0) -> Leaves:
        """Copies of leaves on one of `own_devices`; on several hosts all have to ask."""
        if self.mesh is None:
            return leaves
        with _ONE_AT_A_TIME:  # devices must come to gathers in one order, whichever threads ask
            return {path: self.put(leaf).addressable_shards[number].data for path, leaf in leaves.items()}


ONE_DEVICE = Layout()


def _same(array: jax.Array) -> jax.Array:
    return array


def device_bytes(array: Any) -> int:
    """Bytes of an array, or of a shape, on one device."""
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def whole_like(arrays: Iterable[Any]) -> NamedSharding | None:
    """The sharding of arrays that lie whole on every device where these lie; None where that is one."""
    found = (
        array.sharding for array in arrays if isinstance(getattr(array, "sharding", None), NamedSharding)
    )
    return next((NamedSharding(sharding.mesh, WHOLE) for sharding in found), None)


def without_layers(spec: PartitionSpec) -> PartitionSpec:
    """Of one layer of a stacked leaf."""
    return PartitionSpec(*spec[1:])


def _spec(dim: int) -> PartitionSpec:
    return PartitionSpec(*[None] * dim, FSDP)


def _divided(module: CausalLM, parts: int) -> tuple[CausalLM, dict[str, int]]:
    """(the model as one of `parts` devices sees it, path -> dimension along which that leaf is split).

    Frozen matrices are split by rows (an embedding by columns), where they divide; the rest, vectors most of all, lies
    whole everywhere.
    """
    module = nnx.merge(*nnx.split(module))
    if parts == 1:
        return module, {}
    shapes, dims = leaf_shapes(module), {}
    for path, node in nnx.iter_modules(module):
        if isinstance(node, NF4Weight):
            names, split = ("codes", "absmax"), 0
        elif isinstance(node, Linear | Embedding) and isinstance(node.weight, Frozen):
            names, split = ("weight",), int(isinstance(node, Embedding))
        else:
            continue
        paths = [".".join(map(str, (*path, name))) for name in names]
        dim = split - 2  # a stacked leaf has the layers in front
        if all(shapes[p].shape[dim] % parts == 0 for p in paths):
            node.mesh_axis = FSDP
            dims |= {p: len(shapes[p].shape) + dim for p in paths}
    return module, dims


Choice = int | Literal["auto"]


def make_layout(
    base_bytes: int, devices: int | None = None, data: Choice = "auto", fsdp: Choice = "auto"
) -> Layout:
    """The layout for frozen weights of so many bytes.

    Args:
      devices: how many; None: data × fsdp where both are numbers, else every GPU, or one device of a CPU host.
      data, fsdp: sizes of the mesh. "auto" beside a number: what is left. Both "auto": the base whole on each device
        where it takes no more than BASE_SHARE of its memory, else split over the fewest devices where it does.

    Raises:
      ValueError: there are not so many devices, or they do not divide so.
    """
    found, processes = jax.devices(), jax.process_count()
    both = data != "auto" and fsdp != "auto"
    if devices is None and both:
        devices = int(data) * int(fsdp)
    if devices is None:
        devices = (
            len(found) if processes > 1 or found[0].platform != "cpu" else max(_known(data), _known(fsdp))
        )
    if not 1 <= devices <= len(found):
        raise ValueError(f"devices={devices}: there are {len(found)} ({found[0].device_kind})")
    if processes > 1 and devices != len(found):
        raise ValueError(f"devices={devices}: a run of {processes} processes uses all {len(found)} devices")
    if fsdp == "auto":
        fsdp = devices // int(data) if data != "auto" else _fewest(devices, base_bytes)
    data = devices // int(fsdp) if data == "auto" else int(data)
    if data * int(fsdp) != devices:
        raise ValueError(f"data={data} × fsdp={fsdp} is not devices={devices}")
    if devices == 1 and processes == 1:
        return ONE_DEVICE
    return Layout(Mesh(np.asarray(found[:devices]).reshape(data, int(fsdp)), AXES))


def _known(choice: Choice) -> int:
    return 1 if choice == "auto" else int(choice)


def _fewest(devices: int, base_bytes: int) -> int:
    """Over how many devices a base must be split."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = BASE_SHARE * stats["bytes_limit"] if "bytes_limit" in stats else float("inf")
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return next((n for n in divisors if base_bytes / n <= limit), devices)
