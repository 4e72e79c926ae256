"""SigLIP's vision transformer (arXiv 2303.15343), the tower of Gemma 3, Idefics3 and SmolVLM.

Images are squares of one size with learned positions, and every patch sees all of its image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.attention import image_attention
from jaxtune.kernels.keep import keep
from jaxtune.models.decoder import ACTIVATIONS, Segment, run_segment
from jaxtune.models.layers import Embedding, Frozen, LayerNorm, Linear, Shape, apply_together
from jaxtune.models.remat import Remat

# The fields of vision_config that `tower_config` honours.
READ = frozenset(
    """hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
    layer_norm_eps""".split()
)


@dataclass(frozen=True)
class TowerConfig:
    """What the mathematics needs of vision_config. image_size, patch_size: of a side, in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"vision_config.hidden_act={self.hidden_act!r}; jaxtune has {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise ValueError(
                f"vision_config.image_size={self.image_size}, patch_size={self.patch_size}: expected one number each"
            )

    @property
    def side(self) -> int:
        """Patches of a side of an image."""
        return self.image_size // self.patch_size


def tower_config(vision) -> TowerConfig:
    """transformers' SiglipVisionConfig, Idefics3VisionConfig or SmolVLMVisionConfig -> TowerConfig."""
    return TowerConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        num_channels=vision.num_channels,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
    )


class Sight(NamedTuple):
    """What every layer needs beside x: the dropout key."""

    key: jax.Array | None


class PatchConfig(Protocol):
    """What `PatchEmbedding` and `MLP` need of a tower's config."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_channels(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...


class PatchEmbedding(nnx.Module):
    """A convolution whose kernel is one patch, as a matrix product."""

    def __init__(self, config: PatchConfig, dtype, *, bias: bool = True):
        p = config.patch_size
        self.weight = Frozen(Shape((config.hidden_size, config.num_channels, p, p), dtype))
        self.bias = Frozen(Shape((config.hidden_size,), dtype)) if bias else None
        self.patch_size = p

    def __call__(self, pixels: jax.Array, dtype) -> jax.Array:
        """[N, channels, height, width] -> [N, S, D], row by row."""
        n, channels, height, width = pixels.shape
        p = self.patch_size
        apart = pixels.astype(dtype).reshape(n, channels, height // p, p, width // p, p)
        rows = apart.transpose(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * p * p)
        weight = self.weight[...].astype(dtype)
        y = rows @ weight.reshape(len(weight), -1).T
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class Embeddings(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        self.patch_embedding = PatchEmbedding(config, dtype)
        self.position_embedding = Embedding(config.side**2, config.hidden_size, dtype=dtype)

    def __call__(self, pixels: jax.Array, dtype) -> jax.Array:
        x = self.patch_embedding(pixels, dtype)
        return x + self.position_embedding(jnp.arange(x.shape[1]), dtype)


class Attention(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        width = config.hidden_size
        self.q_proj = Linear(width, width, bias=True, dtype=dtype)
        self.k_proj = Linear(width, width, bias=True, dtype=dtype)
        self.v_proj = Linear(width, width, bias=True, dtype=dtype)
        self.out_proj = Linear(width, width, bias=True, dtype=dtype)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, sight: Sight) -> jax.Array:
        projections = apply_together([self.q_proj, self.k_proj, self.v_proj], x, sight.key, "qkv")
        q, k, v = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in projections)  # [N, S, H, h]
        return self.out_proj(image_attention(q, k, v).reshape(x.shape), sight.key)


class MLP(nnx.Module):
    def __init__(self, config: PatchConfig, dtype):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, dtype=dtype)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        inner = apply_together([self.fc1], x, key, "gate_up")[0]
        return self.fc2(ACTIVATIONS[self.activation](inner), key)


class Block(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, sight: Sight, kv: None = None):
        x = keep(x, "block_input")
        x = keep(x + self.self_attn(self.layer_norm1(x), sight), "residual")
        return x + self.mlp(self.layer_norm2(x), sight.key), None


class Encoder(nnx.Module):
    def __init__(self, config: TowerConfig, plan: Sequence[Segment], dtype):
        self.layers = nnx.List(nnx.List(Block(config, dtype) for _ in range(s.period)) for s in plan)


class Tower(nnx.Module):
    def __init__(self, config: TowerConfig, plan: Sequence[Segment], dtype):
        self.embeddings = Embeddings(config, dtype)
        self.encoder = Encoder(config, plan, dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.dtype = dtype

    def __call__(
        self, pixels: jax.Array, *, key: jax.Array | None = None, remat: Remat | None = None
    ) -> jax.Array:
        """The patches of images [N, channels, side, side] -> [N, S, D], row by row.

        Args:
          key: dropout key. remat: what to keep for the backward pass.
        """
        x = self.embeddings(pixels, self.dtype)
        for i, segment in enumerate(self.encoder.layers):
            inner = None if key is None else jax.random.fold_in(key, i)
            x, _ = run_segment(segment, x, Sight(inner), None, remat)
        return self.post_layernorm(x)
