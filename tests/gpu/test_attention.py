"""On an NVIDIA GPU (`pytest -m gpu`): attention by cuDNN beside float32 references, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, poisoned, relative
from tolerances import BF16

from jaxtune.kernels import target
from jaxtune.kernels.attention import (
    cudnn_attention,
    image_attention,
    masked_attention,
    segment_attention,
    window_attention,
)

pytestmark = pytest.mark.gpu
HEADS, KV, H = 8, 2, 64

# Per row the lengths of its documents (the last may be padding); how many slots are left unused.
PACKED = {
    "one row, every slot used": ([[300, 212]], 0),
    "one row, slots left": ([[200, 312]], 3),
    "two rows, every slot used": ([[300, 212], [256, 256]], 0),
    "two rows, unequal": ([[1, 100, 411], [512]], 0),
    "two rows, slots left": ([[37, 475], [500, 12]], 3),
    "one document a row": ([[512], [512]], 2),
    "many short ones": ([[32] * 16, [64] * 8], 1),
}


def both_ways(function):
    """(gradient of its value, arguments) -> value and gradients."""

    def run(d_out, *arguments):
        out, vjp = jax.vjp(function, *arguments)
        return out, *vjp(d_out.astype(out.dtype))

    return run


def errors_of(function, exact, d_out, arguments, real=None) -> list[float]:
    """Relative errors of value and gradients in bfloat16 beside the reference in float32, where `real` is true."""
    low = [x.astype(jnp.bfloat16) for x in arguments]
    with jax.default_matmul_precision("highest"):
        want = both_ways(exact)(d_out, *(x.astype(jnp.float32) for x in low))
    got = poisoned(both_ways(function))(d_out, *low)
    if real is not None:
        got, want = ([jnp.where(real, x, 0) for x in found] for found in (got, want))
    return [relative(*pair) for pair in zip(got, want, strict=True)]


def check_attention(rows: int, tokens: int, positions, segments, starts, window, h: int = H) -> None:
    """cuDNN's beside the masked reference."""
    draws = Draws()
    q, k, v, d_out = (draws.normal(rows, tokens, heads, h) for heads in (HEADS, KV, KV, HEADS))

    def exact(q, k, v):
        return masked_attention(q, k, v, q_positions=positions, q_segments=segments, window=window)

    found = errors_of(lambda q, k, v: cudnn_attention(q, k, v, starts, window), exact, d_out, (q, k, v))
    assert max(found) <= BF16, found


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", [1, 2])
def test_causal_attention(rows, window):
    shape = (rows, 512)
    positions = jnp.broadcast_to(jnp.arange(512), shape)
    check_attention(rows, 512, positions, jnp.ones(shape, jnp.int32), None, window)


@pytest.mark.parametrize("h", [64, 72])
def test_attention_of_whole_images(h):
    """SigLIP's: 27 x 27 patches, heads of 64 or 72."""
    draws = Draws()
    d_out, *qkv = (draws.normal(2, 729, HEADS, h) for _ in range(4))
    exact = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla")  # noqa: E731
    found = errors_of(image_attention, exact, d_out, qkv)
    assert max(found) <= BF16, found


@pytest.mark.parametrize("kind", ["images", "windows"])
def test_attention_of_patches(kind):
    """Heads of 80, as Qwen2.5-VL's tower has them; the last patches are padding."""
    lengths = np.array([64, 40, 200, 1, 64, 143]) if kind == "images" else np.array([64, 40, 33, 1, 64, 64])
    patches, count = 576, len(lengths)
    groups = np.zeros(patches, np.int32)
    groups[: lengths.sum()] = np.repeat(np.arange(1, count + 1), lengths)
    first = np.cumsum([0, *lengths])
    draws, real = Draws(), (groups > 0)[:, None, None]
    d_out, *qkv = (draws.normal(1, patches, HEADS, 80) for _ in range(4))

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

    found = errors_of(attend, exact, d_out * real, qkv, real)
    assert max(found) <= BF16, found


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", PACKED)
def test_packed_attention(name, window):
    check_packed(name, window, H)


@pytest.mark.parametrize("window", [None, 100])
def test_heads_of_256(window):
    """Gemma's."""
    check_packed("two rows, unequal", window, 256)


def check_packed(name, window, h):
    if target.capability() < (9, 0):
        pytest.skip(f"cuDNN packs rows on sm_90, this is {target.capability()}")
    rows, spare = PACKED[name]
    tokens, slots = sum(rows[0]), max(2, *map(len, rows)) + spare
    starts = np.full((len(rows), slots), -1, np.int32)
    positions, segments = (np.zeros((len(rows), tokens), np.int32) for _ in range(2))
    for row, lengths in enumerate(rows):
        starts[row, : len(lengths)] = np.cumsum([0, *lengths[:-1]])
        positions[row] = np.concatenate([np.arange(n) for n in lengths])
        segments[row] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    check_attention(len(rows), tokens, positions, segments, jnp.asarray(starts), window, h)
