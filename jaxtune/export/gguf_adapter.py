"""A LoRA adapter as .gguf, for llama.cpp's --lora.

llama.cpp adds scale · alpha / rank · B A to the layer that a pair of tensors names; what else an adapter can hold
(DoRA's magnitudes, whole embeddings) has no place in the file and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from gguf.constants import GGMLQuantizationType

from jaxtune import models
from jaxtune.export.adapter import check_finite
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.export.gguf_identity import identity
from jaxtune.export.gguf_metadata import QUANTIZATION_VERSION, Metadata, check_config, gguf_family
from jaxtune.formats.gguf_names import file_order, gguf_name, interleave_rotary_halves, rotary_heads
from jaxtune.lora import PEFT_PREFIX, adapter_tensors

if TYPE_CHECKING:
    from jaxtune.model import Model

_KINDS = {"float32": GGMLQuantizationType.F32, "float16": GGMLQuantizationType.F16}
_LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}


def save_gguf_adapter(
    model: Model,
    path: str | Path,
    *,
    name: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a model's adapter for `llama-cli -m BASE.gguf --lora PATH`.

    Args:
        model: a model with a LoRA adapter; with rsLoRA its other scale is part of the file.
        path: the file to make.
        name: for general.name and its kin; by default the file's.
        dtype: of the tensors.
        overwrite: replace a file that is there.

    Returns:
        The path written.

    Raises:
        ValueError: no adapter, or one that GGUF cannot hold; NaN or infinity in a tensor (it is named).
        FileExistsError: the file exists. Nothing is written in any of these cases.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if dtype not in _KINDS:
        raise ValueError(f"dtype {dtype!r} is unknown; expected one of {', '.join(_KINDS)}")
    tensors = _tensors(model)
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported by name
        tensors = {key: np.ascontiguousarray(value.astype(dtype)) for key, value in tensors.items()}
    for key, value in tensors.items():
        check_finite(key, value)
    entries = [TensorEntry(key, value.shape, _KINDS[dtype]) for key, value in tensors.items()]
    with GgufWriter(path, _metadata(model, name or path.stem, tensors), entries) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
    return path


def _tensors(model: Model) -> dict[str, np.ndarray]:
    """GGUF name -> A [r, in] or B [out, r], float32; rows of B as the base model's are."""
    if model.lora is None:
        raise ValueError("the model has no adapter; call FastLanguageModel.get_peft_model first")
    if model.lora.use_dora:
        raise ValueError("GGUF has no DoRA (use_dora=True); export the merged model instead")
    if model.lora.modules_to_save:
        raise ValueError(
            f"GGUF adapters cannot hold modules_to_save={list(model.lora.modules_to_save)}; export the merged "
            "model instead"
        )
    family = gguf_family(model.config)
    check_config(model.config, family)
    decoder = models.family(model.config).config(model.config)
    found, inside = {}, f"{model.module.decoder_path}."
    for peft_name, value in adapter_tensors(model).items():
        module, leaf = peft_name.removeprefix(PEFT_PREFIX).split(".lora_")
        if not module.startswith(inside):
            raise ValueError(
                f"{module}: llama.cpp takes adapters of the language part alone, and this one is on the vision tower "
                "too; export the merged model (save_pretrained_gguf without save_method), or train with "
                "finetune_vision_layers=False"
            )
        weight, leaf = f"{module.replace(inside, 'model.', 1)}.weight", _LEAVES[f"lora_{leaf}"]
        heads = rotary_heads(weight, decoder.num_heads, decoder.num_kv_heads) if family.interleaved else None
        if heads is not None and leaf == "lora_b":
            value = interleave_rotary_halves(value, heads)
        found[f"{gguf_name(weight, family.architecture)}.{leaf}"] = value
    return {key: found[key] for key in file_order(found)}


def _metadata(model: Model, name: str, tensors: dict[str, np.ndarray]) -> Metadata:
    assert model.lora is not None
    pairs = [(value, tensors[f"{key[:-1]}b"]) for key, value in tensors.items() if key.endswith(".lora_a")]
    parameters = sum(a.shape[1] * b.shape[0] for a, b in pairs)
    return {
        "general.architecture": gguf_family(model.config).architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        **identity(name, parameters, adapter=True),
        # llama.cpp divides by the rank; rsLoRA divided by its root.
        "adapter.lora.alpha": np.float32(model.lora.scaling * model.lora.r),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
