"""Causal attention over packed rows: a token sees its own document, up to itself, within its window. And attention of
the patches of images with one another, which is not causal.

On an NVIDIA GPU training goes through cuDNN, which skips what is masked and keeps one number a row for the backward
pass. Elsewhere, with a cache, or in float32, XLA takes a mask, for as many queries at a time as `SCORES_BYTES` allow.
`supports_cudnn` says which.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.kernels import target
from jaxtune.kernels.keep import keep

SCORES_BYTES = 1 << 27  # of scores [B, H, queries, S] in float32 that are there at a time


def attention_mask(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
    q_blocks: jax.Array | None = None,
    kv_blocks: jax.Array | None = None,
) -> jax.Array:
    """bool [B, 1, T, S] from int32 positions, segment ids and blocks [B, T] (queries) and [B, S] (keys); see
    `masked_attention`."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    allowed = distance >= 0
    if q_blocks is not None and kv_blocks is not None:
        allowed |= (q_blocks[:, :, None] == kv_blocks[:, None, :]) & (q_blocks[:, :, None] > 0)
    allowed &= q_segments[:, :, None] == kv_segments[:, None, :]
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    q_segments: jax.Array,
    kv_positions: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    window: int | None,
    softcap: float | None = None,
    blocks: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32. The reference.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h], H a multiple of K.
      q_positions, kv_positions: int32 [B, T], [B, S], counted within a document; of keys None where they are those of
        the same tokens, which stand in a row one after the other.
      q_segments, kv_segments: int32 [B, T], [B, S]; only equal ids see each other. Of keys None as above.
      window: keys further back than this many tokens are hidden; None sees all.
      softcap: scores become softcap·tanh(scores/softcap).
      blocks: int32 [B, T] of a row with itself; tokens of one block, but of block 0, see those behind them too.

    Returns:
      [B, T, H, h] in q's dtype.
    """

    def attend(q, k, v, of_queries, of_keys):
        (q_positions, q_segments, q_blocks), (kv_positions, kv_segments, kv_blocks) = of_queries, of_keys
        mask = attention_mask(q_positions, kv_positions, q_segments, kv_segments, window, q_blocks, kv_blocks)
        return _attend(q, k, v, mask, softcap)

    of_queries = q_positions, q_segments, blocks
    if kv_positions is not None:
        return _some_at_a_time(attend, q, k, v, of_queries, (kv_positions, kv_segments, blocks))
    through = _in_order if blocks is None else _some_at_a_time
    return through(attend, q, k, v, of_queries, of_queries)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`masked_attention` of the keys that mask, bool [B or 1, H or 1, T or 1, S], is true of; None: of all."""
    by_query = None
    if mask is not None:
        by_query = jnp.broadcast_to(mask, (len(q), mask.shape[1], q.shape[1], k.shape[1])).swapaxes(1, 2)

    def attend(q, k, v, by_query, _):
        return _attend(q, k, v, None if by_query is None else by_query.swapaxes(1, 2), None)

    return _some_at_a_time(attend, q, k, v, by_query, None)


def _fits(q: jax.Array, k: jax.Array) -> bool:
    return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= SCORES_BYTES


def _in_order(attend: Callable, q, k, v, of_queries: Any, of_keys: Any) -> jax.Array:
    """`_some_at_a_time` of tokens that see none behind them: each quarter of a row with the keys up to its own end,
    five eighths of the work."""
    if _fits(q, k):
        return attend(q, k, v, of_queries, of_keys)
    tokens = q.shape[1]
    quarter = -(-tokens // 4)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)  # what adds up the gradients of each
    quarters = []
    for first in range(0, tokens, quarter):
        here, seen = (slice(None), slice(first, first + quarter)), (slice(None), slice(first + quarter))
        of = jax.tree.map(lambda x: x[here], of_queries), jax.tree.map(lambda x: x[seen], of_keys)  # noqa: B023
        quarters.append(_some_at_a_time(attend, q[here], k[seen], v[seen], *of))
    return jnp.concatenate(quarters, axis=1)


def _some_at_a_time(attend: Callable, q, k, v, of_queries: Any, of_keys: Any) -> jax.Array:
    """attend(q, k, v, of_queries, of_keys), part of the queries after part where the scores are larger than
    `SCORES_BYTES`; the backward pass makes those of a part again.

    of_queries, of_keys: arrays [B, T, ..] and [B, S, ..], or None.
    """
    if _fits(q, k):
        return attend(q, k, v, of_queries, of_keys)
    batch, tokens, heads, _ = q.shape
    size = max(SCORES_BYTES // (4 * batch * heads * k.shape[1]), 1)
    size = size // 64 * 64 or size
    parts = -(-tokens // size)
    wide = k.astype(jnp.float32), v.astype(jnp.float32)  # what adds up the gradients of each part

    def split(x):  # [B, T, ..] -> [parts, B, size, ..]
        x = jnp.pad(x, [(0, 0), (0, parts * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, parts, size, *x.shape[2:]).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)  # a loop's body
    def part(x):
        return attend(x[0], *wide, x[1], of_keys)

    out = jax.lax.map(part, jax.tree.map(split, (q, of_queries)))
    return out.swapaxes(0, 1).reshape(batch, parts * size, *q.shape[2:])[:, :tokens]


def _attend(q, k, v, mask: jax.Array | None, softcap: float | None) -> jax.Array:
    """Of all queries at once, computed in q's dtype."""
    if softcap is not None:
        return _capped_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, softcap)
    # It asks for products of a dtype by name, which is an error where the device has none.
    computed = q.dtype if target.multiplies(q.dtype) else jnp.float32
    q_, k_, v_ = (x.astype(q.dtype).astype(computed) for x in (q, k, v))
    return jax.nn.dot_product_attention(q_, k_, v_, mask=mask, implementation="xla").astype(q.dtype)


def _capped_attention(q, k, v, mask: jax.Array, softcap: float) -> jax.Array:
    """Attention under a mask bool [B, 1, T, S] with softcapped scores."""
    batch, tokens, _, h = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], -1, h)  # [B, T, K, H/K, h]
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, :, None], softcap * jnp.tanh(scores / softcap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def supports_cudnn(q: jax.Array, packed: bool, softcap: float | None = None) -> bool:
    """Whether cuDNN takes these queries on the GPU that the program is traced for (its own documented limits)."""
    gpu = target.capability()
    if gpu is None or softcap is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    hopper = gpu >= (9, 0)
    return (
        gpu >= (8, 0)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= (256 if hopper else 128)
        and (hopper or not packed)
    )


def packed_layout(starts: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """What jax's cuDNN call wants of packed rows.

    It lines up, over all rows of the batch, the i-th length that is not -1 with the i-th offset that is not -1. So an
    offset is a document's first token and nothing else: the row's end must not stand among them (it would pair the
    next row's documents with the wrong lengths, silently), and an unused slot is -1 in both.

    Args:
      starts: int32 [B, M], first token of each document in order, -1 in unused slots. Every token belongs to one.
      tokens: T.

    Returns:
      lengths int32 [B, M] and offsets int32 [B, M + 1] (its last column unused).
    """
    following = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where(following >= 0, following, tokens)
    lengths = jnp.where(starts >= 0, ends - starts, -1)
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


def _cudnn_arguments(q, k, v, starts, window, causal):
    """(operands, parameters) of jax's cuDNN primitives; they are private, pyproject.toml bounds the version."""
    from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

    none = jnp.zeros(0, q.dtype)
    lengths, offsets, mask = none, none, MaskType.CAUSAL if causal else MaskType.NO_MASK
    if starts is not None:
        lengths, offsets = packed_layout(starts, q.shape[1])
        mask = MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    parameters = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    return (q, k, v, none, lengths, lengths, offsets, offsets, none, none), parameters


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    window: int | None,
    causal: bool = True,
):
    """`masked_attention` of a row with itself, through cuDNN.

    Args:
      q: bfloat16 or float16 [B, T, H, h]. k, v: [B, T, K, h].
      starts: int32 [B, M], M >= 2: see `packed_layout`. None: every row is one document from its first token (what
        pads its end is attended to by nothing before it).
      window: as above.
      causal: False: every token of a document sees all of it.
    """
    return _cudnn_forward(q, k, v, starts, window, causal, is_training=False)[0]


def _cudnn_forward(q, k, v, starts, window, causal, is_training):
    from jax._src.cudnn.fused_attention_stablehlo import _dot_product_attention_fwd_p_wrapper

    operands, parameters = _cudnn_arguments(q, k, v, starts, window, causal)
    return _dot_product_attention_fwd_p_wrapper.bind(*operands, **parameters, is_training=is_training)


def _forward(q, k, v, starts, window, causal):
    out, statistics = _cudnn_forward(q, k, v, starts, window, causal, is_training=True)
    out, statistics = keep((out, statistics), "attention")
    return out, (q, k, v, starts, statistics, out)


def _backward(window, causal, residuals, d_out):
    from jax._src.cudnn.fused_attention_stablehlo import _dot_product_attention_bwd_p_wrapper

    q, k, v, starts, statistics, out = residuals
    operands, parameters = _cudnn_arguments(q, k, v, starts, window, causal)
    grads = _dot_product_attention_bwd_p_wrapper.bind(*operands, statistics, out, d_out, **parameters)
    return *grads, None


cudnn_attention.defvjp(_forward, _backward)


def image_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of all patches of an image with one another: q, k, v [N, S, H, h] -> [N, S, H, h] in q's dtype."""
    if supports_cudnn(q, packed=False):
        return cudnn_attention(q, k, v, None, None, False)
    return keep(plain_attention(q, k, v), "attention")


def rows(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """x[numbers] of x [N, ...], 0 for -1; no other number twice, so that gradients go back without adding up.

    What is not there gets numbers of its own beyond the end: the zeros of all of them would queue up for one row.
    """
    beyond = len(x) + jnp.arange(numbers.size, dtype=numbers.dtype).reshape(numbers.shape)
    places = jnp.where(numbers >= 0, numbers, beyond)
    return x.at[places].get(mode="fill", fill_value=0, unique_indices=True)


def segment_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, starts: jax.Array
) -> jax.Array:
    """Attention of all tokens of a segment with one another, as of an image's patches; segments stand end to end.

    Args:
      q, k, v: [1, P, H, h].
      segments: int32 [P], equal within a segment. starts: int32 [M], first token of each, -1 in unused slots.

    Returns:
      [1, P, H, h] in q's dtype.
    """
    if supports_cudnn(q, packed=True):
        return cudnn_attention(q, k, v, starts[None], None, False)

    def attend(q, k, v, of_queries, of_keys):
        return _attend(q, k, v, (of_queries[:, :, None] == of_keys[:, None])[:, None], None)

    of_each = segments[None]
    return keep(_some_at_a_time(attend, q, k, v, of_each, of_each), "attention")


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, windows: jax.Array, places: jax.Array
) -> jax.Array:
    """Attention of the tokens of each of many small windows with one another.

    Args:
      q, k, v: [1, P, H, h].
      windows: int32 [W, S], the tokens of each window, -1 where it has fewer than S.
      places: int32 [P], where each token stands in the flattened windows; one that stands in none has a number beyond.

    Returns:
      [1, P, H, h] in q's dtype, 0 for a token in no window.
    """
    q_, k_, v_ = (rows(x[0], windows) for x in (q, k, v))  # [W, S, H, h]
    out = plain_attention(q_, k_, v_, (windows >= 0)[:, None, None, :])
    flat = out.reshape(-1, *q.shape[2:])
    return keep(rows(flat, jnp.where(places < len(flat), places, -1))[None], "attention")
