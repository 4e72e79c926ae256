"""Mistral: Llama with one sliding window for all layers."""

from jaxtune.models import llama
from jaxtune.models.decoder import COMMON_FIELDS, DecoderConfig, read_config

READ = COMMON_FIELDS | {"head_dim", "sliding_window"}
GGUF = llama.GGUF


def config(hf) -> DecoderConfig:
    """transformers.MistralConfig -> DecoderConfig."""
    return read_config(hf, windows=(hf.sliding_window,) * hf.num_hidden_layers)
