"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window on the upper layers where the config asks for it."""

from jaxtune.models import rope
from jaxtune.models.decoder import DecoderConfig

READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
}


def windows(hf) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` tokens where layer_types says so."""
    sliding = {"sliding_attention": hf.sliding_window, "full_attention": None}
    unknown = set(hf.layer_types) - sliding.keys()
    if unknown:
        raise ValueError(f"layer_types holds {sorted(unknown)}; jaxtune has {', '.join(sliding)}")
    return tuple(sliding[kind] for kind in hf.layer_types)


def config(hf) -> DecoderConfig:
    """transformers.Qwen2Config -> DecoderConfig."""
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        rope=rope.from_config(hf),
        windows=windows(hf),
        hidden_act=hf.hidden_act,
        qkv_bias=True,
    )
