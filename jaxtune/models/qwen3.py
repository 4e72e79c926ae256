"""Qwen3 (dense): RMS norms on the heads of q and k, head_dim of its own, no bias unless the config asks."""

from jaxtune.models import rope
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.qwen2 import READ as QWEN2_READ
from jaxtune.models.qwen2 import windows

READ = QWEN2_READ | {"head_dim", "attention_bias"}


def config(hf) -> DecoderConfig:
    """transformers.Qwen3Config -> DecoderConfig."""
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
        windows=windows(hf),
        hidden_act=hf.hidden_act,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        qk_norm=True,
    )
