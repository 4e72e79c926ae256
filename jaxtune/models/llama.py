"""Llama 1 to 3.x and what shares its architecture: SmolLM2, TinyLlama, Yi, CodeLlama."""

from jaxtune.models.decoder import COMMON_FIELDS, DecoderConfig, read_config

READ = COMMON_FIELDS | {"head_dim", "attention_bias", "mlp_bias"}


def config(hf) -> DecoderConfig:
    """transformers.LlamaConfig -> DecoderConfig."""
    return read_config(
        hf,
        windows=(None,) * hf.num_hidden_layers,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
