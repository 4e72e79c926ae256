"""What a decode step reads: the layers' projections, those that share x side by side, their adapters folded once.

"lora" reads the model's own leaves. "merged" is a copy in the model's dtype, W + s·A·B of a dequantised W, an array for
each layer: a step then is four products a layer, and none of them reads a slice of a stack.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels import nf4_matmul
from jaxtune.kernels.linear import Adapter, adapted_linear, apart, dense
from jaxtune.models.decoder import CausalLM, Segment
from jaxtune.models.layers import Linear, NF4Weight
from jaxtune.models.names import Leaves, Slot, linear_slots, module_at
from jaxtune.quant import NF4, dequantize_absmax

PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# The fields of `Layer` that are norms, in a layer without and in one with norms behind attention and MLP.
NORMS = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
SANDWICH_NORMS = NORMS | {
    "attended_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# Those of a layer that attends to images (models.mllama).
CROSS_PROJECTIONS = PROJECTIONS | {
    "qkv": ("cross_attn.q_proj",),
    "kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "out": ("cross_attn.o_proj",),
}
CROSS_NORMS = NORMS | {
    "q_norm": "cross_attn.q_norm",
    "k_norm": "cross_attn.k_norm",
    "attended_gate": "cross_attn_attn_gate",
    "mlp_gate": "cross_attn_mlp_gate",
}


class Projection(NamedTuple):
    """scale · (x W_iᵀ + (x A_i) B_i) + bias of layers that share x, side by side.

    weights: NF4 or arrays [out_i, in]. adapters: an Adapter or None for each. scale (DoRA's) and bias: [sum of out_i]
    or None. folded: the adapters again as `nf4_matmul` takes them, where that reads the weights; of stacked layers one
    for each: what cuBLAS or Triton multiplies would be copied out of a stack for each token.
    """

    weights: tuple[NF4 | jax.Array, ...]
    adapters: tuple[Adapter | None, ...]
    scale: jax.Array | None
    bias: jax.Array | None
    folded: nf4_matmul.Lora | tuple[nf4_matmul.Lora, ...] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, in] -> [B, sum of out_i]."""
        weights = self.weights
        if len(x) > nf4_matmul.MAX_ROWS and any(isinstance(weight, NF4) for weight in weights):
            # else XLA dequantises many layers before it needs them
            weights, x = apart(weights, x)
        y = adapted_linear(x, weights, self.adapters, self.folded)
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias

    def at(self, repeat: int) -> "Projection":
        """One layer of stacked ones."""
        one = jax.tree.map(lambda leaf: leaf[repeat], self._replace(folded=None))
        return one if self.folded is None else one._replace(folded=self.folded[repeat])


class Layer(NamedTuple):
    """The weights of one decoder layer; those of several have a leading axis. Norms are [D], or [h] of q and k.

    A layer that attends to images has q alone in qkv, kv for their keys and values, and gates [1].
    """

    input_norm: jax.Array
    mlp_norm: jax.Array
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    attended_norm: jax.Array | None = None
    mlp_out_norm: jax.Array | None = None
    kv: Projection | None = None
    attended_gate: jax.Array | None = None
    mlp_gate: jax.Array | None = None

    def each(self, change: Callable[[Projection], Projection]) -> "Layer":
        """The layer with its projections changed."""
        found = {name: part for name, part in self._asdict().items() if isinstance(part, Projection)}
        return self._replace(**{name: change(part) for name, part in found.items()})

    def at(self, repeat: int) -> "Layer":
        """One layer of stacked ones."""
        one = lambda part: part.at(repeat) if isinstance(part, Projection) else part[repeat]  # noqa: E731
        return Layer(*(None if part is None else one(part) for part in self))


class Weights(NamedTuple):
    """embed, head: [V, D]. norm: [D]. segments: of each the layers of a period, stacked over its repeats."""

    embed: jax.Array
    head: jax.Array
    norm: jax.Array
    segments: tuple[tuple[Layer, ...], ...]

    @property
    def are_stacked(self) -> bool:
        """Whether products read slices of stacked 16-bit or 32-bit matrices."""
        projections = [
            p for segment in self.segments for layer in segment for p in layer if isinstance(p, Projection)
        ]
        return any(not isinstance(w, NF4) and len(w) > 1 for p in projections for w in p.weights)

    def layers(self) -> Iterator[Layer]:
        """One layer after the other; to be traced, where a kernel reads its slice of a stack in place."""
        for segment in self.segments:
            for repeat in range(len(segment[0].input_norm)):
                for layer in segment:
                    yield layer.at(repeat)


def stored(model: Any, *, read_codes: bool) -> Weights:
    """A model's own leaves ("lora"). Only the adapters are new arrays, and with `read_codes` what `nf4_matmul` reads:
    scales in float32, 0.37 bits a weight, and the adapters folded."""
    return _weights(model, lambda layers: _cast(layers, model.dtype, read_codes), lambda layers, _: (layers,))


def merged(model: Any) -> Weights:
    """The copy in the model's dtype, made layer by layer ("merged")."""

    def apart(layers: tuple[Layer, ...], plan: Segment) -> Iterator[tuple[Layer, ...]]:
        for repeat in range(plan.repeats):
            for layer in layers:
                yield (_merge_layer(layer, jnp.int32(repeat), dtype=model.dtype),)

    return _weights(model, lambda layers: layers, apart)


def _decoder_slots(model: Any) -> dict[str, Slot]:
    inside = f"{model.module.decoder_path}."
    return {name: slot for name, slot in linear_slots(model.module).items() if name.startswith(inside)}


def merged_bytes(model: Any) -> int:
    """Device memory of what `merged` makes."""
    linears = [module_at(model.module, slot.path) for slot in _decoder_slots(model).values()]
    count = sum(linear.in_features * linear.out_features for linear in linears)
    return count * jnp.dtype(model.dtype).itemsize


def reads_codes(model: Any, batch: int) -> bool:
    """Whether every linear layer of the decoder can be multiplied from its NF4 codes by `nf4_matmul` at this batch."""
    paths = {slot.path for slot in _decoder_slots(model).values()}
    stored_codes = (f"{path}.weight.codes" for path in paths)
    codes = [model.base[path] for path in stored_codes if path in model.base]
    if len(codes) < len(paths):
        return False
    shapes = [(c.shape[-2], 2 * c.shape[-1]) for c in codes]
    ranks = (leaf.shape[-1] for path, leaf in model.trainable.items() if path.endswith("lora_A"))
    return nf4_matmul.supported(batch, model.dtype, shapes, max(ranks, default=0))


def _weights(model: Any, prepare: Callable, split: Callable) -> Weights:
    """prepare: stacked layers as stored (adapters float32) -> what is split(layers, segment) into segments."""
    module, leaves, segments = model.module, {**model.base, **model.trainable}, []
    for i, plan in enumerate(module.plan):
        layers = tuple(
            _stacked_layer(module, leaves, f"{module.decoder_path}.layers.{i}.{j}")
            for j in range(plan.period)
        )
        segments += split(prepare(layers), plan)
    embed = leaves[f"{module.decoder_path}.embed_tokens.weight"].astype(model.dtype)
    head = embed if module.lm_head is None else leaves["lm_head.weight"].astype(model.dtype)
    return Weights(
        embed, head, leaves[f"{module.decoder_path}.norm.weight"].astype(model.dtype), tuple(segments)
    )


def _stacked_layer(module: CausalLM, leaves: Leaves, prefix: str) -> Layer:
    names, groups = SANDWICH_NORMS if module.config.sandwich_norms else NORMS, PROJECTIONS
    if f"{prefix}.cross_attn_attn_gate.weight" in leaves:
        names, groups = CROSS_NORMS, CROSS_PROJECTIONS
    paths = {field: f"{prefix}.{name}.weight" for field, name in names.items()}
    norms = {field: leaves[path].astype(module.dtype) for field, path in paths.items() if path in leaves}
    projections = {
        field: _stacked_projection(module, leaves, [f"{prefix}.{name}" for name in names])
        for field, names in groups.items()
    }
    return Layer(**norms, **projections)


def _stacked_projection(module: CausalLM, leaves: Leaves, paths: list[str]) -> Projection:
    """As stored: full weights may be float32 masters, adapters are float32 with their scaling in B."""
    linears: list[Linear] = [module_at(module, path) for path in paths]
    weights, adapters = [], []
    for linear, path in zip(linears, paths, strict=True):
        if isinstance(linear.weight, NF4Weight):
            weights.append(NF4(**{f: leaves.get(f"{path}.weight.{f}") for f in NF4._fields}))
        else:
            weights.append(leaves[f"{path}.weight"])
        adapter = None
        if f"{path}.lora_A" in leaves:
            scaling = leaves[f"{path}.lora_scaling"][:, None, None]
            adapter = Adapter(leaves[f"{path}.lora_A"], leaves[f"{path}.lora_B"] * scaling)
        adapters.append(adapter)
    scale, bias = None, None
    if any(f"{path}.lora_magnitude" in leaves for path in paths):
        parts = zip(linears, paths, weights, adapters, strict=True)
        scale = jnp.concatenate([_dora_scale(leaves, *part) for part in parts], -1)
    if any(f"{path}.bias" in leaves for path in paths):
        layers = len(next(leaf for path in paths if (leaf := leaves.get(f"{path}.bias")) is not None))
        empty = (jnp.zeros((layers, linear.out_features), module.dtype) for linear in linears)
        biases = [leaves.get(f"{path}.bias", zeros) for path, zeros in zip(paths, empty, strict=True)]
        bias = jnp.concatenate([one.astype(module.dtype) for one in biases], -1)
    return Projection(tuple(weights), tuple(adapters), scale, bias)


def _dora_scale(leaves: Leaves, linear: Linear, path: str, weight, adapter: Adapter | None) -> jax.Array:
    """DoRA's magnitude over the norm of the adapted weight, float32 [layers, out]; 1 without an adapter."""
    if adapter is None:
        layers = len(jax.tree.leaves(weight)[0])
        return jnp.ones((layers, linear.out_features), jnp.float32)
    norms = _norms(weight, adapter)
    return jnp.where(
        leaves[f"{path}.lora_scaling"][:, None] == 0, 1.0, leaves[f"{path}.lora_magnitude"] / norms
    )


@jax.jit
def _norms(weight, adapter: Adapter) -> jax.Array:
    one = lambda each: jnp.linalg.norm(dense(each[0], jnp.float32) + (each[1].a @ each[1].b).T, axis=1)  # noqa: E731
    return jax.lax.map(one, (weight, adapter))


@jax.jit
def _decoded_scales(weight: NF4) -> jax.Array:
    return jax.lax.map(dequantize_absmax, weight)


@jax.jit
def _folded(
    weights: tuple[NF4, ...], adapters: tuple[Adapter | None, ...]
) -> tuple[nf4_matmul.Lora, ...] | None:
    stacked = jax.vmap(nf4_matmul.fold)(weights, adapters)
    return None if stacked is None else tuple(map(nf4_matmul.Lora, *stacked))


def _cast(layers: tuple[Layer, ...], dtype, read_codes: bool) -> tuple[Layer, ...]:
    """Stacked layers as stored -> in the dtype that a step computes in."""

    def weight(w):
        if not isinstance(w, NF4):
            return w.astype(dtype)
        return NF4(w.codes, _decoded_scales(w)) if read_codes and w.absmax_scale is not None else w

    def projection(p: Projection) -> Projection:
        cast = partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
        adapters = cast(p.adapters)
        folded = _folded(p.weights, adapters) if read_codes else None
        return Projection(tuple(map(weight, p.weights)), adapters, cast(p.scale), p.bias, folded)

    return tuple(layer.each(projection) for layer in layers)


@partial(jax.jit, static_argnames="dtype")
def _merge_layer(layer: Layer, at: jax.Array, *, dtype) -> Layer:
    """Layer `at` of stacked ones, its projections one matrix each; a leading axis of 1."""
    layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False), layer)

    def merge(p: Projection) -> Projection:
        parts = []
        for weight, adapter in zip(p.weights, p.adapters, strict=True):
            whole = dense(weight, jnp.float32)
            if adapter is not None:
                whole += jnp.matmul(adapter.a, adapter.b, precision="highest").T
            parts.append(whole)
        matrix = jnp.concatenate(parts) if p.scale is None else jnp.concatenate(parts) * p.scale[:, None]
        return Projection((matrix.astype(dtype),), (None,), None, p.bias)

    layer = layer.each(merge)
    return jax.tree.map(lambda leaf: leaf[None], layer)


def step_bytes(weights: Weights) -> int:
    """Bytes of weights that a decode step reads; the embedding's few rows are not counted."""
    once = lambda p: p if p.folded is None else p._replace(adapters=())  # noqa: E731
    segments = [[layer.each(once) for layer in segment] for segment in weights.segments]
    return sum(leaf.nbytes for leaf in jax.tree.leaves((weights.norm, weights.head, segments)))
