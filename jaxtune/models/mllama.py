"""Llama 3.2 Vision (arXiv 2407.21783, §7): every fifth layer of the decoder attends to the patches of images instead of
the text, behind gates; the others are Llama's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.attention import plain_attention
from jaxtune.kernels.keep import keep
from jaxtune.models import llama, mllama_tower
from jaxtune.models.decoder import (
    COMMON_FIELDS,
    MLP,
    Context,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    read_config,
    segments,
)
from jaxtune.models.layers import Linear
from jaxtune.models.mllama_tower import Tower, Value, gated
from jaxtune.models.remat import Remat
from jaxtune.models.text_side import TextFamily
from jaxtune.models.vision_lm import Dense, VisionLM

READ = frozenset("text_config vision_config image_token_index".split())
PARTS = {
    "text_config": (COMMON_FIELDS - {"tie_word_embeddings"}) | {"cross_attention_layers"},
    "vision_config": mllama_tower.READ,
}
_VALUES = "gate|gate_attn|gate_ffn|cross_attn_attn_gate|cross_attn_mlp_gate|class_embedding"
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.)?vision_model\.", "model.vision_model."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (rf"\.({_VALUES}|gated_positional_embedding\.embedding)$", r".\1.weight"),
)
EXTRA_ROWS = 8  # of the embedding, for tokens that are never predicted: that of an image
# Without images the layers that attend to them do nothing.
TEXT = TextFamily("llama", llama.READ, rows_behind=EXTRA_ROWS)


class Cross(NamedTuple):
    """What text sees of images: states [N, S, D] of their patches; seen bool [B, T, N, S]; apart: bool [B, T, 1],
    tokens that no image is before in their document; absent: bool [B, T, 1], tokens whose document has none."""

    states: jax.Array
    seen: jax.Array
    apart: jax.Array
    absent: jax.Array


def cross_of(states: jax.Array, tiles: jax.Array, slots: jax.Array, segment_ids: jax.Array) -> Cross:
    """Who sees which image: a token those of the last run of image tokens before it in its document, each from its own
    token on. A token before the first one sees, as in transformers, all patches of its document's images.

    Args:
      states: [N, tiles, patches, D]. tiles: bool [N, tiles], which are part of the image.
      slots: int32 [B, T], the image that a token stands for, -1 for none. segment_ids: int32 [B, T].
    """
    count, patches = len(states), states.shape[2]
    here = slots[:, :, None] == jnp.arange(count)  # [B, T, N]
    following = (slots[:, 1:] >= 0) & (slots[:, :-1] >= 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
    starts = (slots >= 0) & ~jnp.pad(following, ((0, 0), (1, 0)))
    run = jnp.cumsum(starts, 1)  # the run of image tokens that a token is in or behind
    places = jnp.where(here, jnp.arange(slots.shape[1])[:, None], 0).sum(1, keepdims=True)  # [B, 1, N]
    in_row = here.any(1, keepdims=True)

    def of_image(values: jax.Array) -> jax.Array:  # [B, T] -> [B, 1, N], at each image's token
        return jnp.where(here, values[:, :, None], 0).sum(1, keepdims=True)

    mine = in_row & (of_image(segment_ids) == segment_ids[:, :, None])
    before = places <= jnp.arange(slots.shape[1])[:, None]
    visible = mine & before & (of_image(run) == run[:, :, None])
    apart = ~visible.any(-1, keepdims=True)
    seen = jnp.where(apart[..., None], mine[..., None], visible[..., None] & tiles)  # [B, T, N, tiles]
    return Cross(
        states.reshape(count, -1, states.shape[-1]),
        jnp.repeat(seen, patches, -1),
        apart,
        ~mine.any(-1, keepdims=True),
    )


class CrossAttention(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype):
        heads, kv, h, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.q_proj = Linear(width, heads * h, bias=False, dtype=dtype)
        self.k_proj = Linear(width, kv * h, bias=False, dtype=dtype)
        self.v_proj = Linear(width, kv * h, bias=False, dtype=dtype)
        self.o_proj = Linear(heads * h, width, bias=False, dtype=dtype)
        self.q_norm, self.k_norm = config.norm(h, dtype), config.norm(h, dtype)
        self.head_dim = h

    def __call__(self, x: jax.Array, cross: Cross, key: jax.Array | None) -> jax.Array:
        """x [B, T, D] -> the same; all rows' tokens are queries of one long row, all images its keys."""
        q = self.q_norm(
            self.q_proj(x, key).reshape(1, -1, self.o_proj.in_features // self.head_dim, self.head_dim)
        )
        states = cross.states.reshape(1, -1, x.shape[-1])
        of_images = None if key is None else key[0]  # they have no rows
        k, v = (
            proj(states, of_images).reshape(1, states.shape[1], -1, self.head_dim)
            for proj in (self.k_proj, self.v_proj)
        )
        mask = cross.seen.reshape(1, 1, q.shape[1], -1)
        out = plain_attention(q, self.k_norm(k), v, mask)
        return self.o_proj(keep(out, "attention").reshape(*x.shape[:2], -1), key)


class CrossLayer(nnx.Module):
    """Does nothing for a text without images."""

    def __init__(self, config: DecoderConfig, dtype):
        self.input_layernorm = config.norm(config.hidden_size, dtype)
        self.cross_attn = CrossAttention(config, dtype)
        self.cross_attn_attn_gate = Value(1, dtype=dtype)
        self.post_attention_layernorm = config.norm(config.hidden_size, dtype)
        self.mlp = MLP(config, dtype)
        self.cross_attn_mlp_gate = Value(1, dtype=dtype)

    def __call__(self, x: jax.Array, ctx: Context, kv: None = None):
        cross = ctx.cross
        if cross is None:
            return x, None
        x = keep(x, "block_input")
        out = gated(self.cross_attn_attn_gate, self.cross_attn(self.input_layernorm(x), cross, ctx.key))
        x = keep(x + jnp.where(cross.absent, 0, out), "residual")
        out = gated(self.cross_attn_mlp_gate, self.mlp(self.post_attention_layernorm(x), ctx.key))
        return x + jnp.where(cross.apart, 0, out), None


class VisionBody(nnx.Module):
    def __init__(self, tower: Tower, projector: Linear, language_model: Decoder):
        self.vision_model, self.multi_modal_projector = tower, projector
        self.language_model = language_model


class Mllama(VisionLM):
    """Image tokens keep their embedding; what they stand for goes to the layers that attend to it."""

    def place_images(
        self, x: jax.Array, batch: dict[str, Any], *, key: jax.Array | None = None, remat: Remat | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See VisionLM."""
        if "images" not in batch:
            return x, {}
        with jax.named_scope("tower"):
            features = self.model.vision_model(batch["images"], key=key, remat=remat)
            last = None if key is None else jax.random.fold_in(key, self.model.vision_model.config.num_layers)
            states = self.model.multi_modal_projector(features, last)
        tiles, slots = batch["images"]["tiles"], batch["image_slots"]
        return x, {"cross": cross_of(states, tiles, slots, batch["segment_ids"])}


def config(hf) -> DecoderConfig:
    """transformers.MllamaConfig -> that of its decoder."""
    text = hf.text_config
    tower = mllama_tower.tower_config(hf.vision_config)
    return read_config(
        text,
        windows=(None,) * text.num_hidden_layers,
        extra_embeddings=EXTRA_ROWS,
        cross_layers=tuple(text.cross_attention_layers),
        cross_tokens=tower.tiles * tower.tokens,
    )


def module(hf, dtype, dense: Dense) -> Mllama:
    """The model of shapes; see `models.build`."""
    if hf.text_config.tie_word_embeddings:
        raise ValueError("text_config.tie_word_embeddings=True is not supported: the head has fewer rows")
    decoder, tower = config(hf), mllama_tower.tower_config(hf.vision_config)
    cross = set(decoder.cross_layers)
    text = dense("model.language_model.layers", len(decoder.windows))
    plan = tuple(segments([(i in cross, plain) for i, plain in enumerate(text)]))
    layers = mllama_tower.plan_of(tower, dense("model.vision_model.transformer.layers", tower.num_layers))
    after = tuple(segments(dense("model.vision_model.global_transformer.layers", tower.num_global_layers)))
    projector = Linear(tower.out_size, decoder.hidden_size, bias=True, dtype=dtype)

    def make(layer: int) -> nnx.Module:
        return CrossLayer(decoder, dtype) if layer in cross else DecoderLayer(decoder, None, dtype)

    body = VisionBody(Tower(tower, layers, after, dtype), projector, Decoder(decoder, plan, dtype, make))
    stacks = [("vision_model.transformer.layers", layers), ("vision_model.global_transformer.layers", after)]
    return Mllama(decoder, body, dtype, plan, stacks=stacks)
