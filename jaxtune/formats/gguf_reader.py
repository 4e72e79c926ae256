"""A GGUF model under Hugging Face names: config, weights in HF orientation, generation settings.

llama.cpp's converter interleaves the two rotary halves of q and k for architecture "llama" (which includes
Mistral); reading undoes that. Norm weights, biases and the other architectures are stored as they are.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.formats.gguf_config import generation_config, hf_config
from jaxtune.formats.gguf_file import GgufFile, open_parts
from jaxtune.formats.safetensors_reader import TensorInfo

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufModel:
    """A .gguf file (or all parts of a split one) as a checkpoint.

    Raises:
        ValueError: damaged file, unsupported architecture, or a tensor with no counterpart (its name is
        given).
    """

    def __init__(self, path: str | Path):
        parts = open_parts(path)
        self.path = Path(path)
        self.metadata: dict[str, Any] = parts[0].metadata
        self._parts: dict[str, GgufFile] = {name: part for part in parts for name in part.tensors}
        shapes = {name: part.tensors[name].shape for name, part in self._parts.items()}
        factors = self._parts[_ROPE_FACTORS].read(_ROPE_FACTORS) if _ROPE_FACTORS in self._parts else None
        self.config: dict[str, Any] = hf_config(self.metadata, shapes, factors)
        self.generation_config = generation_config(self.metadata)
        self._gguf_names = {hf_name(name, path): name for name in self._parts if name != _ROPE_FACTORS}

    def names(self) -> list[str]:
        """Hugging Face weight names, in file order."""
        return list(self._gguf_names)

    def info(self, name: str) -> TensorInfo:
        """float32 and the shape that `read` will return."""
        gguf_name = self._gguf_names[name]
        tensor = self._parts[gguf_name].tensors[gguf_name]
        return TensorInfo(np.dtype(np.float32), tensor.shape, tensor.start, tensor.start + tensor.size)

    def read(self, name: str) -> np.ndarray:
        """One weight dequantised to float32 [out, in]."""
        gguf_name = self._gguf_names[name]
        values = self._parts[gguf_name].read(gguf_name)
        if self.metadata["general.architecture"] == "llama":
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
                name.split(".")[-2]
            )
            if heads:
                return join_rotary_halves(values, self.config[heads])
        return values


def join_rotary_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving: rows (h, i, half) -> (h, half, i). values: [H*h, in] or a bias [H*h]."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def hf_name(name: str, path: str | Path) -> str:
    """Hugging Face name of a GGUF tensor; ValueError for one that the supported families do not have."""
    stem, _, leaf = name.rpartition(".")
    if name.startswith("blk."):
        _, layer, kind = stem.split(".", 2)
        if kind in _BLOCK:
            return f"model.layers.{layer}.{_BLOCK[kind]}.{leaf}"
    elif stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    raise ValueError(f"{path}: tensor {name!r} belongs to no layer of the supported families")
