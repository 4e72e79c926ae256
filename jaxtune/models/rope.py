"""Rotary position embedding (arXiv 2104.09864) and its context extensions, with transformers' numbers."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies of one model.

    kind: one of KINDS. head_dim: rotated dimensions. theta: base. max_positions: the model's context in tokens.
    scaling: the remaining entries of config.json's rope parameters.
    """

    kind: str
    head_dim: int
    theta: float
    max_positions: int
    scaling: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope_type={self.kind!r} is not supported; jaxtune has {', '.join(KINDS)}")
        if self.scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor={self.scaling['partial_rotary_factor']} is not supported (only 1.0)"
            )


def parameters_of(config, layer_type: str = "full_attention") -> dict[str, Any]:
    """The config's own `rope_parameters` (transformers' current name of rope_theta and rope_scaling), of one kind of
    layers where it has some for each."""
    config.standardize_rope_params()
    return config.rope_parameters.get(layer_type, config.rope_parameters)


def from_config(config, layer_type: str = "full_attention") -> Rope:
    """Reads `parameters_of` a config."""
    parameters = dict(parameters_of(config, layer_type))
    kind, theta = parameters.pop("rope_type"), parameters.pop("rope_theta")
    parameters.pop("type", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Rope(kind, head_dim, theta, config.max_position_embeddings, parameters)


def _base_frequencies(rope: Rope) -> np.ndarray:
    exponent = np.arange(0, rope.head_dim, 2, dtype=np.float32) / np.float32(rope.head_dim)
    return np.float32(1) / np.power(np.float32(rope.theta), exponent)


def _llama3(rope: Rope) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    s, freq = rope.scaling, _base_frequencies(rope)
    context = s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * freq / s["factor"] + smooth * freq
    stretched = np.where(wavelength > context / low, freq / s["factor"], freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blended, stretched).astype(np.float32)


def _yarn(rope: Rope) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolates the slow dimensions and scales the attention."""
    s, dim = rope.scaling, rope.head_dim
    original = s["original_max_position_embeddings"]
    factor = s.get("factor") or rope.max_positions / original

    def dimension(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(s.get("beta_fast") or 32), dimension(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    freq = _base_frequencies(rope)
    mixed = (freq / factor * (1 - keep) + freq * keep).astype(np.float32)

    def mscale(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = s.get("attention_factor")
    if attention is None and s.get("mscale") and s.get("mscale_all_dim"):
        attention = mscale(s["mscale"]) / mscale(s["mscale_all_dim"])
    return mixed, mscale(1.0) if attention is None else attention


def frequencies(rope: Rope, positions: jax.Array) -> tuple[jax.Array, float]:
    """(inverse frequencies float32 [h/2], factor of cos and sin). Only "dynamic" depends on the positions."""
    match rope.kind:
        case "linear":
            return jnp.asarray(_base_frequencies(rope) / np.float32(rope.scaling["factor"])), 1.0
        case "llama3":
            return jnp.asarray(_llama3(rope)), 1.0
        case "yarn":
            mixed, attention = _yarn(rope)
            return jnp.asarray(mixed), attention
        case "dynamic":  # NTK-aware: the base grows with the sequence once it is longer than the context
            length = jnp.maximum(positions.max() + 1, rope.max_positions).astype(jnp.float32)
            factor, dim = rope.scaling["factor"], rope.head_dim
            base = rope.theta * (factor * length / rope.max_positions - (factor - 1)) ** (dim / (dim - 2))
            return 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim), 1.0
        case _:
            return jnp.asarray(_base_frequencies(rope)), 1.0


def _axes(rope: Rope) -> np.ndarray:
    """Which of the three positions (time, height, width) turns each pair of dimensions, int [h/2]: in three runs
    (Qwen2-VL, arXiv 2409.12191, §2.1), or taking turns while they last (Qwen3-VL)."""
    sections = rope.scaling["mrope_section"]
    if not rope.scaling.get("mrope_interleaved", False):
        return np.repeat(np.arange(len(sections)) % 3, sections)
    axes = np.zeros(rope.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def tables(rope: Rope, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, h/2] in `dtype` for int32 positions [B, T], or [B, T, 3]; angles are float32."""
    freq, scale = frequencies(rope, positions)
    turning = positions[..., None] if positions.ndim == 2 else positions[..., _axes(rope)]
    angles = turning[..., None, :].astype(jnp.float32) * freq
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, h], whose first and second half form the pairs."""
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
