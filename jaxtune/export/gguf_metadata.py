"""A transformers config as GGUF metadata: the keys, types and order of llama.cpp's own converter.

What llama.cpp cannot compute is refused here, by name and value: it would load the file and answer wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.export.gguf_format import Value
from jaxtune.export.gguf_identity import identity
from jaxtune.formats.gguf_names import GEMMA, GgufFamily
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.rope import Rope, frequencies

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Metadata = dict[str, Value]

QUANTIZATION_VERSION = np.uint32(2)
_LAST = ("general.quantization_version", "general.file_type")
# generation_config.json -> general.sampling.*, in the converter's order.
_SAMPLING = (
    ("sequence", "sequence", str),
    ("top_k", "top_k", np.int32),
    ("top_p", "top_p", np.float32),
    ("min_p", "min_p", np.float32),
    ("xtc_probability", "xtc_probability", np.float32),
    ("xtc_threshold", "xtc_threshold", np.float32),
    ("temperature", "temp", np.float32),
    ("penalty_last_n", "penalty_last_n", np.int32),
    ("repetition_penalty", "penalty_repeat", np.float32),
    ("mirostat", "mirostat", np.int32),
    ("mirostat_tau", "mirostat_tau", np.float32),
    ("mirostat_eta", "mirostat_eta", np.float32),
)


def gguf_family(config: PretrainedConfig) -> GgufFamily:
    """How llama.cpp knows a model's family; raises ValueError where it does not."""
    family = models.family(config)
    if not hasattr(family, "GGUF"):
        raise ValueError(
            f"{config.model_type} cannot be saved as GGUF: llama.cpp has no such architecture. Save it with "
            "save_pretrained_merged, for transformers or vLLM"
        )
    return family.GGUF


def check_config(config: PretrainedConfig, family: GgufFamily) -> None:
    """Raises ValueError for a config that llama.cpp's graph of the family cannot compute."""
    arch = family.architecture
    decoder = models.family(config).config(config)
    if decoder.hidden_act != family.activation:
        raise ValueError(
            f"hidden_act={decoder.hidden_act!r}: llama.cpp's {arch} has {family.activation} only"
        )
    _check_windows(config, decoder, family)
    if arch in GEMMA:
        _check_gemma(decoder, family)
    if not family.own_head_dim and decoder.num_heads * decoder.head_dim != decoder.hidden_size:
        raise ValueError(
            f"head_dim={decoder.head_dim}: llama.cpp's {arch} needs hidden_size / heads = "
            f"{decoder.hidden_size // decoder.num_heads}"
        )
    _check_rope(decoder.rope, family)


def _check_windows(config: PretrainedConfig, decoder: DecoderConfig, family: GgufFamily) -> None:
    windows, period = {window for window in decoder.windows if window is not None}, family.window_period
    if period is not None:
        wanted = [layer % period == period - 1 for layer in range(len(decoder.windows))]
        if [window is None for window in decoder.windows] != wanted:
            raise ValueError(
                f"layer_types: in llama.cpp's {family.architecture} the last of every {period} layers sees all tokens "
                "and the others a window; this model has another pattern"
            )
    elif windows and min(windows) < config.get_text_config().max_position_embeddings:
        raise ValueError(
            f"sliding_window={min(windows)}: llama.cpp's {family.architecture} has no sliding window and would attend "
            f"to everything. Set model.config.max_position_embeddings = {min(windows)} to export a model of that "
            "context, within which both are the same"
        )


def _check_gemma(decoder: DecoderConfig, family: GgufFamily) -> None:
    """What llama.cpp derives from the number of layers, or takes Gemma's value for."""
    large = len(decoder.windows) == family.large
    wanted = decoder.hidden_size // decoder.num_heads if large else decoder.head_dim
    scalar = decoder.head_dim / decoder.query_scale**2
    if not math.isclose(scalar, wanted):
        raise ValueError(
            f"query_pre_attn_scalar={scalar:g}: llama.cpp's {family.architecture} of {len(decoder.windows)} layers "
            f"always computes with {wanted}"
        )
    softcaps = decoder.attention_softcap, decoder.logit_softcap
    if decoder.local_rope is None and None in softcaps:
        raise ValueError(
            f"attn_logit_softcapping={softcaps[0]}, final_logit_softcapping={softcaps[1]}: llama.cpp's "
            f"{family.architecture} always caps both"
        )
    if decoder.local_rope is not None and decoder.local_rope.kind != "default":
        raise ValueError(
            f"rope_type={decoder.local_rope.kind!r} of sliding_attention: llama.cpp's {family.architecture} scales the "
            "RoPE of the other layers only"
        )


def _check_rope(rope: Rope, family: GgufFamily) -> None:
    if rope.kind == "dynamic":
        raise ValueError(
            "rope_type='dynamic' (a base that grows with the text) has no counterpart in GGUF; export with "
            "'linear' or 'yarn', or without scaling"
        )
    if rope.kind == "llama3" and not family.rope_factors:
        raise ValueError(
            f"rope_type='llama3': llama.cpp's {family.architecture} would not load its rope_freqs"
        )
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True} if rope.kind == "yarn" else {}
    for field, value in fixed.items():
        if rope.scaling.get(field) not in (None, value):
            raise ValueError(
                f"yarn with {field}={rope.scaling[field]}: llama.cpp's {family.architecture} always computes with "
                f"{value}"
            )


def model_metadata(
    config: PretrainedConfig,
    family: GgufFamily,
    *,
    name: str,
    parameters: int,
    generation: Mapping[str, Any],
) -> Metadata:
    """Everything but the tokenizer, with general.file_type 0 (all float32).

    Args:
        config: of the model; `check_config` has passed it.
        family: how llama.cpp knows it.
        name: folder name or last part of a hub id.
        parameters: number of weights in the file.
        generation: fields of generation_config.json.
    """
    keys: Metadata = {"general.architecture": family.architecture, "general.type": "model"}
    for field, key, kind in _SAMPLING:
        if generation.get(field) is not None:
            keys[f"general.sampling.{key}"] = kind(generation[field])
    keys |= identity(name, parameters)
    keys |= {f"{family.architecture}.{key}": value for key, value in hyperparameters(config).items()}
    keys["general.file_type"] = np.uint32(0)
    fields = models.family(config).config(config)
    extra = {"vocab_size": fields.vocab_size, "rope.dimension_count": fields.head_dim}
    if hasattr(config, "vision_config"):
        extra["n_deepstack_layers"] = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    keys |= {f"{family.architecture}.{key}": np.uint32(extra[key]) for key in family.extra_keys}
    if family.window_period is not None:
        keys |= {f"{family.architecture}.{key}": value for key, value in _softcaps_and_window(fields).items()}
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def hyperparameters(config: PretrainedConfig) -> Metadata:
    """The architecture's own keys, without its prefix."""
    decoder = models.family(config).config(config)
    if models.family(config).GGUF.architecture == "gemma2":
        return _gemma2_hyperparameters(config, decoder)
    text = config.get_text_config()
    sections = decoder.rope.scaling.get("mrope_section")
    mrope = {} if sections is None else {"rope.dimension_sections": np.array([*sections, 0], np.int32)}
    keys: Metadata = {
        "block_count": np.uint32(len(decoder.windows)),
        "context_length": np.uint32(text.max_position_embeddings),
        "embedding_length": np.uint32(decoder.hidden_size),
        "feed_forward_length": np.uint32(decoder.intermediate_size),
        "attention.head_count": np.uint32(decoder.num_heads),
        "attention.head_count_kv": np.uint32(decoder.num_kv_heads),
        **mrope,
        **rope_scaling(decoder.rope),
        "rope.freq_base": np.float32(decoder.rope.theta),
        **_local_rope(decoder),
        "attention.layer_norm_rms_epsilon": np.float32(decoder.rms_norm_eps),
    }
    if text.to_dict().get("head_dim") is not None:
        keys |= dict.fromkeys(("attention.key_length", "attention.value_length"), np.uint32(decoder.head_dim))
    return keys


def _local_rope(decoder: DecoderConfig) -> Metadata:
    theta = None if decoder.local_rope is None else decoder.local_rope.theta
    return {} if theta is None else {"rope.freq_base_swa": np.float32(theta)}


def _softcaps_and_window(decoder: DecoderConfig) -> Metadata:
    """Of the architectures that have them."""
    softcaps = {
        "attn_logit_softcapping": decoder.attention_softcap,
        "final_logit_softcapping": decoder.logit_softcap,
    }
    keys: Metadata = {key: np.float32(value) for key, value in softcaps.items() if value is not None}
    windows = [window for window in decoder.windows if window is not None]
    return keys | ({"attention.sliding_window": np.uint32(windows[0])} if windows else {})


def _gemma2_hyperparameters(config: PretrainedConfig, decoder: DecoderConfig) -> Metadata:
    theta = {} if decoder.rope.theta == 10000 else {"rope.freq_base": np.float32(decoder.rope.theta)}
    return {
        "context_length": np.uint32(config.max_position_embeddings),
        "embedding_length": np.uint32(decoder.hidden_size),
        "block_count": np.uint32(config.num_hidden_layers),
        "feed_forward_length": np.uint32(decoder.intermediate_size),
        "attention.head_count": np.uint32(decoder.num_heads),
        "attention.head_count_kv": np.uint32(decoder.num_kv_heads),
        "attention.layer_norm_rms_epsilon": np.float32(decoder.rms_norm_eps),
        "attention.key_length": np.uint32(decoder.head_dim),
        "attention.value_length": np.uint32(decoder.head_dim),
        **rope_scaling(decoder.rope),
        **theta,
    }


def rope_scaling(rope: Rope) -> Metadata:
    """The rope.scaling.* keys (without the architecture); llama3 has none, its divisors are a tensor."""
    if rope.kind == "linear":
        return {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": np.float32(rope.scaling["factor"]),
        }
    if rope.kind != "yarn":
        return {}
    s = rope.scaling
    factor = s.get("factor") or rope.max_positions / s["original_max_position_embeddings"]
    keys: Metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": np.float32(factor),
        "rope.scaling.original_context_length": np.uint32(s["original_max_position_embeddings"]),
    }
    # llama.cpp takes YaRN's usual 0.1 ln(factor) + 1 and multiplies it by this key. The converter writes
    # yarn_attn_factor instead, which llama.cpp overwrites with the usual factor.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    relative = frequencies(rope, jnp.zeros(1, jnp.int32))[1] / usual
    if not math.isclose(relative, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = np.float32(relative)
    for field in ("beta_fast", "beta_slow"):
        if s.get(field) is not None:
            keys[f"rope.scaling.yarn_{field}"] = np.float32(s[field])
    return keys


def rope_factors(rope: Rope) -> np.ndarray | None:
    """The tensor rope_freqs.weight [head_dim/2] float32 of a llama3 scaling: what divides each frequency.

    None for any other scaling. Operations and their float32 are the converter's: the same bits for Llama 3.1 to 3.3;
    for other bases torch's power may round another way.
    """
    if rope.kind != "llama3":
        return None
    s, one = rope.scaling, np.float32(1)
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / np.float32(rope.head_dim)
    wavelength = np.float32(2 * math.pi) / (one / np.float32(rope.theta) ** exponent)
    factor, low, high = (np.float32(s[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = np.float32(s["original_max_position_embeddings"])
    smooth = (context / wavelength - low) / (high - low)
    divisor = one / ((one - smooth) / factor + smooth)
    divisor = np.where(wavelength > context / low, factor, divisor)
    return np.where(wavelength < context / high, one, divisor).astype(np.float32)


def file_metadata(metadata: Metadata, file_type: int) -> Metadata:
    """The metadata of one file: version and file type come last, as llama.cpp's quantiser leaves them."""
    kept = {key: value for key, value in metadata.items() if key not in _LAST}
    return kept | dict(zip(_LAST, (QUANTIZATION_VERSION, np.uint32(file_type))))
