"""The compiled programs of generation: prefill of prompts, the first token, a segment of decode steps.

Shapes, beside the repository's: P groups of rows that share a prompt (and prompts, one a group), G rows a group, S
columns of the prompts' cache, T columns of the rows' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.generate.attention import KV, group_attention, image_attention, prompt_attention
from jaxtune.generate.sampling import Choice, Sampling, choose, row_keys
from jaxtune.generate.weights import Layer, Weights
from jaxtune.kernels.attention import plain_attention
from jaxtune.kernels.cross_entropy import softcapped
from jaxtune.models.decoder import ACTIVATIONS, DecoderConfig, Deep, Segment
from jaxtune.models.layers import rms_norm
from jaxtune.models.rope import Rope, rotate, tables


@dataclass(frozen=True)
class Spec:
    """What the programs are compiled for beside shapes."""

    config: DecoderConfig
    dtype: Any
    sampling: Sampling


class Prompts(NamedTuple):
    """One prompt for each group: of each layer k, v [P, K, S, h]; lengths int32 [P], tokens of each.

    A layer that attends to images has those of their patches, seen int32 [P] of them, the first ones.
    offsets: int32 [P], how much further on than its number the rotary position of a token after the prompt is: 0, but
    behind images whose tokens share positions.
    """

    layers: tuple[KV, ...]
    lengths: jax.Array
    offsets: jax.Array
    seen: jax.Array


class Shown(NamedTuple):
    """Prompts with images: x [N, S, D], embeddings with image features in place; rope_positions int32 [N, S, 3], None
    where a token's rotary position is its number; blocks int32 [N, S], see `models.decoder.Context`, or None; deep,
    features for the first layers, or None; cross: see `models.decoder.Context`."""

    x: jax.Array
    rope_positions: jax.Array | None
    blocks: jax.Array | None
    deep: Deep | None
    cross: Any


class State(NamedTuple):
    """What a decode step changes. Which rows are done only the host knows; they go on, unread.

    layers: of each layer k, v [P·G, K, T, h]. last int32 [P·G]: newest token. step int32 []: columns that are filled.
    seen bool [P·G, V] or None: tokens so far, for the repetition penalty.
    """

    layers: tuple[KV, ...]
    last: jax.Array
    step: jax.Array
    seen: jax.Array | None


class Report(NamedTuple):
    """What the host reads of a segment of N steps: token int32, logprob and kept_logprob (or None) float32 [N, P·G]."""

    token: jax.Array
    logprob: jax.Array
    kept_logprob: jax.Array | None


def _norm(x: jax.Array, weight: jax.Array, spec: Spec) -> jax.Array:
    return rms_norm(x, weight, spec.config.rms_norm_eps, plus_one=spec.config.plus_one_norms)


def _tables(spec: Spec, positions: jax.Array) -> dict[bool, tuple[jax.Array, jax.Array]]:
    """cos and sin [B, T, 1, h/2] of int32 [B, T] or [B, T, 3], for layers without (False) and with a window (True);
    rows apart, since "dynamic" frequencies depend on the longest."""

    def each(rope: Rope):
        rows = jax.vmap(lambda one: tables(rope, one[None], spec.dtype))(positions)
        return rows[0][:, 0], rows[1][:, 0]

    everywhere, local = each(spec.config.rope), spec.config.local_rope
    return {False: everywhere, True: everywhere if local is None else each(local)}


def _embedded(weights: Weights, ids: jax.Array, spec: Spec) -> jax.Array:
    return spec.config.scaled(weights.embed[ids].astype(spec.dtype))


def _queries(layer: Layer, x: jax.Array, spec: Spec, cos, sin) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, D] -> rotated q [B, T, H, h] and k, and v [B, T, K, h]."""
    c, (batch, tokens, _) = spec.config, x.shape
    y = layer.qkv(_norm(x, layer.input_norm, spec).reshape(batch * tokens, -1))
    y = y.reshape(batch, tokens, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
    q, k, v = jnp.split(y, [c.num_heads, c.num_heads + c.num_kv_heads], 2)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = _norm(q, layer.q_norm, spec), _norm(k, layer.k_norm, spec)
    if c.query_scale != 1:
        q = q * c.query_scale
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _after_attention(layer: Layer, x: jax.Array, attended: jax.Array, spec: Spec) -> jax.Array:
    """The residual x [N, D] and the heads' outputs [N, H·h] -> the layer's output."""
    attended = layer.out(attended)
    x = x + (attended if layer.attended_norm is None else _norm(attended, layer.attended_norm, spec))
    gate, up = jnp.split(layer.gate_up(_norm(x, layer.mlp_norm, spec)), 2, -1)
    y = layer.down(ACTIVATIONS[spec.config.hidden_act](gate) * up)
    return x + (y if layer.mlp_out_norm is None else _norm(y, layer.mlp_out_norm, spec))


def _written(caches: KV, new: KV, at: tuple) -> KV:
    """Caches [B, K, S, h] with new keys and values [B, T, K, h] written at a place."""
    k, v = (
        jax.lax.dynamic_update_slice(old, one.swapaxes(1, 2), at)
        for old, one in zip(caches, new, strict=True)
    )
    return k, v


def _prefill_layer(spec: Spec, layer: Layer, x, cos, sin, blocks, window: int | None) -> tuple[jax.Array, KV]:
    """x [N, S, D] of prompts -> the layer's output, and their keys and values [N, S, K, h]."""
    q, k, v = _queries(layer, x, spec, cos, sin)
    flat = x.reshape(-1, x.shape[-1])
    attended = prompt_attention(q, k, v, window, spec.config.attention_softcap, blocks)
    return _after_attention(layer, flat, attended.reshape(len(flat), -1), spec).reshape(x.shape), (k, v)


def _decode_layer(
    spec: Spec, layer: Layer, x, prompt: KV, own: KV, cos, sin, lengths, step, window: int | None
):
    """x [P·G, D] of the newest tokens -> the layer's output, and the rows' own cache with column `step` written."""
    q, k, v = _queries(layer, x[:, None], spec, cos, sin)
    own = _written(own, (k, v), (0, 0, step, 0))
    q = q.reshape(len(lengths), -1, *q.shape[2:])
    attended = group_attention(q, prompt, own, lengths, step, window, spec.config.attention_softcap)
    return _after_attention(layer, x, attended, spec), own


def _after_cross(
    layer: Layer, x: jax.Array, attended: jax.Array, spec: Spec, absent: jax.Array, apart: jax.Array
) -> jax.Array:
    """`_after_attention` of a layer that attends to images: gated; absent, apart: bool [N, 1] as in models.mllama."""
    y = jnp.tanh(layer.attended_gate) * layer.out(attended)
    x = x + jnp.where(absent, 0, y)
    gate, up = jnp.split(layer.gate_up(_norm(x, layer.mlp_norm, spec)), 2, -1)
    y = jnp.tanh(layer.mlp_gate) * layer.down(ACTIVATIONS[spec.config.hidden_act](gate) * up)
    return x + jnp.where(apart, 0, y)


def _cross_queries(layer: Layer, x: jax.Array, spec: Spec) -> jax.Array:
    """x [N, D] -> q [N, H, h]."""
    q = layer.qkv(_norm(x, layer.input_norm, spec)).reshape(len(x), -1, spec.config.head_dim)
    return _norm(q, layer.q_norm, spec)


def _prefill_cross(spec: Spec, layer: Layer, x, cross, last, columns: int) -> tuple[jax.Array, KV]:
    """x [N, S, D] of prompts -> the layer's output, and keys and values [N, columns, K, h], first those that tokens
    after a prompt see, which its last one does (int32 [N])."""
    batch, kv, h = len(x), spec.config.num_kv_heads, spec.config.head_dim
    if cross is None:
        nothing = jnp.zeros((batch, columns, kv, h), x.dtype)
        return x, (nothing, nothing)
    assert layer.kv is not None
    flat = x.reshape(-1, x.shape[-1])
    q = _cross_queries(layer, flat, spec)
    states = layer.kv(cross.states.reshape(-1, x.shape[-1]).astype(x.dtype))
    k, v = (part.reshape(-1, kv, h) for part in jnp.split(states, 2, -1))
    k = _norm(k, layer.k_norm, spec)
    mask = cross.seen.reshape(1, 1, len(flat), -1)
    attended = plain_attention(q[None], k[None], v[None], mask)
    out = _after_cross(
        layer,
        flat,
        attended.reshape(len(flat), -1),
        spec,
        cross.absent.reshape(-1, 1),
        cross.apart.reshape(-1, 1),
    )
    order = jnp.argsort(~cross.seen[jnp.arange(batch), last].reshape(batch, -1), axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, max(0, columns - order.shape[1]))))[:, :columns]
    return out.reshape(x.shape), (k[order], v[order])


def _decode_cross(spec: Spec, layer: Layer, x, prompt: KV, seen) -> jax.Array:
    """x [P·G, D] of the newest tokens -> the layer's output."""
    q = _cross_queries(layer, x, spec)
    attended = image_attention(q.reshape(len(seen), -1, *q.shape[1:]), prompt, seen)
    absent = (seen == 0).repeat(len(x) // len(seen))[:, None]
    return _after_cross(layer, x, attended, spec, absent, absent)


def _shared(layer: Callable, spec: Spec, static: str | None = None) -> Callable:
    """A layer's function that is traced and lowered once for all layers of a kind (XLA inlines it): without that each
    of their kernels would be built for itself. A new one for each program, since jit keeps what it has traced."""
    return jax.jit(partial(layer, spec), static_argnames=static)


class Program:
    """A jitted function of weights and more. Weights in stacks are read as operands of library calls, which take slices
    where they are: Triton's products would get copies of them, and products of one x would be merged by copying."""

    def __init__(self, function: Callable, **options):
        flags = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
        self._apart = jax.jit(function, **options)
        self._stacked = jax.jit(function, compiler_options=flags, **options)

    def of(self, weights: Weights) -> Any:
        """What jit returned for weights that are stored so."""
        return self._stacked if weights.are_stacked else self._apart

    def __call__(self, weights: Weights, *arguments, **static):
        return self.of(weights)(weights, *arguments, **static)


@partial(Program, static_argnames="spec", donate_argnames="store")
def prefill(
    weights: Weights,
    store: tuple[KV, ...],
    ids: jax.Array,
    lengths: jax.Array,
    at: jax.Array,
    shown: Shown | None = None,
    *,
    spec: Spec,
) -> tuple[tuple[KV, ...], jax.Array]:
    """Runs some prompts and writes their keys and values.

    Args:
      store: of each layer k, v [P, K, S, h].
      ids: int32 [N, S], N prompts padded at the end. lengths: int32 [N].
      at: int32 [], where the first of them stands in the store.
      shown: the prompts with their images.

    Returns:
      (store, hidden state of each prompt's last token [N, D]).
    """
    batch, tokens = ids.shape
    positions = jnp.minimum(jnp.arange(tokens), lengths[:, None] - 1)
    if shown is not None and shown.rope_positions is not None:
        positions = shown.rope_positions
    ropes, x = _tables(spec, positions), _embedded(weights, ids, spec) if shown is None else shown.x
    run, run_cross = _shared(_prefill_layer, spec, "window"), _shared(_prefill_cross, spec, "columns")
    blocks, cross = (None, None) if shown is None else (shown.blocks, shown.cross)
    made = []
    for segment in weights.segments:  # stacked layers in a loop: compiling their kernels takes long
        windows, repeats = spec.config.windows[len(made) :], len(segment[0].input_norm)

        deep = None
        if shown is not None and shown.deep is not None:
            deep = shown.deep.of(Segment(len(made), len(segment), repeats))

        columns = [k.shape[2] for k, _ in store[len(made) :]]

        def period(x, layers, windows=windows, deep=deep, columns=columns):
            (layers, features), new = layers, []
            for i, (layer, window) in enumerate(zip(layers, windows, strict=False)):
                if layer.kv is not None:
                    x, kv = run_cross(layer, x, cross, lengths - 1, columns=columns[i])
                else:
                    x, kv = run(layer, x, *ropes[window is not None], blocks, window=window)
                x = x if deep is None else Deep(features[i], deep.slots).add(x)
                new.append(kv)
            return x, new

        layers = tuple(layer.each(lambda p: p._replace(folded=None)) for layer in segment)
        inputs = layers, None if deep is None else deep.features
        x, stacked = jax.lax.scan(period, x, inputs, unroll=repeats == 1)
        made += [jax.tree.map(lambda leaf, r=r: leaf[r], kv) for r in range(repeats) for kv in stacked]
    written = [_written(old, new, (at, 0, 0, 0)) for old, new in zip(store, made, strict=True)]
    return tuple(written), x[jnp.arange(batch), lengths - 1]


def _next(weights: Weights, x: jax.Array, seen, keys, step, spec: Spec) -> tuple[Choice, Any]:
    """Hidden states [B, D] before the last norm -> the tokens chosen, and what has been seen with them."""
    x = _norm(x, weights.norm, spec)
    logits = jnp.dot(x, weights.head.T, preferred_element_type=jnp.float32)
    choice = choose(softcapped(logits, spec.config.logit_softcap), seen, keys, step, spec.sampling)
    if seen is not None:
        seen = seen.at[jnp.arange(len(seen)), choice.token].set(True)
    return choice, seen


@partial(jax.jit, static_argnames="spec")
def begin(
    weights: Weights,
    hidden: jax.Array,
    ids: jax.Array | None,
    lengths: jax.Array,
    streams: jax.Array,
    seed: jax.Array,
    *,
    spec: Spec,
) -> tuple[State, Report]:
    """The first token of each row; the state has no caches yet.

    Args:
      hidden: [P, D] of `prefill`. ids: int32 [P, S], needed for a repetition penalty only. lengths: int32 [P].
      streams: int32 [P, G, 2], (prompt, sample) of each row. seed: uint32 [].
    """
    groups, size = streams.shape[:2]
    seen = None
    if spec.sampling.repetition_penalty != 1:
        assert ids is not None
        mask = jnp.arange(ids.shape[1]) < lengths[:, None]
        seen = jnp.zeros((groups, spec.config.vocab_size), bool)
        seen = seen.at[jnp.arange(groups)[:, None], ids].max(mask).repeat(size, 0)
    keys = _keys(seed, streams)
    choice, seen = _next(weights, hidden.repeat(size, 0), seen, keys, jnp.int32(0), spec)
    state = State((), choice.token, jnp.int32(0), seen)
    return state, Report(*jax.tree.map(lambda x: x[None], choice))


def _keys(seed: jax.Array, streams: jax.Array) -> jax.Array:
    return row_keys(jax.random.key(seed, impl="threefry2x32"), streams.reshape(-1, 2))


@partial(Program, static_argnames=("spec", "steps"), donate_argnames="state")
def decode(
    weights: Weights,
    prompts: Prompts,
    state: State,
    streams: jax.Array,
    seed: jax.Array,
    *,
    spec: Spec,
    steps: int,
) -> tuple[State, Report]:
    """`steps` tokens of each row; arguments as of `begin`. All rows write the same column: they began together."""
    keys, positions = _keys(seed, streams), (prompts.lengths + prompts.offsets).repeat(streams.shape[1])
    rows = len(state.last)
    f32 = partial(jnp.zeros, (steps, rows), jnp.float32)
    kept = f32() if spec.sampling.cuts() else None
    report = Report(jnp.zeros((steps, rows), jnp.int32), f32(), kept)
    run, run_cross = _shared(_decode_layer, spec, "window"), _shared(_decode_cross, spec)

    def step(i: jax.Array, carry: tuple[State, Report]) -> tuple[State, Report]:
        state, report = carry
        x = _embedded(weights, state.last, spec)
        ropes = _tables(spec, (positions + state.step)[:, None])
        layers = []
        for layer, prompt, own, window in zip(
            weights.layers(), prompts.layers, state.layers, spec.config.windows, strict=True
        ):
            cos, sin = ropes[window is not None]
            if layer.kv is not None:
                x = run_cross(layer, x, prompt, prompts.seen)
            else:
                x, own = run(layer, x, prompt, own, cos, sin, prompts.lengths, state.step, window=window)
            layers.append(own)
        choice, seen = _next(weights, x, state.seen, keys, state.step + 1, spec)
        report = Report(
            *(
                None if whole is None else whole.at[i].set(one)
                for whole, one in zip(report, choice, strict=True)
            )
        )
        return State(tuple(layers), choice.token, state.step + 1, seen), report

    return jax.lax.fori_loop(0, steps, step, (state, report))


@jax.jit
def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x[rows]


@partial(jax.jit, static_argnames="columns")
def _widen(x: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, columns - x.shape[2]), (0, 0)))


def widened(layers: list[KV], columns: int) -> tuple[KV, ...]:
    """Caches with more columns. Empties `layers` one by one: never are two copies of all of them there."""
    return _each(layers, partial(_widen, columns=columns))


def taken(layers: list[KV], rows: jax.Array) -> tuple[KV, ...]:
    """Some rows of caches; empties `layers` likewise."""
    return _each(layers, partial(_take, rows=rows))


def _each(layers: list[KV], change: Callable[[jax.Array], jax.Array]) -> tuple[KV, ...]:
    made = []
    while layers:
        k, v = layers.pop(0)
        k = change(k)
        v = change(v)
        made.append((k, v))
    return tuple(made)
