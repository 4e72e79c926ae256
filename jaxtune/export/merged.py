"""Save a model with its adapter merged in: 16-bit, or 4-bit in bitsandbytes' format.

Two bases can be merged onto. "dequantised" is the NF4 base as training saw it: the saved model computes what
the model with its adapter computes. "original" re-reads the 16-bit weights of the checkpoint: nearer to the
original model, but the adapter never saw those weights. For a model that was not loaded in 4 bits both are
the same.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm.auto import tqdm

from jaxtune.export.adapter import check_finite, save_adapter, save_processing
from jaxtune.export.folder import MODEL_CONFIG, staged_folder
from jaxtune.formats.safetensors_writer import ShardWriter
from jaxtune.lora import merged_weight
from jaxtune.models import stays_in_16_bits
from jaxtune.models.names import Slot, expected_names, linear_slots, module_at, stored_weight
from jaxtune.models.rope import parameters_of
from jaxtune.quant import BLOCK, NF4, dequantize_nf4, quantize_nf4, to_bnb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model

Base = Literal["dequantised", "original"]
METHODS = {
    "lora": "lora",
    "merged_16bit": "merged_16bit",
    "merged_4bit": "merged_4bit",
    "merged_4bit_forced": "merged_4bit",
    "forced_merged_4bit": "merged_4bit",
}
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_BNB_SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


def save_merged(
    model: Model,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    base: Base = "dequantised",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    safe_serialization: bool = True,
    maximum_memory_usage: float | None = None,
) -> None:
    """Write a whole model that transformers loads: weights, config, generation config and tokenizer.

    Weights stream: memory holds one tensor at a time beside the model.

    Args:
        model: with or without an adapter; a fully fine-tuned one is saved as it is.
        directory: folder to make; see `export.folder` for what happens to an existing one.
        tokenizer: saved beside the weights, or a processor; by default the model's. See `save_processing`.
        save_method: "merged_16bit"; "merged_4bit" (also "merged_4bit_forced", "forced_merged_4bit"), NF4 as
            bitsandbytes stores it, with a new rounding error; "lora", the adapter alone.
        base: what the adapter is merged onto, "dequantised" or "original".
        dtype: "bfloat16", "float16" or "float32"; by default the model's when it has 16 bits, else bfloat16.
        max_shard_size: bytes, or a string such as "5GB".
        progress: show a progress bar.
        safe_serialization, maximum_memory_usage: accepted for Unsloth's sake; False raises, the other does
            nothing.

    Raises:
        ValueError: an unknown method or base; base="original" when the checkpoint itself has 4 bits; a tensor
            with NaN or infinity (it is named). OSError: the disk is too full. In every case nothing is
            written.
    """
    method = _check(model, directory, save_method, base, safe_serialization, maximum_memory_usage)
    if method == "lora":
        return save_adapter(model, directory, tokenizer)
    kind = _dtype(model, dtype)
    quantised = _quantised(model) if method == "merged_4bit" else set()
    config = _config(model, kind, quantised)
    plan = expected_names(model.module)
    nbytes = sum(_nbytes(tensor_shape(model, *plan[name]), name, quantised, kind) for name in plan)
    stored = [model.checkpoint.stored_name(name) for name in plan]
    names = [f"{name}{side}" for name in stored for side in ("", *(f".{side}" for side in _BNB_SIDES))]
    with staged_folder(directory, nbytes) as folder:
        bar = tqdm(plan, f"Saving {method}", unit="tensor", disable=not progress, leave=False)
        with ShardWriter(folder, names, max_shard_size) as writer:
            for name in bar:  # nothing holds a tensor while the next is made
                writer.add(_tensors(model, base, kind, quantised, name, *plan[name]))
        if model.checkpoint.generation_config:
            text = json.dumps(model.checkpoint.generation_config, indent=2)
            (folder / "generation_config.json").write_text(text + "\n", "utf-8")
        save_processing(model, folder, tokenizer)
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _check(model, directory, save_method, base, safe_serialization, maximum_memory_usage) -> str:
    if save_method not in METHODS:
        raise ValueError(f"save_method {save_method!r} is unknown; expected one of {', '.join(METHODS)}")
    check_base(model, base)
    if not safe_serialization:
        raise ValueError("safe_serialization=False (pickled .bin files) is not supported; leave it out")
    if maximum_memory_usage is not None:
        warnings.warn("maximum_memory_usage has no effect: weights are saved one at a time", stacklevel=3)
    if Path(directory).expanduser().resolve() == model.checkpoint.path.resolve():
        raise ValueError(f"{directory} holds the base model itself; save to another folder")
    return METHODS[save_method]


def check_base(model: Model, base: str) -> None:
    """Raises ValueError for a base that is unknown or that the model's checkpoint cannot give."""
    if base not in ("dequantised", "original"):
        raise ValueError(f"base {base!r} is unknown; expected 'dequantised' or 'original'")
    if base == "original" and model.checkpoint.kind == "bnb-4bit":
        raise ValueError(
            f"base='original': {model.name_or_path} is itself stored in 4 bits, so there are no 16-bit weights to "
            "merge onto; use base='dequantised', or load the 16-bit repository"
        )


def _dtype(model: Model, dtype: str | None) -> np.dtype:
    """The type asked for; by default the model's when it has 16 bits, else bfloat16."""
    own = np.dtype(model.dtype).name
    name = dtype or (own if own in ("bfloat16", "float16") else "bfloat16")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _quantised(model: Model) -> set[str]:
    """Modules to store in 4 bits: those that are so in the model, else all linear layers but the head."""
    slots = linear_slots(model.module)
    stored = {name for name, slot in slots.items() if f"{slot.path}.weight.codes" in model.base}
    if stored:
        return stored
    linears = {name: module_at(model.module, slot.path) for name, slot in slots.items()}
    return {
        name
        for name, linear in linears.items()
        if linear.in_features % BLOCK == 0 and not stays_in_16_bits(model.module, name, linear)
    }


def _double(model: Model) -> bool:
    quantised = [path for path in model.base if path.endswith(".codes")]
    return not quantised or any(path.endswith(".absmax_scale") for path in model.base)


def tensor_shape(model: Model, slot: Slot, leaf: str) -> tuple[int, ...]:
    """Shape of a weight or bias in the checkpoint: [out, in], whatever it is stored as."""
    leaves = model.base | model.trainable
    path = f"{slot.path}.{leaf}"
    shape = leaves[path].shape if path in leaves else leaves[f"{path}.codes"].shape
    shape = shape if slot.index is None else shape[1:]
    return shape if path in leaves else (shape[0], 2 * shape[1])


def _nbytes(shape: tuple[int, ...], name: str, quantised: set[str], kind: np.dtype) -> int:
    count = int(np.prod(shape))
    if name.removesuffix(".weight") in quantised:
        return count // 2 + count // BLOCK * 4 + 2048
    return count * kind.itemsize


def _tensors(
    model: Model, base: Base, kind: np.dtype, quantised: set[str], name: str, slot: Slot, leaf: str
) -> dict[str, np.ndarray]:
    """What to write for one weight: itself, or its codes and scales."""
    module = name.rpartition(".")[0]
    if leaf == "weight" and module in quantised:
        tensors = to_bnb(_merged_nf4(model, base, name, slot), dtype=kind.name)
        stored = model.checkpoint.stored_name(name).rpartition(".")[0]
        return {f"{stored}.{side}": value for side, value in tensors.items()}
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported by name
        value = merged_tensor(model, base, name, slot, leaf).astype(kind)
    check_finite(name, value)
    return {model.checkpoint.stored_name(name): value}


def merged_tensor(model: Model, base: Base, name: str, slot: Slot, leaf: str) -> np.ndarray:
    """One merged weight or bias, float32."""
    weight = np.asarray(_base_tensor(model, base, name, slot, leaf)).astype(np.float32)
    return merged_weight(model, name.rpartition(".")[0], weight) if leaf == "weight" else weight


def merged_on_device(model: Model, base: Base, name: str, slot: Slot, leaf: str) -> jax.Array:
    """`merged_tensor`, computed on and left on the model's device; sums may round in another order."""
    weight = jnp.asarray(_base_tensor(model, base, name, slot, leaf)).astype(jnp.float32)
    return merged_weight(model, name.rpartition(".")[0], weight) if leaf == "weight" else weight


def _base_tensor(model: Model, base: Base, name: str, slot: Slot, leaf: str) -> np.ndarray | jax.Array:
    """One weight or bias as it is stored, or trained whole; dequantised."""
    leaves = model.base | model.trainable
    if f"{slot.path}.{leaf}" in model.trainable:
        return slot.take(model.trainable, leaf)
    if base == "original":
        return model.checkpoint.read(name)
    if leaf == "weight" and isinstance(stored := stored_weight(model.module, leaves, slot), NF4):
        return dequantize_nf4(stored)
    return slot.take(leaves, leaf)


def _merged_nf4(model: Model, base: Base, name: str, slot: Slot) -> NF4:
    """One merged weight in NF4; the stored codes themselves where there is nothing to merge."""
    leaves = model.base | model.trainable
    adapted = model.lora is not None and f"{slot.path}.lora_A" in model.trainable
    if not adapted and base == "dequantised" and f"{slot.path}.weight.codes" in leaves:
        stored = stored_weight(model.module, leaves, slot)
        assert isinstance(stored, NF4)
        return stored
    value = merged_tensor(model, base, name, slot, "weight")
    check_finite(name, value)
    return quantize_nf4(value, double_quant=_double(model))


def _config(model: Model, kind: np.dtype, quantised: set[str]) -> dict[str, Any]:
    """config.json of the saved model, readable by transformers 5 and by what still expects version 4's names."""
    config = copy.deepcopy(model.config)
    config.dtype = kind.name
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if model.module.lm_head is not None:  # an untied head, also one that training untied
        config.tie_word_embeddings = False
    if quantised:
        plain = sorted(set(linear_slots(model.module)) - quantised | {"lm_head"})
        config.quantization_config = _bnb_config(kind.name, _double(model), plain)
    fields = json.loads(config.to_json_string(use_diff=False))
    if "rope_parameters" not in fields:  # those of nested configs have one form
        return fields | {"torch_dtype": kind.name}
    rope = parameters_of(config)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    older = {
        "torch_dtype": kind.name,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
    if "sliding_attention" in config.rope_parameters:
        older["rope_local_base_freq"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    return fields | older


def _bnb_config(dtype: str, double: bool, skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
