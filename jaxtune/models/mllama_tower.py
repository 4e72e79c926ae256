"""The tower of Llama 3.2 Vision: up to four tiles an image that see each other, learned positions by the image's shape,
the outputs of some layers beside that of the last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.attention import plain_attention
from jaxtune.kernels.keep import keep
from jaxtune.models.decoder import ACTIVATIONS, Segment, run_segment, segments
from jaxtune.models.layers import Embedding, Frozen, LayerNorm, Linear, Shape, apply_together
from jaxtune.models.remat import Remat
from jaxtune.models.siglip import MLP, PatchEmbedding

READ = frozenset(
    """hidden_size intermediate_size num_hidden_layers num_global_layers attention_heads num_channels image_size
    patch_size hidden_act norm_eps max_num_tiles intermediate_layers_indices supported_aspect_ratios
    vision_output_dim""".split()
)
EIGHT = 8  # a tile's patches are padded to a multiple of it


@dataclass(frozen=True)
class TowerConfig:
    """What the mathematics needs of vision_config. shapes: how many shapes of tiles there are. outputs: numbers of the
    layers whose outputs are taken beside the last one's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_global_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    norm_eps: float
    tiles: int
    shapes: int
    outputs: tuple[int, ...]

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"vision_config.hidden_act={self.hidden_act!r}; jaxtune has {', '.join(ACTIVATIONS)}"
            )

    @property
    def tokens(self) -> int:
        """Of a tile: its patches and one for its class."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def out_size(self) -> int:
        return self.hidden_size * (1 + len(self.outputs))


def tower_config(vision) -> TowerConfig:
    """transformers.MllamaVisionConfig -> TowerConfig."""
    made = TowerConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_global_layers=vision.num_global_layers,
        num_heads=vision.attention_heads,
        num_channels=vision.num_channels,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.hidden_act,
        norm_eps=vision.norm_eps,
        tiles=vision.max_num_tiles,
        shapes=len(vision.supported_aspect_ratios),
        outputs=tuple(vision.intermediate_layers_indices),
    )
    if list(made.outputs) != sorted(set(made.outputs)) or made.outputs[-1] >= made.num_layers:
        raise ValueError(
            f"vision_config.intermediate_layers_indices={list(made.outputs)}: expected rising numbers of the "
            f"{made.num_layers} layers"
        )
    if vision.vision_output_dim != made.out_size:
        raise ValueError(
            f"vision_config.vision_output_dim={vision.vision_output_dim}: expected {made.out_size}"
        )
    return made


class Value(nnx.Module):
    """One array that is no layer's weight: a gate, an embedding."""

    def __init__(self, *shape: int, dtype):
        self.weight = Frozen(Shape(shape, dtype))

    def __call__(self, dtype) -> jax.Array:
        return self.weight[...].astype(dtype)


def gated(gate: Value, x: jax.Array) -> jax.Array:
    return jnp.tanh(gate(x.dtype)) * x


class Sight(NamedTuple):
    """What every layer needs beside x: mask bool [N, S, S] of who sees whom, and the dropout key."""

    mask: jax.Array
    key: jax.Array | None


class Attention(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        width = config.hidden_size
        self.q_proj = Linear(width, width, bias=False, dtype=dtype)
        self.k_proj = Linear(width, width, bias=False, dtype=dtype)
        self.v_proj = Linear(width, width, bias=False, dtype=dtype)
        self.o_proj = Linear(width, width, bias=False, dtype=dtype)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, sight: Sight) -> jax.Array:
        projections = apply_together([self.q_proj, self.k_proj, self.v_proj], x, sight.key, "qkv")
        q, k, v = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in projections)  # [N, S, H, h]
        out = plain_attention(q, k, v, sight.mask[:, None])
        return self.o_proj(keep(out, "attention").reshape(x.shape), sight.key)


class Block(nnx.Module):
    gate_attn: Value | None = None
    gate_ffn: Value | None = None

    def __init__(self, config: TowerConfig, is_gated: bool, dtype):
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)
        if is_gated:
            self.gate_attn, self.gate_ffn = Value(1, dtype=dtype), Value(1, dtype=dtype)

    def __call__(self, x: jax.Array, sight: Sight, kv: None = None):
        x = keep(x, "block_input")
        out = self.self_attn(self.input_layernorm(x), sight)
        x = keep(x + (out if self.gate_attn is None else gated(self.gate_attn, out)), "residual")
        out = self.mlp(self.post_attention_layernorm(x), sight.key)
        return x + (out if self.gate_ffn is None else gated(self.gate_ffn, out)), None


class Encoder(nnx.Module):
    def __init__(self, config: TowerConfig, plan: Sequence[Segment], is_gated: bool, dtype):
        self.layers = nnx.List(
            nnx.List(Block(config, is_gated, dtype) for _ in range(s.period)) for s in plan
        )

    def __call__(self, x: jax.Array, sight: Sight, remat: Remat | None) -> list[jax.Array]:
        """The output of each segment."""
        outputs = []
        for i, segment in enumerate(self.layers):
            inner = None if sight.key is None else jax.random.fold_in(sight.key, i)
            x, _ = run_segment(segment, x, sight._replace(key=inner), None, remat)
            outputs.append(x)
        return outputs


class TileEmbedding(nnx.Module):
    """One vector a tile, by the image's shape."""

    def __init__(self, config: TowerConfig, dtype):
        self.embedding = Embedding(config.shapes + 1, config.tiles * config.hidden_size, dtype=dtype)
        self.gate = Value(1, dtype=dtype)
        self.tiles = config.tiles

    def __call__(self, x: jax.Array, shapes: jax.Array) -> jax.Array:
        """x [N, tiles, S, width] -> the same."""
        return x + gated(self.gate, self.embedding(shapes, x.dtype).reshape(len(x), self.tiles, 1, -1))


class PositionEmbedding(nnx.Module):
    """One vector a patch, and one a patch and tile by the image's shape."""

    def __init__(self, config: TowerConfig, dtype):
        self.gate = Value(1, dtype=dtype)
        self.embedding = Value(config.tokens, config.hidden_size, dtype=dtype)
        size = config.tiles * config.tokens * config.hidden_size
        self.tile_embedding = Embedding(config.shapes + 1, size, dtype=dtype)

    def __call__(self, x: jax.Array, shapes: jax.Array) -> jax.Array:
        x = x + (1 - jnp.tanh(self.gate(x.dtype))) * self.embedding(x.dtype)
        return x + gated(self.gate, self.tile_embedding(shapes, x.dtype).reshape(x.shape))


class Tower(nnx.Module):
    def __init__(self, config: TowerConfig, plan: Sequence[Segment], global_plan: Sequence[Segment], dtype):
        self.patch_embedding = PatchEmbedding(config, dtype, bias=False)
        self.class_embedding = Value(config.hidden_size, dtype=dtype)
        self.gated_positional_embedding = PositionEmbedding(config, dtype)
        self.pre_tile_positional_embedding = TileEmbedding(config, dtype)
        self.post_tile_positional_embedding = TileEmbedding(config, dtype)
        self.layernorm_pre = LayerNorm(config.hidden_size, 1e-5, dtype=dtype)
        self.layernorm_post = LayerNorm(config.hidden_size, 1e-5, dtype=dtype)
        self.transformer = Encoder(config, plan, False, dtype)
        self.global_transformer = Encoder(config, global_plan, True, dtype)
        # segments that end with a layer whose output is taken
        ends = [s.first + s.period * s.repeats - 1 for s in plan]
        self.taken = tuple(ends.index(layer) for layer in config.outputs)
        self.config, self.dtype = config, dtype

    def __call__(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> jax.Array:
        """The arrays of `images.mllama.MllamaImages` -> [N, tiles, tokens, out_size]."""
        c, shapes = self.config, images["shapes"]
        count, tokens = len(shapes), c.tokens
        pixels = images["pixels"].reshape(-1, *images["pixels"].shape[2:])
        x = self.patch_embedding(pixels, self.dtype).reshape(count, c.tiles, tokens - 1, -1)
        x = self.pre_tile_positional_embedding(x, shapes)
        first = jnp.broadcast_to(self.class_embedding(x.dtype), (*x.shape[:2], 1, x.shape[-1]))
        x = self.gated_positional_embedding(jnp.concatenate([first, x], 2), shapes)
        padding = -tokens % EIGHT
        x = jnp.pad(self.layernorm_pre(x), ((0, 0), (0, 0), (0, padding), (0, 0)))  # [N, tiles, S, width]
        real = images["tiles"][:, :, None] & (jnp.arange(tokens + padding) < tokens)
        real = real.reshape(count, -1)
        # as the model was trained: only what pads does not see what pads
        sight = Sight(real[:, :, None] | real[:, None, :], key)
        outputs = self.transformer(x.reshape(count, -1, c.hidden_size), sight, remat)
        taken = [outputs[i] for i in self.taken]
        x = self.layernorm_post(outputs[-1]).reshape(x.shape)
        x = self.post_tile_positional_embedding(x, shapes).reshape(outputs[-1].shape)
        apart = None if key is None else jax.random.fold_in(key, len(outputs))
        x = self.global_transformer(x, sight._replace(key=apart), remat)[-1]
        # of each patch the last output, then those taken, side by side for each feature
        beside = jnp.stack(taken, -1).reshape(*x.shape[:2], -1)
        both = jnp.concatenate([x, beside], -1).reshape(count, c.tiles, tokens + padding, -1)
        return both[:, :, :tokens]


def plan_of(config: TowerConfig, dense: list[frozenset[str]]) -> tuple[Segment, ...]:
    """Segments of the first encoder, which end where outputs are taken; `dense` as in `models.build`."""
    part = [sum(layer > output for output in config.outputs) for layer in range(config.num_layers)]
    plan: list[Segment] = []
    for number in sorted(set(part)):
        inside = [plain for plain, own in zip(dense, part, strict=True) if own == number]
        first = part.index(number)
        plan += [s._replace(first=first + s.first) for s in segments(inside)]
    return tuple(plan)
