"""On an NVIDIA GPU (`pytest -m gpu`): each kernel path beside a float32 reference, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import BF16

from jaxtune.kernels.attention import (
    cudnn_attention,
    image_attention,
    masked_attention,
    segment_attention,
    window_attention,
)
from jaxtune.kernels.linear import Adapter, adapted_linear, reference
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.gpu
HEADS, KV, H = 8, 2, 64

# Per row the lengths of its documents (the last may be padding); how many slots are left unused.
PACKED = {
    "one row, every slot used": ([[300, 212]], 0),
    "two rows, every slot used": ([[300, 212], [256, 256]], 0),
    "two rows, unequal": ([[1, 100, 411], [512]], 0),
    "two rows, slots left": ([[37, 475], [500, 12]], 3),
    "one document a row": ([[512], [512]], 2),
    "many short ones": ([[32] * 16, [64] * 8], 1),
}


def random(key, *shape):
    return jax.random.normal(jax.random.key(key), shape, jnp.float32)


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def compare_attention(
    rows: int, tokens: int, positions, segments, starts, window, seed: int, h: int = H
) -> dict[str, float]:
    """Relative errors of output and gradients in bfloat16 beside the masked reference in float32."""
    q, k, v = (random(seed + i, rows, tokens, heads, h) for i, heads in enumerate((HEADS, KV, KV)))
    d_out = random(seed + 3, *q.shape)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]

    def exact(q, k, v):
        places = {"q_positions": positions, "kv_positions": positions}
        return masked_attention(q, k, v, **places, q_segments=segments, kv_segments=segments, window=window)

    with jax.default_matmul_precision("highest"):
        want, vjp = jax.vjp(exact, *(x.astype(jnp.float32) for x in low))
        want_grads = vjp(d_out)
    got, vjp = jax.vjp(lambda q, k, v: cudnn_attention(q, k, v, starts, window), *low)
    got_grads = vjp(d_out.astype(jnp.bfloat16))
    names = ("out", "dq", "dk", "dv")
    return {n: relative(a, b) for n, a, b in zip(names, (got, *got_grads), (want, *want_grads), strict=True)}


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", [1, 2])
def test_causal_attention(rows, window):
    shape = (rows, 512)
    positions = jnp.broadcast_to(jnp.arange(512), shape)
    errors = compare_attention(rows, 512, positions, jnp.ones(shape, jnp.int32), None, window, seed=rows)
    assert max(errors.values()) <= BF16, errors


@pytest.mark.parametrize("h", [64, 72])
def test_attention_of_whole_images(h):
    """SigLIP's: 27 x 27 patches, heads of 64 or 72."""
    q, k, v, d_out = (random(30 + i, 2, 729, HEADS, h) for i in range(4))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    exact = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla")  # noqa: E731
    with jax.default_matmul_precision("highest"):
        want, vjp = jax.vjp(exact, *(x.astype(jnp.float32) for x in low))
        want_grads = vjp(d_out)
    got, vjp = jax.vjp(image_attention, *low)
    pairs = zip((got, *vjp(d_out.astype(jnp.bfloat16))), (want, *want_grads), strict=True)
    errors = [relative(*pair) for pair in pairs]
    assert max(errors) <= BF16, errors


@pytest.mark.parametrize("kind", ["images", "windows"])
def test_attention_of_patches(kind):
    """Heads of 80, as Qwen2.5-VL's tower has them; the last patches are padding."""
    lengths = np.array([64, 40, 200, 1, 64, 143]) if kind == "images" else np.array([64, 40, 33, 1, 64, 64])
    patches, count = 576, len(lengths)
    groups = np.zeros(patches, np.int32)
    groups[: lengths.sum()] = np.repeat(np.arange(1, count + 1), lengths)
    first = np.cumsum([0, *lengths])
    q, k, v, d_out = (random(20 + i, 1, patches, HEADS, 80) for i in range(4))
    d_out = d_out * (groups > 0)[:, None, None]

    def attend(q, k, v):
        if kind == "images":
            return segment_attention(q, k, v, jnp.asarray(groups), jnp.asarray([*first, -1]))
        windows = np.full((count, 64), -1, np.int32)
        places = windows.size + np.arange(patches, dtype=np.int32)
        for i, (at, length) in enumerate(zip(first, lengths, strict=False)):
            windows[i, :length] = np.arange(at, at + length)
            places[at : at + length] = 64 * i + np.arange(length)
        return window_attention(q, k, v, jnp.asarray(windows), jnp.asarray(places))

    def exact(q, k, v):
        mask = (groups[:, None] == groups)[None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        want, vjp = jax.vjp(exact, *(x.astype(jnp.float32) for x in low))
        want_grads = vjp(d_out)
    got, vjp = jax.vjp(attend, *low)
    got_grads = vjp(d_out.astype(jnp.bfloat16))
    real = (groups > 0)[:, None, None]
    pairs = zip((got, *got_grads), (want, *want_grads), strict=True)
    errors = [relative(jnp.where(real, a, 0), jnp.where(real, b, 0)) for a, b in pairs]
    assert max(errors) <= BF16, errors


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", PACKED)
def test_packed_attention(name, window):
    check_packed(name, window, H)


@pytest.mark.parametrize("window", [None, 100])
def test_heads_of_256(window):
    """Gemma's."""
    check_packed("two rows, unequal", window, 256)


def check_packed(name, window, h):
    rows, spare = PACKED[name]
    tokens, slots = sum(rows[0]), max(2, *map(len, rows)) + spare
    starts = np.full((len(rows), slots), -1, np.int32)
    positions, segments = (np.zeros((len(rows), tokens), np.int32) for _ in range(2))
    for row, lengths in enumerate(rows):
        starts[row, : len(lengths)] = np.cumsum([0, *lengths[:-1]])
        positions[row] = np.concatenate([np.arange(n) for n in lengths])
        segments[row] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    errors = compare_attention(len(rows), tokens, positions, segments, jnp.asarray(starts), window, 7, h)
    assert max(errors.values()) <= BF16, errors


@pytest.mark.parametrize(
    "width, outs, ranks",
    [(1024, (1024, 256, 256), (16, 16, 16)), (1024, (2048, 2048), (16, 8)), (2048, (1024,), (16,))],
)
def test_the_joined_product(width, outs, ranks):
    """bfloat16 on the GPU beside two products a layer in float32."""
    weights = tuple(quantize_nf4(0.1 * random(i, out, width)) for i, out in enumerate(outs))
    adapters = tuple(
        Adapter(0.1 * random(10 + i, width, r), 0.1 * random(20 + i, r, out))
        for i, (out, r) in enumerate(zip(outs, ranks, strict=True))
    )
    x, dy = random(30, 2, 300, width), random(31, 2, 300, sum(outs))

    def probe(product, dtype):
        cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
        y, vjp = jax.vjp(lambda x, a: product(x, weights, a), x.astype(dtype), cast(adapters))
        return jax.tree.leaves((y, vjp(dy.astype(dtype))))

    with jax.default_matmul_precision("highest"):
        want = probe(reference, jnp.float32)
    for ours, theirs in zip(probe(adapted_linear, jnp.bfloat16), want, strict=True):
        assert relative(ours, theirs) <= BF16
