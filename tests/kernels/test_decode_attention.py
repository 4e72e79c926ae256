"""Attention of few queries with a cache, in Mosaic GPU's interpreter and compiled for CUDA at served shapes.

The interpreter knows no register operands of wgmma: there a jnp twin adds the values of a chunk. What the twin replaces
is tested on a GPU only (tests/gpu/test_decode_attention.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import BF16, GRADIENT

from jaxtune.kernels import decode_attention as da
from jaxtune.kernels import target

pytestmark = pytest.mark.usefixtures("quick_compilation")


def given(batch, kv, queries, h, columns, first, end, dtype=jnp.bfloat16):
    """(q, k, v, first, end), random."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    arrays = draw(batch, kv, queries, h), draw(batch, kv, columns, h), draw(batch, kv, columns, h)
    return *arrays, jnp.array(first, jnp.int32), jnp.array(end, jnp.int32)


def softmax(q, k, v, first, end):
    """(out, log-sum-exp) in float64, a query and its columns at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for at in np.ndindex(*lse.shape):
        seen = slice(int(first[at[0]]), int(end[at[0]]))
        scores = k[at[:2]][seen] @ q[at] / np.sqrt(q.shape[-1])
        with np.errstate(divide="ignore"):  # no column: 0 and -inf
            lse[at] = np.log(np.exp(scores).sum())
        out[at] = np.exp(scores - lse[at]) @ v[at[:2]][seen]
    return out, lse


def test_reference():
    arguments = given(3, 2, 3, 16, 40, [0, 7, 7], [40, 9, 7], jnp.float32)
    out, lse = softmax(*arguments)
    got = da.decode_attention(*arguments)
    np.testing.assert_allclose(got.out, out, atol=GRADIENT)
    np.testing.assert_allclose(got.lse, lse, atol=GRADIENT)


def test_parts_are_one_softmax():
    """Also where a part sees nothing."""
    q, k, v, first, end = given(2, 1, 3, 16, 40, [0, 20], [40, 40], jnp.float32)
    cut = jnp.minimum(jnp.maximum(first, 20), end)
    parts = [da.reference(q, k, v, first, cut), da.reference(q, k, v, cut, end)]
    assert np.isneginf(parts[0].lse[1]).all()
    np.testing.assert_allclose(da.merge(parts), softmax(q, k, v, first, end)[0], atol=GRADIENT)


CASES = {
    "queries of one row": ((2, 1, 4, 64, 256, [0, 0], [100, 256]), 1),
    "more chunks than stages": ((1, 1, 4, 128, 448, [0], [430]), 1),
    "a group's queries, a window, empty parts": ((2, 1, 32, 64, 256, [70, 0], [100, 1]), 3),
    "more queries than rows": ((1, 1, 72, 64, 64, [0], [64]), 1),
    "no column": ((3, 1, 4, 64, 256, [0, 70, 128], [256, 70, 128]), 1),
    "no column in any part": ((3, 1, 4, 64, 256, [0, 70, 128], [256, 70, 100]), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_reference(name):
    """Memory starts as NaN in the interpreter: what is finite has been written."""
    shapes, splits = CASES[name]
    arguments = given(*shapes)
    interpret = plgpu.InterpretGPUParams(detect_races=name == "more chunks than stages")
    parts = jax.jit(lambda *a: da.kernel(*a, interpret, splits))(*arguments)
    got = da.merge([da.Attended(*part) for part in zip(*parts, strict=True)])
    out, lse = softmax(*arguments)
    assert np.isfinite(np.asarray(parts[0], np.float32)).all()
    assert np.linalg.norm(np.asarray(got, np.float64) - out) <= BF16 * np.linalg.norm(out)
    np.testing.assert_allclose(jax.nn.logsumexp(parts[1], axis=0), lse, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(256, 8, 4, 128, 1024), (8, 8, 4, 128, 256), (32, 8, 32, 128, 512), (8, 3, 24, 64, 64)]
)
def test_it_is_lowered_for_hopper(shape):
    batch, kv, queries, h, columns = shape
    bf16 = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    bounds = jax.ShapeDtypeStruct((batch,), jnp.int32)
    keys = bf16(batch, kv, columns, h)
    with target.tracing_for((9, 0)):
        traced = jax.jit(lambda *a: da.decode_attention(*a)).trace(
            bf16(batch, kv, queries, h), keys, keys, bounds, bounds
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_what_is_supported():
    q, k = jnp.zeros((1, 1, 4, 128), jnp.bfloat16), jnp.zeros((1, 1, 64, 128), jnp.bfloat16)
    assert not da.supported(q, k)
    with target.tracing_for((9, 0)):
        assert da.supported(q, k)
        assert not da.supported(q.astype(jnp.float32), k)
        assert not da.supported(q, k[:, :, :32])
        assert not da.supported(q[..., :80], k[..., :80])
    with target.tracing_for((8, 9)):
        assert not da.supported(q, k)
