"""Mistral: Llama with one sliding window for all layers."""

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
    "sliding_window",
}


def config(hf) -> DecoderConfig:
    """transformers.MistralConfig -> DecoderConfig."""
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
        windows=(hf.sliding_window,) * hf.num_hidden_layers,
        hidden_act=hf.hidden_act,
    )
