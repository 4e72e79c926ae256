"""Qwen3-VL: Qwen3 whose M-RoPE axes take turns, a tower with learned positions beside rotary ones, and features of its
lower layers added to the decoder's first ones (DeepStack, arXiv 2406.04334)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.formats.gguf_names import GgufFamily
from jaxtune.kernels.keep import keep
from jaxtune.models import qwen2_5_vl
from jaxtune.models.decoder import (
    ACTIVATIONS,
    Decoder,
    DecoderConfig,
    Segment,
    read_config,
    run_segment,
    segments,
)
from jaxtune.models.layers import Embedding, LayerNorm, Linear
from jaxtune.models.qwen2_5_vl import (
    Attention,
    PatchEmbed,
    Sight,
    TowerConfig,
    VisionBody,
    patch_tables,
    tower_config,
)
from jaxtune.models.qwen3 import READ as QWEN3_READ
from jaxtune.models.remat import Remat
from jaxtune.models.text_side import TextFamily
from jaxtune.models.vision_lm import Dense, VisionLM

READ = qwen2_5_vl.READ
TEXT = TextFamily("qwen3", QWEN3_READ)
GGUF = GgufFamily("qwen3vl", ("n_deepstack_layers",))  # the decoder; its tower: export.mmproj
PARTS = {
    "text_config": QWEN3_READ,
    "vision_config": qwen2_5_vl.PARTS["vision_config"]
    | {"num_position_embeddings", "deepstack_visual_indexes"},
}


class MLP(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, dtype=dtype)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.linear_fc2(ACTIVATIONS[self.activation](keep(self.linear_fc1(x, key), "gate_up")), key)


class Block(nnx.Module):
    def __init__(self, config: TowerConfig, dtype):
        self.norm1 = LayerNorm(config.hidden_size, 1e-6, dtype=dtype)
        self.norm2 = LayerNorm(config.hidden_size, 1e-6, dtype=dtype)
        self.attn = Attention(config, True, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, sight: Sight, kv: None = None):
        x = keep(x, "block_input")
        x = keep(x + self.attn(self.norm1(x), sight), "residual")
        return x + self.mlp(self.norm2(x), sight.key), None


class PatchMerger(nnx.Module):
    """m x m patches into one token of the decoder; normed each (False), or together (True)."""

    def __init__(self, config: TowerConfig, together: bool, dtype):
        inner = config.hidden_size * config.merge**2
        self.norm = LayerNorm(inner if together else config.hidden_size, 1e-6, dtype=dtype)
        self.linear_fc1 = Linear(inner, inner, bias=True, dtype=dtype)
        self.linear_fc2 = Linear(inner, config.out_size, bias=True, dtype=dtype)
        self.together = together

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[P, width] -> [P/m², D]."""
        width = self.linear_fc1.in_features
        x = self.norm(x.reshape(-1, width)) if self.together else self.norm(x).reshape(-1, width)
        return self.linear_fc2(ACTIVATIONS["gelu"](self.linear_fc1(x, key)), key)


class Tower(nnx.Module):
    """`deep`: numbers of the layers after which features are taken."""

    def __init__(
        self, config: TowerConfig, plan: Sequence[Segment], positions: int, deep: Sequence[int], dtype
    ):
        self.patch_embed = PatchEmbed(config, dtype, bias=True)
        self.pos_embed = Embedding(positions, config.hidden_size, dtype=dtype)
        self.blocks = nnx.List(nnx.List(Block(config, dtype) for _ in range(s.period)) for s in plan)
        self.merger = PatchMerger(config, False, dtype)
        self.deepstack_merger_list = nnx.List(PatchMerger(config, True, dtype) for _ in deep)
        self.config, self.dtype, self.deep = config, dtype, tuple(deep)
        self.ends = tuple(s.first + s.period * s.repeats for s in plan)

    def __call__(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The arrays of `images.qwen.Qwen3VLImages` -> [P/m², D], and those of the lower layers [n, P/m², D]."""
        x = self.patch_embed.proj(images["pixels"], self.dtype)
        table = self.pos_embed(images["table_rows"], jnp.float32)  # [P, 4, width]
        places = jnp.sum(table * images["table_weights"][..., None], 1)
        x = (x + places.astype(x.dtype))[None]  # [1, P, width]
        cos, sin = patch_tables(self.config, images["positions"])
        keys = [None if key is None else jax.random.fold_in(key, i) for i in range(len(self.blocks) + 1)]
        found = {}
        for segment, end, inner in zip(self.blocks, self.ends, keys, strict=False):
            x, _ = run_segment(segment, x, Sight(cos, sin, images, inner), None, remat)
            if end - 1 in self.deep:
                found[end - 1] = self.deepstack_merger_list[self.deep.index(end - 1)](x[0], inner)
        merged = self.merger(x[0], keys[-1])
        return merged, jnp.stack([found[number] for number in self.deep]) if found else None


def _split(kinds: Sequence, ends: Sequence[int]) -> tuple[Segment, ...]:
    """`segments` none of which runs over one of `ends`, numbers of layers that come last in theirs."""
    edges = sorted({0, len(kinds), *(end + 1 for end in ends)})
    return tuple(
        s._replace(first=first + s.first)
        for first, last in pairwise(edges)
        for s in segments(kinds[first:last])
    )


def config(hf) -> DecoderConfig:
    """transformers.Qwen3VLConfig -> that of its decoder."""
    text = hf.text_config
    bias, windows = text.attention_bias, (None,) * text.num_hidden_layers
    decoder = read_config(text, windows=windows, qkv_bias=bias, output_bias=bias, qk_norm=True)
    turns = decoder.rope.scaling | {"mrope_interleaved": True}
    rope = replace(decoder.rope, scaling={"mrope_section": [24, 20, 20]} | turns)
    return replace(decoder, rope=rope, tie_word_embeddings=hf.tie_word_embeddings)


def module(hf, dtype, dense: Dense) -> VisionLM:
    """The model of shapes; see `models.build`."""
    vision, decoder = hf.vision_config, config(hf)
    tower, deep = tower_config(vision), tuple(vision.deepstack_visual_indexes)
    layers = len(decoder.windows)
    if len(deep) > layers or any(not 0 <= number < tower.num_layers for number in deep):
        raise ValueError(
            f"vision_config.deepstack_visual_indexes={list(deep)} must name layers of the tower (0 to "
            f"{tower.num_layers - 1}), not more of them than the decoder's {layers}"
        )
    plan = _split(dense("model.language_model.layers", layers), [len(deep) - 1])
    blocks = _split(dense("model.visual.blocks", tower.num_layers), deep)
    visual = Tower(tower, blocks, vision.num_position_embeddings, deep, dtype)
    body = VisionBody(visual, Decoder(decoder, plan, dtype))
    return VisionLM(decoder, body, dtype, plan, stacks=[("visual.blocks", blocks)])
