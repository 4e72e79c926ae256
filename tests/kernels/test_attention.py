"""Which documents cuDNN is told of, worked out from jax's own preparation of its arguments; attention of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets
from tolerances import GRADIENT

from jaxtune.kernels import attention, target
from jaxtune.kernels.attention import (
    image_attention,
    masked_attention,
    packed_layout,
    plain_attention,
    rows,
    segment_attention,
    window_attention,
)

HEADS, KV, H = 4, 2, 8
# Per row the lengths of its documents; a row's last may be padding.
ROWS = {
    "every slot used": [[3, 5], [4, 4]],
    "unequal": [[1, 7, 8], [16], [2, 14]],
    "one row": [[5, 6, 5]],
    "one document a row, slots left": [[8], [8]],
    "single tokens": [[1, 1, 1, 1], [4]],
}


def starts_of(rows, slots):
    starts = np.full((len(rows), slots), -1, np.int32)
    for row, lengths in zip(starts, rows):
        row[: len(lengths)] = np.cumsum([0, *lengths[:-1]])
    return jnp.asarray(starts)


def documents_seen(lengths, offsets, rows, tokens):
    """(first token, length) in the flattened batch of every document cuDNN would attend in, as jax hands it over."""
    q = jnp.zeros((rows, tokens, HEADS, H), jnp.bfloat16)
    k = jnp.zeros((rows, tokens, KV, H), jnp.bfloat16)
    q_len, kv_len, q_off, kv_off = _fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    q_len, kv_len, q_off, kv_off = (np.asarray(x).reshape(-1) for x in (q_len, kv_len, q_off, kv_off))
    np.testing.assert_array_equal(q_len, kv_len)
    np.testing.assert_array_equal(q_off // (HEADS * H), kv_off // (KV * H))
    return [(int(at) // (HEADS * H), int(n)) for at, n in zip(q_off, q_len) if n > 0]


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("name", ROWS)
def test_every_document_is_where_it_lies(name, spare):
    rows = ROWS[name]
    tokens = sum(rows[0])
    lengths, offsets = packed_layout(starts_of(rows, max(2, *map(len, rows)) + spare), tokens)
    want = [
        (number * tokens + int(at), length)
        for number, row in enumerate(rows)
        for at, length in zip(np.cumsum([0, *row[:-1]]), row)
    ]
    assert documents_seen(lengths, offsets, len(rows), tokens) == want


def test_the_end_of_a_row_must_not_stand_among_the_offsets():
    """What makes other fills silently wrong: the second row's documents are paired with the wrong places."""
    rows, tokens = ROWS["every slot used"], 8
    lengths, offsets = packed_layout(starts_of(rows, 2), tokens)
    with_ends = offsets.at[:, 2].set(tokens)
    assert documents_seen(lengths, offsets, 2, tokens) == [(0, 3), (3, 5), (8, 4), (12, 4)]
    assert documents_seen(lengths, with_ends, 2, tokens) == [(0, 3), (3, 5), (8, 4), (8, 4)]


def attended(q, k, v, groups):
    """Attention of tokens of one group (not 0) with one another, [1, P, H, h] in NumPy; 0 for group 0."""
    scores = np.einsum("qhd,khd->hqk", q[0], k[0]) / np.sqrt(q.shape[-1])
    scores = np.where(groups[:, None] == groups, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v[0])
    return np.where((groups > 0)[:, None, None], out, 0)[None]


def test_windows_and_segments_of_patches():
    """Also where a window has fewer tokens than it could, and tokens stand in none."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 12, 2, 8)).astype(np.float32)
    groups = np.array([1, 1, 1, 2, 3, 3, 3, 3, 4, 0, 0, 0])
    windows = np.array([[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7], [8, -1, -1, -1], [-1] * 4])
    places = np.array([0, 1, 2, 4, 8, 9, 10, 11, 12, 20, 21, 22])
    want = attended(q, k, v, groups)
    got = window_attention(*map(jnp.asarray, (q, k, v, windows, places)))
    np.testing.assert_allclose(got, want, atol=1e-6)
    starts = jnp.array([0, 3, 4, 8, 9, -1])
    got = segment_attention(*map(jnp.asarray, (q, k, v, groups)), starts)
    np.testing.assert_allclose(got[:, :9], want[:, :9], atol=1e-6)


def test_rows_that_are_not_there():
    x = jnp.arange(12.0).reshape(4, 3)
    numbers = jnp.array([[2, -1], [-1, 0]])
    np.testing.assert_array_equal(rows(x, numbers), [[x[2], 0 * x[0]], [0 * x[0], x[0]]])
    weights = jnp.arange(1.0, 13).reshape(2, 2, 3)
    gradient = jax.grad(lambda x: jnp.sum(rows(x, numbers) * weights))(x)
    np.testing.assert_array_equal(gradient, [weights[1, 1], 0 * x[0], weights[0, 0], 0 * x[0]])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 4])
def test_softcaps_and_tokens_that_see_what_is_behind_them(softcap, window):
    """Of one block within a document; grouped kv heads."""
    rng = np.random.default_rng(1)
    q, (k, v) = rng.standard_normal((1, 9, HEADS, H)), rng.standard_normal((2, 1, 9, KV, H))
    segments, blocks = np.array([1] * 6 + [2] * 3), np.array([0, 3, 3, 3, 0, 4, 4, 4, 0])
    distance = np.arange(9)[:, None] - np.arange(9)
    allowed = (distance >= 0) | ((blocks[:, None] == blocks) & (blocks > 0))
    allowed &= (segments[:, None] == segments) & (distance < (window or 9))
    scores = np.einsum("qkgd,skd->kgqs", q[0].reshape(9, KV, -1, H), k[0]) / np.sqrt(H)
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(np.where(allowed, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("kgqs,skd->qkgd", weights, v[0]).reshape(1, 9, HEADS, H)
    places, groups = jnp.arange(9)[None], jnp.asarray(segments)[None]
    got = masked_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_positions=places,
        q_segments=groups,
        window=window,
        softcap=softcap,
        blocks=jnp.asarray(blocks)[None],
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def _masked(window=None, softcap=None, blocks=False):
    places = np.arange(TOKENS) % 70 + np.zeros((2, 1), int)
    groups = np.arange(TOKENS) // 70 + np.ones((2, 1), int)
    places, groups, of_images = (jnp.asarray(x, jnp.int32) for x in (places, groups, places // 9 % 3))

    def attend(q, k, v):
        return masked_attention(
            q, k, v, q_positions=places, q_segments=groups, window=window, softcap=softcap,
            blocks=of_images if blocks else None,
        )  # fmt: skip

    return attend


def _cached(q, k, v):
    """The last 70 tokens of rows whose keys were there before."""
    places, groups = jnp.arange(TOKENS)[None].repeat(2, 0), jnp.ones((2, TOKENS), jnp.int32)
    return masked_attention(
        q[:, -70:], k, v, q_positions=places[:, -70:], kv_positions=places, q_segments=groups[:, -70:],
        kv_segments=groups, window=None,
    )  # fmt: skip


def _segments(q, k, v):
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    segments = jnp.arange(q.shape[1]) // 37
    starts = jnp.asarray([*range(0, q.shape[1], 37), -1])
    return segment_attention(q, k, v, segments, starts)


TOKENS = 150
WAYS = {
    "packed": _masked(),
    "of a cache": _cached,
    "window": _masked(window=30),
    "softcap": _masked(softcap=0.7),
    "blocks": _masked(blocks=True),
    "softcap, blocks": _masked(softcap=0.7, blocks=True),
    "mask of each row": lambda q, k, v: plain_attention(q, k, v, _mask(2, 1, TOKENS)),
    "mask of all rows and each head": lambda q, k, v: plain_attention(q, k, v, _mask(1, HEADS, TOKENS)),
    "mask of keys": lambda q, k, v: plain_attention(q, k, v, _mask(2, 1, 1)),
    "no mask": plain_attention,
    "fewer keys": lambda q, k, v: plain_attention(q, k[:, :90], v[:, :90], _mask(2, 1, TOKENS)[..., :90]),
    "segments": _segments,
}


def _mask(rows, heads, tokens):
    return jnp.asarray(np.random.default_rng(2).random((rows, heads, tokens, TOKENS)) < 0.5)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("at_once", [64, 50, 1])
def test_some_queries_at_a_time_are_all_at_once(name, at_once, monkeypatch):
    """Values and gradients; scores of all queries with all keys are never there."""
    rng = np.random.default_rng(3)
    q, d_out = (rng.standard_normal((2, TOKENS, HEADS, H)).astype(np.float32) for _ in range(2))
    k, v = rng.standard_normal((2, 2, TOKENS, KV, H)).astype(np.float32)

    def both_ways(q, k, v):
        out, vjp = jax.vjp(WAYS[name], q, k, v)
        return out, *vjp(jnp.asarray(d_out[:, -70:] if name == "of a cache" else d_out).reshape(out.shape))

    want = both_ways(q, k, v)
    keys, batch = {"fewer keys": (90, 2), "segments": (2 * TOKENS, 1)}.get(name, (TOKENS, 2))
    monkeypatch.setattr(attention, "SCORES_BYTES", 4 * batch * HEADS * keys * at_once)
    for got, exact in zip(both_ways(q, k, v), want, strict=True):
        assert np.abs(got - exact).max() <= GRADIENT * np.abs(exact).max()
    text = jax.jit(both_ways).lower(q, k, v).as_text()
    assert f"x{TOKENS}x{keys}xf32" not in text and f"x{2 * TOKENS}x{keys}xf32" not in text


@pytest.mark.parametrize("dtype, capability", [("bfloat16", (7, 5)), ("float16", None)])
def test_where_a_device_has_no_products_of_16_bits_it_is_float32(dtype, capability):
    """bfloat16 on a T4, float16 on a CPU: jax.nn asks for both by name, and gets an error."""
    rng = np.random.default_rng(4)
    q, (k, v) = rng.standard_normal((2, 9, HEADS, H)), rng.standard_normal((2, 2, 9, KV, H))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    if capability is not None:
        with target.tracing_for(capability):
            text = jax.jit(plain_attention).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
        assert "algorithm" not in text
        return
    want = plain_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_array_equal(plain_attention(q, k, v), want.astype(dtype))


def test_whole_images_are_cudnns_on_a_gpu():
    """Lowered for Hopper, heads of 72 as in SigLIP's largest tower: not causal, and no [S, S] array."""
    x = jax.ShapeDtypeStruct((2, 144, 2, 72), jnp.bfloat16)
    loss = lambda q, k, v: image_attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    with target.tracing_for((9, 0)):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "NO_MASK" in text and "144x144x" not in text
