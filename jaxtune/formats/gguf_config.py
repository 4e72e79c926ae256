"""Rebuild a transformers config from GGUF metadata (architectures llama, qwen2, qwen3, gemma2 and gemma3).

Mistral models are written with architecture "llama". GGUF does not say so; without a sliding window the two
are the same mathematics, and with one the config becomes Mistral's.
"""

from typing import Any

import numpy as np

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}
# Layers of Gemma's largest models, whose scores are scaled by another number than head_dim; llama.cpp's rule.
_GEMMA_LARGE = {"gemma2": 46, "gemma3": 62}
_KNOWN_LLAMA3 = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))  # Llama 3.1/3.3 and 3.2
# What changes the mathematics and has no counterpart in the families above. Value: the harmless ones.
_REFUSED = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
}


def hf_config(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> dict:
    """The config.json that the GGUF's model had, as a dict for AutoConfig.for_model.

    Args:
        metadata: the file's keys.
        shapes: GGUF tensor name -> shape, for what only the tensors tell (tied head, biases, vocabulary).
        rope_factors: the "rope_freqs.weight" tensor [head_dim/2] of Llama 3.x, or None.

    Raises:
        ValueError: an architecture or a key that jaxtune does not support; name and value are given.
    """
    arch = metadata.get("general.architecture")
    if arch not in MODEL_TYPES:
        raise ValueError(
            f"general.architecture is {arch!r}; jaxtune reads GGUF files of {', '.join(MODEL_TYPES)} "
            "(Mistral and SmolLM files say llama)"
        )
    own = {
        key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")
    }
    softcaps = {"attn_logit_softcapping", "final_logit_softcapping"} if arch in _GEMMA_LARGE else set()
    for key, harmless in _REFUSED.items():
        if key not in softcaps and own.get(key, harmless[0]) not in harmless:
            raise ValueError(f"{arch}.{key} = {own[key]!r} is not supported by jaxtune's {arch} model")
    heads = _one(own, "attention.head_count")
    head_dim = own.get(
        "attention.key_length", own.get("rope.dimension_count", own["embedding_length"] // heads)
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{arch}.{key} = {own[key]} differs from the head dimension {head_dim}: not supported"
            )
    window = own.get("attention.sliding_window")
    model_type = "mistral" if arch == "llama" and window else MODEL_TYPES[arch]
    config = {
        "model_type": model_type,
        "architectures": [f"{_CLASSES[model_type]}ForCausalLM"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": _one(own, "feed_forward_length"),
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": _one(own, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        **_rope(own, arch, rope_factors),
        **_token_ids(metadata),
    }
    if arch in _GEMMA_LARGE:
        return _gemma(config, own, arch)
    return config | _family_fields(model_type, window, shapes)


def _gemma(config: dict[str, Any], own: dict[str, Any], arch: str) -> dict[str, Any]:
    """What Gemma's config has otherwise; which layers have a window is its default."""
    if "attention.sliding_window_pattern" in own:
        raise ValueError(
            f"{arch}.attention.sliding_window_pattern is not supported; jaxtune has {arch}'s own"
        )
    large = config["num_hidden_layers"] == _GEMMA_LARGE[arch]
    del config["hidden_act"]
    config["hidden_activation"] = "gelu_pytorch_tanh"
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    )
    config["sliding_window"] = own.get("attention.sliding_window", 4096)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if arch == "gemma2" else {}
    caps |= {"final_logit_softcapping": 0.0} if arch == "gemma3" else {}
    config |= {key: _decimal(own.get(key, usual)) or None for key, usual in caps.items()}
    if arch == "gemma3":
        config["rope_local_base_freq"] = _decimal(own.get("rope.freq_base_swa", 10000.0))
        if "attention.sliding_window" not in own:
            config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return config


def _family_fields(model_type: str, window: int | None, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What only some families have: sliding window and biases, the latter known by their tensors."""
    biases = {"attention_bias": "blk.0.attn_q.bias" in shapes}
    if model_type == "mistral":
        return {"sliding_window": window}
    if model_type == "llama":
        return biases | {"mlp_bias": "blk.0.ffn_down.bias" in shapes}
    fields = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    return fields | (biases if model_type == "qwen3" else {})


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Token ids for generation; a separate end-of-turn id joins the end-of-sequence id."""
    config: dict[str, Any] = dict(_token_ids(metadata))
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if len(unique) > 1:
        config["eos_token_id"] = unique
    return config


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {hf: metadata.get(f"tokenizer.ggml.{kind}_token_id") for hf, kind in kinds.items()}
    return {f"{hf}_token_id": value for hf, value in found.items() if value is not None}


def _one(own: dict[str, Any], key: str, default: int | None = None) -> int:
    """A number that some architectures store per layer; all layers must agree."""
    value = own.get(key, default) if default is not None else own[key]
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"{key} differs from layer to layer ({sorted(set(value))}): not supported")
        return value[0]
    return value


def _decimal(value: float) -> float:
    """The decimal that was written before it became float32: 9.999999747e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope(own: dict[str, Any], arch: str, factors: np.ndarray | None) -> dict[str, Any]:
    theta = _decimal(own.get("rope.freq_base", 10000.0))
    kind = own.get("rope.scaling.type", "linear" if own.get("rope.scale_linear", 1.0) != 1.0 else "none")
    factor = _decimal(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)))
    scaling: dict[str, Any] | None = None
    if factors is not None and np.any(factors != 1.0):
        scaling = llama3_scaling(factors, theta)
    elif kind == "linear" and factor not in (0.0, 1.0):
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
        for field in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{field}" in own:
                scaling[field] = _decimal(own[f"rope.scaling.yarn_{field}"])
        if "rope.scaling.attn_factor" in own:  # llama.cpp multiplies YaRN's usual factor by it
            usual = 0.1 * float(np.log(factor)) + 1.0
            scaling["attention_factor"] = usual * float(own["rope.scaling.attn_factor"])
    elif kind not in ("none", "linear"):
        raise ValueError(
            f"{arch}.rope.scaling.type = {kind!r} is not supported; jaxtune knows none, linear, yarn"
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Recover Llama 3.x's rope_scaling from the per-frequency divisors that GGUF stores instead.

    The divisor is 1 for wavelengths below original/high, `factor` above original/low, and in between 1 over
    a mix that is linear in 1/wavelength. Only the two ratios matter, so low_freq_factor = 1 loses nothing.

    Args:
        factors: [head_dim/2] float32.
        theta: RoPE base.

    Raises:
        ValueError: no llama3 scaling gives these divisors.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    for known in (*_KNOWN_LLAMA3, _fit_llama3(factors, wavelength)):
        factor, low, high, original = known
        if np.allclose(_divisors(wavelength, *known), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"rope_freqs.weight is no llama3 RoPE scaling (divisors from {factors.min()} to {factors.max()}, "
        f"base {theta}); load the original checkpoint instead"
    )


def _divisors(wavelength: np.ndarray, factor: float, low: float, high: float, original: float) -> np.ndarray:
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _fit_llama3(factors: np.ndarray, wavelength: np.ndarray) -> tuple[float, float, float, int]:
    factor = _decimal(factors.max())
    smooth = (1.0 / factors.astype(np.float64) - 1.0 / factor) / (1.0 - 1.0 / factor)
    inside = (smooth > 1e-3) & (smooth < 1.0 - 1e-3)
    slope, intercept = 4.0 / 3.0 * wavelength[-1], 1.0 / 3.0
    if inside.sum() >= 2:  # smooth = slope / wavelength - intercept
        slope, intercept = np.polyfit(1.0 / wavelength[inside], smooth[inside], 1) * (1, -1)
    elif inside.any():  # one point leaves the span open: take Llama's, high = 4 low
        slope = (smooth[inside][0] + intercept) * wavelength[inside][0]
    return factor, 1.0, round(1.0 + 1.0 / intercept, 4), max(1, round(slope / intercept))
