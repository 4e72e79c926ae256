"""The decoder-only transformer that Llama, Mistral, Qwen and Gemma share; a family's file says how it differs.

Attribute paths are the checkpoint's names, except that `layers` holds segments of stacked layers: runs of the
smallest repeating pattern of layer kinds, each scanned, so that compile time does not grow with depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.attention import cudnn_attention, masked_attention, rows, supports_cudnn
from jaxtune.kernels.cross_entropy import softcapped
from jaxtune.kernels.keep import keep, keeping
from jaxtune.models import rope
from jaxtune.models.layers import Embedding, Linear, RMSNorm, apply_gated, apply_together, fold
from jaxtune.models.remat import Remat
from jaxtune.models.rope import Rope, rotate, tables
from jaxtune.models.shared_prefix import SharedPrefix

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class DecoderConfig:
    """What the mathematics needs of config.json.

    windows: one entry a layer, tokens seen, None for all. local_rope: of the layers with a window, where it is another
    one. query_scale: q is multiplied by it, beside the usual 1/√h. attention_softcap, logit_softcap: of attention
    scores and of the head's logits. embedding_scale: of the embedded tokens. plus_one_norms: norms multiply by
    1 + weight. sandwich_norms: attention and MLP have a norm behind them too. whole_image_tokens: of an image, where
    they all see each other, not just those before them. extra_embeddings: rows behind those of the vocabulary.
    cross_layers, cross_tokens: layers that attend to images instead of the text, and how many tokens an image is there.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]
    hidden_act: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    local_rope: Rope | None = None
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    plus_one_norms: bool = False
    sandwich_norms: bool = False
    whole_image_tokens: int | None = None
    extra_embeddings: int = 0
    cross_layers: tuple[int, ...] = ()
    cross_tokens: int = 0

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported; jaxtune has {', '.join(ACTIVATIONS)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is no multiple of {self.num_kv_heads} kv heads"
            )

    def norm(self, width: int, dtype) -> RMSNorm:
        """A norm over `width` features, as the model's norms are."""
        return RMSNorm(width, self.rms_norm_eps, dtype=dtype, plus_one=self.plus_one_norms)

    def scaled(self, embedded: jax.Array) -> jax.Array:
        """Embedded tokens in their dtype, to which the scale is rounded too."""
        if self.embedding_scale is None:
            return embedded
        return embedded * jnp.asarray(self.embedding_scale, embedded.dtype)


# The config.json fields that `read_config` honours for every family.
COMMON_FIELDS = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps
    tie_word_embeddings rope_parameters max_position_embeddings hidden_act""".split()
)


def read_config(hf, *, windows: Sequence[int | None], **differences) -> DecoderConfig:
    """A transformers config -> DecoderConfig; `differences` are the fields that not every family has."""
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=getattr(hf, "tie_word_embeddings", False),
        rope=rope.from_config(hf),
        hidden_act=getattr(hf, "hidden_act", None) or hf.hidden_activation,
        windows=tuple(windows),
        **differences,
    )


class Segment(NamedTuple):
    """`repeats` runs of `period` layers, from layer `first` on."""

    first: int
    period: int
    repeats: int


def segments(kinds: Sequence) -> list[Segment]:
    """Splits layers into runs of a repeating pattern, longest cover first: [a]*n -> one segment of period 1."""
    plan, at = [], 0
    while at < len(kinds):
        best = Segment(at, 1, 1)
        for period in range(1, min(16, len(kinds) - at) + 1):
            pattern, repeats = kinds[at : at + period], 1
            while kinds[at + repeats * period : at + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * best.period:
                best = Segment(at, period, repeats)
        plan.append(best)
        at += best.period * best.repeats
    return plan


class Cache(NamedTuple):
    """Keys and values of the layers so far: k, v [L, B, S, K, h] a segment slot; `index` is the next free column."""

    layers: list
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array


class Context(NamedTuple):
    """What every layer needs beside x: rope tables, who sees whom, each row's dropout key, the cache's columns.

    local: cos and sin of the layers with a window, where they have their own.
    starts: int32 [B, M], the first token of each document of a row (kernels.attention.packed_layout), M = 1 where a
    row is one document; None where that is not known, and masks say who sees whom. shared: where a row holds one prompt
    and several completions. blocks: int32 [B, T], the block of a token whose tokens all see each other, 0 for none.
    cross: what layers attend to that do not attend to the text (models.mllama).
    """

    cos: jax.Array
    sin: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    starts: jax.Array | None = None
    key: jax.Array | None = None
    kv_positions: jax.Array | None = None
    kv_segments: jax.Array | None = None
    index: jax.Array | None = None
    shared: SharedPrefix | None = None
    local: tuple[jax.Array, jax.Array] | None = None
    blocks: jax.Array | None = None
    cross: Any = None

    def rope_tables(self, window: int | None) -> tuple[jax.Array, jax.Array]:
        """cos and sin of a layer."""
        return (self.cos, self.sin) if window is None or self.local is None else self.local


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, window: int | None, dtype):
        heads, kv, h = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, heads * h, bias=config.qkv_bias, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, kv * h, bias=config.qkv_bias, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, kv * h, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(heads * h, config.hidden_size, bias=config.output_bias, dtype=dtype)
        self.q_norm = config.norm(h, dtype) if config.qk_norm else None
        self.k_norm = config.norm(h, dtype) if config.qk_norm else None
        self.head_dim, self.window = h, window
        self.query_scale, self.softcap = config.query_scale, config.attention_softcap

    def __call__(self, x: jax.Array, ctx: Context, kv=None):
        projections = apply_together([self.q_proj, self.k_proj, self.v_proj], x, ctx.key, "qkv")
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in projections)  # [B, T, heads, h]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.query_scale != 1:
            q = q * self.query_scale
        cos, sin = ctx.rope_tables(self.window)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self._attend(q, k, v, ctx, kv)
        return self.o_proj(out.reshape(*x.shape[:2], -1), ctx.key), (k, v)

    def _attend(self, q, k, v, ctx: Context, kv):
        if ctx.shared is not None:
            layout = ctx.shared
            apart = Context(ctx.cos, ctx.sin, layout.positions, layout.segment_ids, layout.starts)
            if ctx.blocks is not None:
                apart = apart._replace(blocks=layout.spread(ctx.blocks))
            q, k, v = layout.spread(q), layout.spread(k), layout.spread(v)
            return layout.gather(self._attend(q, k, v, apart, None))
        packed = ctx.starts is not None and ctx.starts.shape[1] > 1
        causal = kv is None and ctx.starts is not None and ctx.blocks is None
        if causal and supports_cudnn(q, packed, self.softcap):
            starts = ctx.starts if packed else None
            return cudnn_attention(q, k, v, starts, self.window)
        kv_positions = kv_segments = None
        if kv is not None:
            at = (0, ctx.index, 0, 0)
            k, v = (jax.lax.dynamic_update_slice(old, x.astype(old.dtype), at) for old, x in zip(kv, (k, v)))
            kv_positions, kv_segments = ctx.kv_positions, ctx.kv_segments
        out = masked_attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_positions=ctx.positions,
            kv_positions=kv_positions,
            q_segments=ctx.segment_ids,
            kv_segments=kv_segments,
            window=self.window,
            softcap=self.softcap,
            blocks=ctx.blocks,
        )
        return keep(out, "attention")


class MLPConfig(Protocol):
    """What `MLP` needs of a config: the decoder's, or a tower's."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def hidden_act(self) -> str: ...


class MLP(nnx.Module):
    def __init__(self, config: MLPConfig, dtype):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias, dtype=dtype)
        self.up_proj = Linear(width, inner, bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        if self.activation == "silu" and (y := apply_gated(layers, x, key)) is not None:
            return y
        gate, up = apply_together([self.gate_proj, self.up_proj], x, key, "gate_up")
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, key)


class DecoderLayer(nnx.Module):
    def __init__(self, config: DecoderConfig, window: int | None, dtype):
        self.input_layernorm = config.norm(config.hidden_size, dtype)
        self.self_attn = Attention(config, window, dtype)
        self.post_attention_layernorm = config.norm(config.hidden_size, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, ctx: Context, kv=None):
        x = keep(x, "block_input")
        out, new = self.self_attn(self.input_layernorm(x), ctx, kv)
        x = keep(x + out, "residual")
        return x + self.mlp(self.post_attention_layernorm(x), ctx.key), new


class SandwichLayer(nnx.Module):
    """Gemma's: what attention and MLP add to x is normed too."""

    def __init__(self, config: DecoderConfig, window: int | None, dtype):
        self.input_layernorm = config.norm(config.hidden_size, dtype)
        self.self_attn = Attention(config, window, dtype)
        self.post_attention_layernorm = config.norm(config.hidden_size, dtype)
        self.pre_feedforward_layernorm = config.norm(config.hidden_size, dtype)
        self.mlp = MLP(config, dtype)
        self.post_feedforward_layernorm = config.norm(config.hidden_size, dtype)

    def __call__(self, x: jax.Array, ctx: Context, kv=None):
        x = keep(x, "block_input")
        out, new = self.self_attn(self.input_layernorm(x), ctx, kv)
        x = keep(x + self.post_attention_layernorm(out), "residual")
        out = self.mlp(self.pre_feedforward_layernorm(x), ctx.key)
        return x + self.post_feedforward_layernorm(out), new


class Deep(NamedTuple):
    """Features of images that are added to the hidden states after the first layers (DeepStack, arXiv 2406.04334).

    features: [n, F, D], for each of the first n layers. slots: int32 [B, T], the row that a token takes, -1 for none.
    """

    features: jax.Array
    slots: jax.Array

    def of(self, segment: Segment) -> "Deep | None":
        """Those of a segment's layers, [repeats, period, F, D]; all of a segment's layers have some, or none has."""
        if segment.first >= len(self.features):
            return None
        last = segment.first + segment.period * segment.repeats
        own = self.features[segment.first : last]
        return Deep(own.reshape(segment.repeats, segment.period, *own.shape[1:]), self.slots)

    def add(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] with one layer's features [F, D] added."""
        return x + rows(self.features, self.slots).astype(x.dtype)


def _append(cache: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """Writes new columns [L, B, T, K, h] into a cache [L, B, S, K, h]."""
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, 0, index, 0, 0))


def run_segment(
    layers: nnx.List, x: jax.Array, ctx: Any, caches, remat: Remat | None, deep: Deep | None = None
):
    """Scans one segment: `layers` is a period of modules whose leaves carry a leading axis of repeats.

    caches: per layer of the period (k, v) [repeats, B, S, K, h], or None. deep: `Deep.of` the segment.

    Returns:
      (x, per layer the new (k, v) [repeats, B, T, K, h], or None without caches).
    """
    graph, state = nnx.split(layers)
    repeats = jax.tree.leaves(state)[0].shape[0]

    def body(x, inputs):
        state, repeat, caches, features = inputs
        new, period = [], nnx.merge(graph, state)
        for i, layer in enumerate(period):
            inner = None if ctx.key is None else fold(ctx.key, repeat * len(period) + i)
            x, kv = layer(x, ctx._replace(key=inner), None if caches is None else caches[i])
            x = x if deep is None else Deep(features[i], deep.slots).add(x)
            new.append(kv)
        return x, (None if caches is None else new)

    if remat is not None:
        body = jax.checkpoint(keeping(remat.keep)(body), prevent_cse=False, policy=remat.policy())
    return jax.lax.scan(
        body, x, (state, jnp.arange(repeats), caches, None if deep is None else deep.features)
    )


class Decoder(nnx.Module):
    """make: number of a layer -> the layer, where they are not all of the usual kind."""

    def __init__(
        self,
        config: DecoderConfig,
        plan: Sequence[Segment],
        dtype,
        make: Callable[[int], nnx.Module] | None = None,
    ):
        rows = config.vocab_size + config.extra_embeddings
        self.embed_tokens = Embedding(rows, config.hidden_size, dtype=dtype)
        kind = SandwichLayer if config.sandwich_norms else DecoderLayer
        make = make or (lambda layer: kind(config, config.windows[layer], dtype))
        self.layers = nnx.List(nnx.List(make(s.first + j) for j in range(s.period)) for s in plan)
        self.norm = config.norm(config.hidden_size, dtype)


class CausalLM(nnx.Module):
    """A decoder with its head. Leaves under `model.layers` carry a leading axis of stacked layers.

    `dense` names, for each layer, the linears that stay unquantised where others are: layers that differ in it are
    stacked apart.

    Attributes:
      stacks: (path, plan) of every list of layers that is kept in segments.
    """

    decoder_path: str = "model"
    lm_head: Linear | None = None  # None: tied to the embedding
    fp8: bool = False  # whether its NF4 linears multiply in 8-bit floats

    def __init__(self, config: DecoderConfig, dtype, dense: Sequence[frozenset[str]] | None = None):
        self.plan = tuple(segments(list(zip(config.windows, dense or config.windows, strict=True))))
        self.model = Decoder(config, self.plan, dtype)
        self.stacks: tuple[tuple[str, tuple[Segment, ...]], ...] = (("model.layers", self.plan),)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.config, self.dtype = config, dtype

    @property
    def decoder(self) -> Decoder:
        return self.model

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.config.scaled(self.decoder.embed_tokens(ids, self.dtype))

    def place_images(
        self, x: jax.Array, batch: dict[str, Any], *, key: jax.Array | None = None, remat: Remat | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Embedded tokens x [B, T, D] with what the batch's images are in their place, and what `hidden` needs to know
        of them. A model of text has none."""
        return x, {}

    def head(self) -> jax.Array:
        """The output matrix [V, D] in the compute dtype."""
        holder = self.decoder.embed_tokens if self.lm_head is None else self.lm_head
        weight = holder.matrix()
        return (weight if isinstance(holder.weight, nnx.Param) else jax.lax.stop_gradient(weight)).astype(
            self.dtype
        )

    def trains_head(self) -> bool:
        holder = self.decoder.embed_tokens if self.lm_head is None else self.lm_head
        return isinstance(holder.weight, nnx.Param)

    def context(
        self, positions: jax.Array, segment_ids: jax.Array, rope_positions: jax.Array | None = None
    ) -> Context:
        """What layers need for tokens at these positions of these documents; see `hidden`."""
        c, turning = self.config, positions if rope_positions is None else rope_positions
        local = None if c.local_rope is None else tables(c.local_rope, turning, self.dtype)
        return Context(*tables(c.rope, turning, self.dtype), positions, segment_ids, local=local)

    def hidden(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        starts: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: Remat | None = None,
        cache: Cache | None = None,
        shared: SharedPrefix | None = None,
        rope_positions: jax.Array | None = None,
        blocks: jax.Array | None = None,
        deep: Deep | None = None,
        cross: Any = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states [B, T, D] of embedded tokens x [B, T, D].

        Args:
          positions, segment_ids: int32 [B, T].
          starts: int32 [B, M], see Context.
          key: of dropout, one a row [B]; None at evaluation.
          remat: what to keep for the backward pass; None where there is none.
          shared: the layout where rows hold one prompt and several completions; segment_ids and starts are then its.
          rope_positions: int32 [B, T, 3], time, height and width of each token, where they are not its position.
          blocks: int32 [B, T], see Context; not with a cache.
          deep: features of images for the first layers. cross: see Context.
          cache: when given, T new columns are written at `cache.index` and attention spans the cache.
        """
        ctx = self.context(positions, segment_ids, rope_positions)
        ctx = ctx._replace(starts=starts, key=key, shared=shared, blocks=blocks, cross=cross)
        if cache is not None:
            ctx = ctx._replace(kv_positions=cache.positions, kv_segments=cache.segment_ids, index=cache.index)
        kept = []
        for i, segment in enumerate(self.decoder.layers):
            inner = ctx if key is None else ctx._replace(key=fold(key, i))
            caches = None if cache is None else cache.layers[i]
            added = None if deep is None else deep.of(self.plan[i])
            x, new = run_segment(segment, x, inner, caches, remat, added)
            if cache is not None:  # one write for all layers: the scan only reads the cache
                kept.append(jax.tree.map(partial(_append, index=cache.index), cache.layers[i], new))
        if cache is not None:
            cache = cache._replace(layers=kept, index=cache.index + x.shape[1])
        return self.decoder.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32."""
        logits = jnp.dot(hidden, self.head().T, preferred_element_type=jnp.float32)
        return softcapped(logits, self.config.logit_softcap)
