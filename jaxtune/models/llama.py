"""Llama 1 to 3.x and what shares its architecture: SmolLM2, TinyLlama, Yi, CodeLlama."""

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.models.decoder import COMMON_FIELDS, DecoderConfig, read_config

READ = COMMON_FIELDS | {"head_dim", "attention_bias", "mlp_bias"}
_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GGUF = GgufFamily("llama", ("vocab_size", "rope.dimension_count"), frozenset(_BIASES), rope_factors=True)


def config(hf) -> DecoderConfig:
    """transformers.LlamaConfig -> DecoderConfig."""
    return read_config(
        hf,
        windows=(None,) * hf.num_hidden_layers,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
