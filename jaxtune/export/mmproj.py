"""The tower and projector of a vision-language model as a .gguf file of their own, which llama.cpp takes as --mmproj.

Names, keys and types are those of llama.cpp's converter with --mmproj.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from jaxtune.export.adapter import check_finite
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.export.gguf_identity import identity
from jaxtune.export.gguf_metadata import QUANTIZATION_VERSION, Metadata
from jaxtune.export.merged import Base, check_base, merged_tensor, tensor_shape
from jaxtune.models.names import Slot, expected_names

if TYPE_CHECKING:
    from jaxtune.model import Model

Dtype = Literal["f32", "f16", "bf16"]
_KINDS = {"f32": (Kind.F32, 0), "f16": (Kind.F16, 1), "bf16": (Kind.BF16, 32)}  # with general.file_type
_NUMPY = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
_PATCHES, _INPUT_PROJECTION = "v.patch_embd.weight", "mm.input_projection.weight"
# Module below `model.visual` -> name in the file; {} is a number.
_QWEN = {
    "blocks.{}.norm1": "v.blk.{}.ln1",
    "blocks.{}.norm2": "v.blk.{}.ln2",
    "blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "patch_embed.proj": "v.patch_embd",
}
_QWEN2_5 = _QWEN | {
    "blocks.{}.mlp.gate_proj": "v.blk.{}.ffn_gate",
    "blocks.{}.mlp.up_proj": "v.blk.{}.ffn_up",
    "blocks.{}.mlp.down_proj": "v.blk.{}.ffn_down",
    "merger.ln_q": "v.post_ln",
    "merger.mlp.{}": "mm.{}",
}
_QWEN3 = _QWEN | {
    "blocks.{}.attn.qkv": "v.blk.{}.attn_qkv",
    "blocks.{}.mlp.linear_fc1": "v.blk.{}.ffn_up",
    "blocks.{}.mlp.linear_fc2": "v.blk.{}.ffn_down",
    "pos_embed": "v.position_embd",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_BLOCK = "encoder.layers.{}."
# Module below `model.` and the tower's name, or below `model.` -> name in the file.
_SIGLIP = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    f"{_BLOCK}layer_norm1": "v.blk.{}.ln1",
    f"{_BLOCK}layer_norm2": "v.blk.{}.ln2",
    f"{_BLOCK}self_attn.q_proj": "v.blk.{}.attn_q",
    f"{_BLOCK}self_attn.k_proj": "v.blk.{}.attn_k",
    f"{_BLOCK}self_attn.v_proj": "v.blk.{}.attn_v",
    f"{_BLOCK}self_attn.out_proj": "v.blk.{}.attn_out",
    f"{_BLOCK}mlp.fc1": "v.blk.{}.ffn_up",
    f"{_BLOCK}mlp.fc2": "v.blk.{}.ffn_down",
    "post_layernorm": "v.post_ln",
    "multi_modal_projector.mm_input_projection": _INPUT_PROJECTION.removesuffix(".weight"),
    "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
    "connector.modality_projection.proj": "mm.model.fc",
}


class Part(NamedTuple):
    """A tensor of the file: the checkpoint's weight that it comes from, what of that it is, and what is added to it."""

    name: str
    slot: Slot
    leaf: str
    take: Callable[[np.ndarray], np.ndarray] | None = None
    shift: float = 0.0


def _siglip_parts(model: Model) -> Iterator[tuple[str, Part]]:
    for name, (slot, leaf) in expected_names(model.module).items():
        if name.startswith((f"{model.module.decoder_path}.", "lm_head.")):
            continue
        stem = re.sub(r"^model\.(vision_tower\.|vision_model\.)?", "", name).removesuffix(f".{leaf}")
        tensor = _SIGLIP[re.sub(r"\b\d+\b", "{}", stem)].format(*re.findall(r"\b\d+\b", stem))
        yield f"{tensor}.{leaf}", Part(name, slot, leaf, shift=float(tensor == "mm.soft_emb_norm"))


def _qwen2_5_parts(model: Model) -> Iterator[tuple[str, Part]]:
    return _qwen_parts(model, _QWEN2_5)


def _qwen3_parts(model: Model) -> Iterator[tuple[str, Part]]:
    return _qwen_parts(model, _QWEN3)


def _qwen_parts(model: Model, table: dict[str, str]) -> Iterator[tuple[str, Part]]:
    deep = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
    for name, (slot, leaf) in expected_names(model.module).items():
        if not name.startswith("model.visual."):
            continue
        stem = name.removeprefix("model.visual.").removesuffix(f".{leaf}")
        numbers = re.findall(r"\b\d+\b", stem)
        kind = re.sub(r"\b\d+\b", "{}", stem)
        if kind == "patch_embed.proj" and leaf == "weight":  # one matrix for each of the two frames
            yield _PATCHES, Part(name, slot, leaf, lambda values: values[:, :, 0])
            yield f"{_PATCHES}.1", Part(name, slot, leaf, lambda values: values[:, :, 1])
        elif kind == "blocks.{}.attn.qkv" and kind not in table:
            for i, letter in enumerate("qkv"):
                take = lambda values, i=i: np.split(values, 3)[i]  # noqa: E731
                yield f"v.blk.{numbers[0]}.attn_{letter}.{leaf}", Part(name, slot, leaf, take)
        elif kind.startswith("deepstack_merger_list."):
            part = kind.rsplit(".", 1)[-1].removeprefix("linear_")
            yield f"v.deepstack.{deep[int(numbers[0])]}.{part}.{leaf}", Part(name, slot, leaf)
        else:
            yield f"{table[kind].format(*numbers)}.{leaf}", Part(name, slot, leaf)


def _clip_keys(model: Model, *, image_size: int, blocks: int, heads: int) -> Metadata:
    """What all families have."""
    vision, processor = model.config.vision_config, model.processor
    assert processor is not None  # a model with a tower was loaded with it
    images = processor.image_processor
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": np.uint32(model.module.config.hidden_size),
        "clip.vision.image_size": np.uint32(image_size),
        "clip.vision.patch_size": np.uint32(vision.patch_size),
        "clip.vision.embedding_length": np.uint32(vision.hidden_size),
        "clip.vision.feed_forward_length": np.uint32(vision.intermediate_size),
        "clip.vision.block_count": np.uint32(blocks),
        "clip.vision.attention.head_count": np.uint32(heads),
        "clip.vision.image_mean": np.array(images.image_mean, np.float32),
        "clip.vision.image_std": np.array(images.image_std, np.float32),
    }


def _siglip_keys(model: Model, projector: str) -> Metadata:
    vision = model.config.vision_config
    _check_activation(vision, "gelu_pytorch_tanh")
    size = {
        "image_size": vision.image_size,
        "blocks": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
    }
    return _clip_keys(model, **size) | {
        "clip.projector_type": projector,
        "clip.vision.attention.layer_norm_epsilon": np.float32(vision.layer_norm_eps),
    }


def _gemma3_keys(model: Model) -> Metadata:
    vision, tokens = model.config.vision_config, model.config.mm_tokens_per_image
    keys = _siglip_keys(model, "gemma3") | {"clip.use_gelu": True}
    pool = vision.image_size // vision.patch_size // int(tokens**0.5)
    return keys if pool == 4 else keys | {"clip.vision.projector.scale_factor": np.uint32(pool)}


def _idefics3_keys(model: Model) -> Metadata:
    assert model.processor is not None
    return _siglip_keys(model, "idefics3") | {
        "clip.vision.projector.scale_factor": np.uint32(model.config.scale_factor),
        "clip.use_gelu": True,
        "clip.vision.preproc_image_size": np.uint32(model.processor.image_processor.size["longest_edge"]),
    }


def _qwen_keys(model: Model) -> Metadata:
    """What both families have."""
    vision = model.config.vision_config
    if vision.temporal_patch_size != 2:
        raise ValueError(
            f"vision_config.temporal_patch_size={vision.temporal_patch_size}: llama.cpp's towers of Qwen have 2"
        )
    side = int(getattr(vision, "num_position_embeddings", 0) ** 0.5) * vision.patch_size
    return _clip_keys(model, image_size=side or 560, blocks=vision.depth, heads=vision.num_heads)


def _qwen2_5_keys(model: Model) -> Metadata:
    vision = model.config.vision_config
    full = list(vision.fullatt_block_indexes)
    if not full or full != list(range(full[0], full[-1] + 1, full[0] + 1)):
        raise ValueError(
            f"vision_config.fullatt_block_indexes={full}: llama.cpp's tower sees a whole image in every n-th layer only"
        )
    _check_activation(vision, "silu")
    return _qwen_keys(model) | {
        "clip.projector_type": "qwen2.5vl_merger",
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": np.uint32(full[0] + 1),
        "clip.vision.attention.layer_norm_epsilon": np.float32(1e-6),
    }


def _qwen3_keys(model: Model) -> Metadata:
    vision = model.config.vision_config
    _check_activation(vision, "gelu_pytorch_tanh")
    deep = np.isin(np.arange(vision.depth), vision.deepstack_visual_indexes)
    return _qwen_keys(model) | {
        "clip.projector_type": "qwen3vl_merger",
        "clip.use_gelu": True,
        "clip.vision.spatial_merge_size": np.uint32(vision.spatial_merge_size),
        "clip.vision.attention.layer_norm_epsilon": np.float32(model.module.config.rms_norm_eps),
        "clip.vision.is_deepstack_layers": deep,
    }


def _check_activation(vision, wanted: str) -> None:
    if vision.hidden_act != wanted:
        raise ValueError(
            f"vision_config.hidden_act={vision.hidden_act!r}: llama.cpp's tower has {wanted!r} only"
        )


# The tensors of a family and its keys.
_FAMILIES = {
    "qwen2_5_vl": (_qwen2_5_parts, _qwen2_5_keys),
    "qwen3_vl": (_qwen3_parts, _qwen3_keys),
    "gemma3": (_siglip_parts, _gemma3_keys),
    "idefics3": (_siglip_parts, _idefics3_keys),
    "smolvlm": (_siglip_parts, _idefics3_keys),
}


def check_mmproj(model: Model) -> None:
    """Raises ValueError for a tower that cannot be written."""
    if model.config.model_type not in _FAMILIES:
        raise ValueError(
            f"{model.config.model_type}: its projector cannot be written for llama.cpp; jaxtune writes those of "
            f"{', '.join(_FAMILIES)}. Save the model with save_pretrained_merged"
        )
    _FAMILIES[model.config.model_type][1](model)


def save_mmproj(
    model: Model,
    path: str | Path,
    *,
    dtype: Dtype = "f16",
    base: Base = "dequantised",
    name: str | None = None,
) -> None:
    """Write the tower and projector, adapters merged in.

    Args:
        model: a vision-language model with its processor.
        path: the file to make; one that is there is replaced.
        dtype: of matrices; vectors are f32, and so is what cuts patches unless all is f16.
        base: what adapters are merged onto, as in `save_merged`.
        name: for general.name and its kin; by default the last part of the model's path or hub id.

    Raises:
        ValueError: a family that llama.cpp's converter does not know, a tower that its code cannot compute, or weights
            with NaN or infinity. OSError: the disk is too full. In every case no file is made.
    """
    check_base(model, base)
    check_mmproj(model)
    parts_of, keys = _FAMILIES[model.config.model_type]
    parts = dict(parts_of(model))
    kind, number = _KINDS[dtype]
    entries = [
        TensorEntry(tensor, _shape(model, part, tensor), _kind(tensor, part, kind, model))
        for tensor, part in parts.items()
    ]
    metadata: Metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    name = name or model.name_or_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    metadata |= identity(name, sum(int(np.prod(entry.shape)) for entry in entries))
    metadata["general.file_type"] = np.uint32(number)
    metadata |= keys(model)
    metadata["general.quantization_version"] = QUANTIZATION_VERSION
    with GgufWriter(path, metadata, entries) as writer:
        for entry in entries:
            part = parts[entry.name]
            values = merged_tensor(model, base, part.name, part.slot, part.leaf)
            check_finite(part.name, values)
            values = (values if part.take is None else part.take(values)) + np.float32(part.shift)
            writer.write(entry.name, np.ascontiguousarray(values.astype(_NUMPY[entry.kind])).view(np.uint8))


def _shape(model: Model, part: Part, tensor: str) -> tuple[int, ...]:
    shape = tensor_shape(model, part.slot, part.leaf)
    if tensor.startswith(_PATCHES) and part.take is not None:
        return shape[0], shape[1], *shape[3:]
    return shape if part.take is None else (shape[0] // 3, *shape[1:])


def _kind(tensor: str, part: Part, kind: Kind, model: Model) -> Kind:
    """Matrices have the file's type."""
    if tensor == _INPUT_PROJECTION:  # llama.cpp multiplies by nothing else there
        return Kind.F16
    vector = len(tensor_shape(model, part.slot, part.leaf)) < 2
    exact = ".embeddings." in part.name or tensor == "v.position_embd.weight"
    exact |= tensor.startswith(_PATCHES) and kind != Kind.F16
    return Kind.F32 if vector or exact else kind
