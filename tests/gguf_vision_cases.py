"""Small vision-language models whose every byte is known; tests/golden/gguf_vision.json holds the summaries of what
llama.cpp's converter made of them (tests/golden/make_gguf_vision.py made it)."""

import zlib
from pathlib import Path

import numpy as np
import tiny_vision
import torch
from gguf import GGUFReader

CASES = {"Qwen2.5-VL-tiny-Instruct": "qwen2_5_vl", "qwen3-vl": "qwen3_vl"}


def write_case(name: str, folder: Path) -> Path:
    """The Hugging Face folder of a case."""
    model = tiny_vision.make_model(tiny_vision.make_config(CASES[name]))
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            count = np.arange(values.numel(), dtype=np.uint64)
            numbers = (count * 2654435761 + zlib.crc32(parameter.encode())) % 997
            values.copy_(torch.from_numpy((numbers / 997 - 0.5).astype(np.float32)).reshape(values.shape))
    return tiny_vision.save(model, folder)


def kinds(path: Path) -> dict[str, str]:
    """The type of each tensor."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
