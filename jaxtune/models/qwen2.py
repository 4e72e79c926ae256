"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window on the upper layers where the config asks for it."""

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.models.decoder import COMMON_FIELDS, DecoderConfig, read_config

READ = COMMON_FIELDS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
GGUF = GgufFamily("qwen2", biases=frozenset({"attn_q", "attn_k", "attn_v"}), own_head_dim=False)


def windows(hf) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` tokens where layer_types says so."""
    sliding = {"sliding_attention": hf.sliding_window, "full_attention": None}
    unknown = set(hf.layer_types) - sliding.keys()
    if unknown:
        raise ValueError(f"layer_types holds {sorted(unknown)}; jaxtune has {', '.join(sliding)}")
    return tuple(sliding[kind] for kind in hf.layer_types)


def config(hf) -> DecoderConfig:
    """transformers.Qwen2Config -> DecoderConfig."""
    return read_config(hf, windows=windows(hf), qkv_bias=True)
