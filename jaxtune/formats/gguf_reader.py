"""A GGUF model under Hugging Face names: config, weights in HF orientation, generation settings.

llama.cpp's converter interleaves the two rotary halves of q and k for architecture "llama" (which includes
Mistral), and adds 1 to Gemma's norms; reading undoes that. Everything else is stored as it is.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.formats.gguf_config import generation_config, hf_config
from jaxtune.formats.gguf_file import GgufFile, open_parts
from jaxtune.formats.gguf_names import (
    INTERLEAVED,
    ROPE_FACTORS,
    hf_name,
    join_rotary_halves,
    norm_shift,
    rotary_heads,
)
from jaxtune.formats.safetensors_reader import TensorInfo


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
        self.typed_metadata = parts[0].typed_metadata
        self._parts: dict[str, GgufFile] = {name: part for part in parts for name in part.tensors}
        shapes = {name: part.tensors[name].shape for name, part in self._parts.items()}
        # The per-frequency divisors of Llama 3.x's RoPE, [head_dim/2]; None for a model without.
        self.rope_factors: np.ndarray | None = (
            self._parts[ROPE_FACTORS].read(ROPE_FACTORS) if ROPE_FACTORS in self._parts else None
        )
        self.config: dict[str, Any] = hf_config(self.metadata, shapes, self.rope_factors)
        self.generation_config = generation_config(self.metadata)
        self._architecture = self.metadata["general.architecture"]
        self._gguf_names = {
            _hf_name(name, self._architecture, path): name for name in self._parts if name != ROPE_FACTORS
        }

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
        if shift := norm_shift(name, self._architecture):
            return values - np.float32(shift)
        if self._architecture in INTERLEAVED:
            config = self.config
            heads = rotary_heads(name, config["num_attention_heads"], config["num_key_value_heads"])
            if heads:
                return join_rotary_halves(values, heads)
        return values


def _hf_name(name: str, architecture: str, path: str | Path) -> str:
    try:
        return hf_name(name, architecture)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: tensor {name!r} belongs to no layer of the supported families") from None
