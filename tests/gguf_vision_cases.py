"""Small vision-language models whose every byte is known; tests/golden/gguf_vision.json holds the summaries of what
llama.cpp's converter made of them (tests/golden/make_gguf_vision.py made it)."""

import zlib
from pathlib import Path

import numpy as np
import tiny_siglip
import tiny_vision
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

CASES = {
    "Qwen2.5-VL-tiny-Instruct": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "gemma-3-tiny-it": "gemma3",
    "SmolVLM2": "smolvlm",
}
# Gemma: llama.cpp computes with head_dim, every sixth layer sees everything, and the converter cuts rows off without a
# token. SmolVLM: the converter wants the published name of the language part.
TEXT = {
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 4, "vocab_size": 262},
    "smolvlm": {"architectures": ["VLlama3ForCausalLM"]},
}


def write_case(name: str, folder: Path) -> Path:
    """The Hugging Face folder of a case."""
    family = CASES[name]
    tiny = tiny_vision if family.startswith("qwen") else tiny_siglip
    model = tiny.make_model(tiny.make_config(family, text_config=TEXT.get(family, {})))
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            count = np.arange(values.numel(), dtype=np.uint64)
            numbers = (count * 2654435761 + zlib.crc32(parameter.encode())) % 997
            values.copy_(torch.from_numpy((numbers / 997 - 0.5).astype(np.float32)).reshape(values.shape))
    tiny.save(model, folder)
    if family == "gemma3":  # as published, which the converter wants
        file = folder / "model.safetensors"
        weights = load_file(file)
        named = {
            name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()
        }
        save_file(named, file, {"format": "pt"})
    return folder


def kinds(path: Path) -> dict[str, str]:
    """The type of each tensor."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
