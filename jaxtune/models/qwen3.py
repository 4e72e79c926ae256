"""Qwen3 (dense): RMS norms on the heads of q and k, head_dim of its own, no bias unless the config asks."""

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.models.decoder import DecoderConfig, read_config
from jaxtune.models.qwen2 import READ as QWEN2_READ
from jaxtune.models.qwen2 import windows

READ = QWEN2_READ | {"head_dim", "attention_bias"}
GGUF = GgufFamily("qwen3")


def config(hf) -> DecoderConfig:
    """transformers.Qwen3Config -> DecoderConfig."""
    bias = hf.attention_bias
    return read_config(hf, windows=windows(hf), qkv_bias=bias, output_bias=bias, qk_norm=True)
