"""Checkpoint names <-> the flat leaves of a model, and splitting and joining modules.

A leaf's path is its attribute path joined with dots: "model.layers.0.0.self_attn.q_proj.weight" is slot 0 of
segment 0, whose leading axis runs over the segment's repeats. `CausalLM.stacks` says which lists of layers are so.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Linear, NF4Weight
from jaxtune.quant import NF4, dequantize_nf4

Leaves = dict[str, jax.Array]


class Slot(NamedTuple):
    """Where a checkpoint's module lives: path of the (stacked) module and index on the leading axis, if any."""

    path: str
    index: int | None

    def take(self, leaves: Leaves, leaf: str):
        """The leaf of this module, its layer picked; KeyError when there is none."""
        value = leaves[f"{self.path}.{leaf}"]
        return value if self.index is None else value[self.index]


def _layer_slots(model: CausalLM) -> dict[str, tuple[str, int]]:
    """Checkpoint name of a layer -> path and index of its slot, in the checkpoint's order."""
    return {
        f"{stack}.{s.first + r * s.period + j}": (f"{stack}.{i}.{j}", r)
        for stack, plan in model.stacks
        for i, s in enumerate(plan)
        for r in range(s.repeats)
        for j in range(s.period)
    }


def is_stacked(model: CausalLM, path: str) -> bool:
    """Whether a leaf carries a leading axis of layers."""
    return any(path.startswith(f"{stack}.") for stack, _ in model.stacks)


def _module_paths(model: CausalLM) -> list[str]:
    """Attribute paths of the modules that own a weight, in order."""
    paths = []
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "weight"):
            paths.append(".".join(map(str, path)))
    return paths


def module_slots(model: CausalLM) -> dict[str, Slot]:
    """Checkpoint module name ("model.layers.5.self_attn.q_proj") -> Slot, in the checkpoint's order."""
    paths = _module_paths(model)
    slots = {}
    for name in paths:
        if not is_stacked(model, name):
            slots[name] = Slot(name, None)
    for layer, (prefix, index) in _layer_slots(model).items():
        for path in paths:
            if path.startswith(prefix + "."):
                slots[f"{layer}.{path[len(prefix) + 1 :]}"] = Slot(path, index)
    order = {f"{model.decoder_path}.embed_tokens": 0, f"{model.decoder_path}.norm": 2, "lm_head": 3}
    return dict(sorted(slots.items(), key=lambda item: order.get(item[0], 1)))


def linear_slots(model: CausalLM) -> dict[str, Slot]:
    """`module_slots`, linear layers only."""
    linear = {
        ".".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, Linear)
    }
    return {name: slot for name, slot in module_slots(model).items() if slot.path in linear}


def module_at(model: CausalLM, path: str):
    """The module at a dotted path."""
    node = model
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def expected_names(model: CausalLM) -> dict[str, tuple[Slot, str]]:
    """Checkpoint weight name -> (slot, leaf) of everything a model needs."""
    names = {}
    for module_name, slot in module_slots(model).items():
        module = module_at(model, slot.path)
        names[f"{module_name}.weight"] = (slot, "weight")
        if getattr(module, "bias", None) is not None:
            names[f"{module_name}.bias"] = (slot, "bias")
    return names


def leaf_shapes(model: CausalLM) -> dict[str, jax.ShapeDtypeStruct]:
    """Every leaf of a model that is still shapes: path -> shape and dtype, stacked leaves with their leading axis."""
    repeats = {f"{stack}.{i}.": s.repeats for stack, plan in model.stacks for i, s in enumerate(plan)}
    shapes = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        lead = tuple(n for prefix, n in repeats.items() if name.startswith(prefix))
        shapes[name] = jax.ShapeDtypeStruct((*lead, *value.shape), value.dtype)
    return shapes


def trainable_paths(model: CausalLM) -> set[str]:
    """Paths of the leaves that are trained: adapters and full weights."""
    return {
        ".".join(map(str, path))
        for path, v in nnx.to_flat_state(nnx.state(model))
        if isinstance(v, nnx.Param)
    }


def join(graphdef, *leaves: Leaves) -> CausalLM:
    """The module of a graphdef with the given flat leaves in place; the inverse of splitting, free inside jit."""
    flat = {}
    for part in leaves:
        for path, value in part.items():
            flat[tuple(int(k) if k.isdigit() else k for k in path.split("."))] = value
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def stored_weight(model: CausalLM, leaves: Leaves, slot: Slot) -> NF4 | jax.Array:
    """A module's weight as stored, one layer of it."""
    if isinstance(module_at(model, slot.path).weight, NF4Weight):
        return NF4(
            **{
                f: slot.take(leaves, f"weight.{f}")
                for f in NF4._fields
                if f"{slot.path}.weight.{f}" in leaves
            }
        )
    return slot.take(leaves, "weight")


def hf_weights(model) -> Iterator[tuple[str, np.ndarray]]:
    """(checkpoint name, array) of every weight of a `jaxtune.model.Model`, one at a time.

    NF4 is dequantised to the model's dtype, trained full weights are as trained (float32), adapters are not merged.
    """
    leaves = {**model.base, **model.trainable}
    for name, (slot, leaf) in expected_names(model.module).items():
        if leaf == "bias":
            yield name, np.asarray(slot.take(leaves, "bias"))
            continue
        stored = stored_weight(model.module, leaves, slot)
        yield name, np.asarray(dequantize_nf4(stored, model.dtype) if isinstance(stored, NF4) else stored)
