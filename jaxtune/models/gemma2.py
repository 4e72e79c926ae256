"""Gemma 2: norms around attention and MLP, layers with a window in turn with others, softcapped scores and logits."""

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.models.decoder import COMMON_FIELDS, DecoderConfig, read_config
from jaxtune.models.qwen2 import windows

READ = COMMON_FIELDS - {"hidden_act"} | set(
    """head_dim hidden_activation query_pre_attn_scalar sliding_window layer_types attention_bias
    attn_logit_softcapping final_logit_softcapping""".split()
)
GGUF = GgufFamily("gemma2", activation="gelu_pytorch_tanh", window_period=2, large=46)


def config(hf) -> DecoderConfig:
    """transformers.Gemma2Config -> DecoderConfig."""
    return read(hf, attention_softcap=hf.attn_logit_softcapping)


def read(hf, **differences) -> DecoderConfig:
    """What Gemma 2 and 3 share; `differences` is what they do not."""
    if hf.sliding_window is None and "sliding_attention" in hf.layer_types:
        raise ValueError(
            "sliding_window=None, and layer_types has sliding_attention: how many tokens do these see?"
        )
    return read_config(
        hf,
        windows=windows(hf),
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        query_scale=(hf.head_dim / hf.query_pre_attn_scalar) ** 0.5,
        logit_softcap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
        plus_one_norms=True,
        sandwich_norms=True,
        **differences,
    )
