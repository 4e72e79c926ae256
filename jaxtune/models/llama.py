"""Llama 1 to 3.x and what shares its architecture: SmolLM2, TinyLlama, Yi, CodeLlama."""

from jaxtune.models import rope
from jaxtune.models.decoder import DecoderConfig

READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
}


def config(hf) -> DecoderConfig:
    """transformers.LlamaConfig -> DecoderConfig."""
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope=rope.from_config(hf),
        windows=(None,) * hf.num_hidden_layers,
        hidden_act=hf.hidden_act,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
