"""Qwen2.5-VL (arXiv 2502.13923): Qwen2 with M-RoPE, and a vision transformer whose layers mostly attend in windows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.kernels.attention import rows, segment_attention, window_attention
from jaxtune.kernels.keep import keep
from jaxtune.models import qwen2
from jaxtune.models.decoder import (
    ACTIVATIONS,
    MLP,
    Decoder,
    DecoderConfig,
    Segment,
    read_config,
    run_segment,
    segments,
)
from jaxtune.models.layers import Frozen, Linear, RMSNorm, Shape
from jaxtune.models.remat import Remat
from jaxtune.models.rope import rotate
from jaxtune.models.text_side import TextFamily
from jaxtune.models.vision_lm import Dense, VisionLM

# config.json: its own fields, and those of its parts.
READ = frozenset(
    """text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id
    tie_word_embeddings""".split()
)
PARTS = {
    "text_config": qwen2.READ,
    "vision_config": frozenset(
        """depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size
        temporal_patch_size tokens_per_second window_size out_hidden_size fullatt_block_indexes
        rope_parameters""".split()
    ),
}
TEXT = TextFamily("qwen2", qwen2.READ)
# The decoder; its tower goes into a file of its own (export.mmproj).
GGUF = GgufFamily("qwen2vl", biases=qwen2.GGUF.biases, own_head_dim=False)
# Names in published checkpoints, (pattern, name here); transformers' modules have the names on the right.
RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)


@dataclass(frozen=True)
class TowerConfig:
    """What the mathematics needs of vision_config. full: numbers of the layers that see a whole image."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_size: int
    patch: tuple[int, int, int, int]  # channels, frames, height, width
    merge: int
    hidden_act: str
    theta: float
    full: frozenset[int]
    mlp_bias: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def tower_config(vision) -> TowerConfig:
    """transformers.Qwen2_5_VLVisionConfig, or Qwen3VLVisionConfig, whose layers all see a whole image."""
    rope = vision.rope_parameters
    if rope["rope_type"] != "axial":
        raise ValueError(f"vision_config.rope_parameters has rope_type={rope['rope_type']!r} (only 'axial')")
    if vision.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"vision_config.hidden_act={vision.hidden_act!r}; jaxtune has {', '.join(ACTIVATIONS)}"
        )
    return TowerConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.depth,
        num_heads=vision.num_heads,
        out_size=vision.out_hidden_size,
        patch=(vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
        merge=vision.spatial_merge_size,
        hidden_act=vision.hidden_act,
        theta=rope["rope_theta"],
        full=frozenset(getattr(vision, "fullatt_block_indexes", range(vision.depth))),
    )


class Sight(NamedTuple):
    """What every layer of the tower needs beside x: rotary tables float32 [1, P, 1, h/2], who sees whom
    (`images.qwen`), the dropout key."""

    cos: jax.Array
    sin: jax.Array
    images: dict[str, jax.Array]
    key: jax.Array | None


class PatchProjection(nnx.Module):
    """A convolution whose kernel is one patch: a matrix product of patches [.., 3·2·p²]."""

    def __init__(self, config: TowerConfig, dtype, *, bias: bool = False):
        self.weight = Frozen(Shape((config.hidden_size, *config.patch), dtype))
        self.bias = Frozen(Shape((config.hidden_size,), dtype)) if bias else None

    def __call__(self, pixels: jax.Array, dtype) -> jax.Array:
        weight = self.weight[...].astype(dtype)
        y = pixels.astype(dtype) @ weight.reshape(len(weight), -1).T
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class PatchEmbed(nnx.Module):
    def __init__(self, config: TowerConfig, dtype, *, bias: bool = False):
        self.proj = PatchProjection(config, dtype, bias=bias)


class Attention(nnx.Module):
    def __init__(self, config: TowerConfig, full: bool, dtype):
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width, bias=True, dtype=dtype)
        self.proj = Linear(width, width, bias=True, dtype=dtype)
        self.num_heads, self.full = config.num_heads, full

    def __call__(self, x: jax.Array, sight: Sight) -> jax.Array:
        made = keep(self.qkv(x, sight.key), "qkv")
        made = made.reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = (made[:, :, i] for i in range(3))  # [1, P, H, h]
        q, k = (rotate(y.astype(jnp.float32), sight.cos, sight.sin).astype(y.dtype) for y in (q, k))
        if self.full:
            out = segment_attention(q, k, v, sight.images["segments"], sight.images["starts"])
        else:
            out = window_attention(q, k, v, sight.images["windows"], sight.images["places"])
        return self.proj(out.reshape(x.shape), sight.key)


class Block(nnx.Module):
    def __init__(self, config: TowerConfig, full: bool, dtype):
        self.norm1 = RMSNorm(config.hidden_size, 1e-6, dtype=dtype)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6, dtype=dtype)
        self.attn = Attention(config, full, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, sight: Sight, kv: None = None):
        x = keep(x, "block_input")
        x = keep(x + self.attn(self.norm1(x), sight), "residual")
        return x + self.mlp(self.norm2(x), sight.key), None


class Gelu(nnx.Module):
    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return ACTIVATIONS["gelu"](x)


class PatchMerger(nnx.Module):
    """m x m patches into one token of the decoder."""

    def __init__(self, config: TowerConfig, dtype):
        inner = config.hidden_size * config.merge**2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6, dtype=dtype)
        self.mlp = nnx.List(
            [
                Linear(inner, inner, bias=True, dtype=dtype),
                Gelu(),
                Linear(inner, config.out_size, bias=True, dtype=dtype),
            ]
        )

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[P, width] -> [P/m², D]."""
        x = self.ln_q(x).reshape(-1, self.mlp[0].in_features)
        for layer in self.mlp:
            x = layer(x, key)
        return x


class Tower(nnx.Module):
    def __init__(self, config: TowerConfig, plan: Sequence[Segment], dtype):
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nnx.List(
            nnx.List(Block(config, s.first + j in config.full, dtype) for j in range(s.period)) for s in plan
        )
        self.merger = PatchMerger(config, dtype)
        self.config, self.dtype = config, dtype

    def __call__(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, None]:
        """The arrays of `images.qwen.Qwen2_5VLImages` -> [P/m², D], in the order of the text."""
        x = self.patch_embed.proj(images["pixels"], self.dtype)[None]  # [1, P, width]
        cos, sin = patch_tables(self.config, images["positions"])
        for i, segment in enumerate(self.blocks):
            inner = None if key is None else jax.random.fold_in(key, i)
            x, _ = run_segment(segment, x, Sight(cos, sin, images, inner), None, remat)
        merged = self.merger(x[0], None if key is None else jax.random.fold_in(key, len(self.blocks)))
        return rows(merged, images["restore"]), None


def patch_tables(config: TowerConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32 [1, P, 1, h/2] of patches at (row, column) int32 [P, 2]: the first half of the pairs turns
    with the row, the second with the column."""
    half = config.head_dim // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    freq = np.float32(1) / np.power(np.float32(config.theta), exponent)
    angles = positions[:, :, None].astype(jnp.float32) * freq
    angles = angles.reshape(1, len(positions), 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


class VisionBody(nnx.Module):
    def __init__(self, visual: nnx.Module, language_model: Decoder):
        self.visual, self.language_model = visual, language_model

    def features(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, jax.Array | None]:
        return self.visual(images, key=key, remat=remat)


def config(hf) -> DecoderConfig:
    """transformers.Qwen2_5_VLConfig -> that of its decoder."""
    text = hf.text_config
    decoder = read_config(text, windows=qwen2.windows(text), qkv_bias=True)
    turns = decoder.rope.scaling | {"mrope_interleaved": False}
    rope = replace(decoder.rope, scaling={"mrope_section": [16, 24, 24]} | turns)
    return replace(decoder, rope=rope, tie_word_embeddings=hf.tie_word_embeddings)


def module(hf, dtype, dense: Dense) -> VisionLM:
    """The model of shapes; see `models.build`."""
    decoder, tower = config(hf), tower_config(hf.vision_config)
    text = dense("model.language_model.layers", len(decoder.windows))
    plan = tuple(segments(list(zip(decoder.windows, text, strict=True))))
    vision = dense("model.visual.blocks", tower.num_layers)
    blocks = tuple(segments([(i in tower.full, plain) for i, plain in enumerate(vision)]))
    body = VisionBody(Tower(tower, blocks, dtype), Decoder(decoder, plan, dtype))
    return VisionLM(decoder, body, dtype, plan, stacks=[("visual.blocks", blocks)])
