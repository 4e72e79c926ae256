"""Gemma 3, text: Gemma 2 with norms of q and k instead of softcaps, and another RoPE for layers with a window."""

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.models import gemma2, rope
from jaxtune.models.decoder import DecoderConfig

READ = gemma2.READ - {"attn_logit_softcapping"}  # in transformers too it has no effect
GGUF = GgufFamily("gemma3", activation="gelu_pytorch_tanh", window_period=6, large=62)


def config(hf) -> DecoderConfig:
    """transformers.Gemma3TextConfig -> DecoderConfig."""
    return gemma2.read(hf, qk_norm=True, local_rope=rope.from_config(hf, "sliding_attention"))
