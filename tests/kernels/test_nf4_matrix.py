"""The matrix of dequantised weights beside the adapters: its reference and its kernel's lowering. The kernel's code is
inline, which no interpreter runs: its values are checked in tests/gpu/test_nf4_matrix.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4_matrix, target
from jaxtune.quant import NF4, dequantize_nf4, quantize_nf4

BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn


def shape(out, width, double_quant=True):
    codes = jax.ShapeDtypeStruct((out, width // 2), jnp.uint8)
    if not double_quant:
        return NF4(codes, jax.ShapeDtypeStruct((out, width // 64), jnp.float32))
    scales = jax.ShapeDtypeStruct((-(-out * width // 64 // 256),), jnp.float32)
    offset = jax.ShapeDtypeStruct((), jnp.float32)
    return NF4(codes, jax.ShapeDtypeStruct((out, width // 64), jnp.uint8), scales, offset)


QKV, O = ((4096, 4096), (1024, 4096), (1024, 4096)), ((4096, 4096),)
GATE_UP, DOWN = ((14336, 4096),) * 2, ((4096, 14336),)


@pytest.mark.parametrize(
    "shapes, extra, dtype, below, transposed",
    [
        (QKV, (6144, 64), BF16, False, False),
        (QKV, (64, 4096), BF16, True, False),
        (GATE_UP, (28672, 64), BF16, False, False),
        (DOWN, (64, 14336), BF16, True, False),
        (QKV, (6144, 192), E4M3, False, False),
        (QKV, (4096, 256), E4M3, False, True),
        (O, (4096, 64), E4M3, False, False),
        (O, (4096, 128), E4M3, False, True),
        (GATE_UP, (4096, 192), E4M3, False, True),
        (DOWN, (14336, 128), E4M3, False, True),
        (DOWN, (64, 14336), E4M3, True, False),
        (GATE_UP, (64, 28672), E4M3, True, True),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_it_lowers_for_a_gpu(shapes, extra, dtype, below, transposed, double_quant):
    weights = [shape(*s, double_quant) for s in shapes]
    extra = jax.ShapeDtypeStruct(extra, dtype)
    with target.tracing_for((9, 0)):
        assert nf4_matrix.supported(weights, extra, below, transposed)
    scale = jax.ShapeDtypeStruct((), jnp.float32) if dtype == E4M3 else None
    call = jax.jit(lambda w, e, s: nf4_matrix.kernel(w, e, s, below, transposed))
    program = call.trace(weights, extra, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("mosaic_gpu") >= 1


def test_results_that_32_bits_do_not_address_are_left_to_xla():
    extra = jax.ShapeDtypeStruct((65536, 64), BF16)
    with target.tracing_for((9, 0)):
        assert nf4_matrix.supported([shape(65536, 16384)], extra, False, False)
        assert not nf4_matrix.supported([shape(65536, 32768)], extra, False, False)


def test_what_it_leaves_to_xla():
    extra = jax.ShapeDtypeStruct((960, 64), BF16)
    assert not nf4_matrix.supported([shape(960, 576)], extra, False, False)  # no GPU
    with target.tracing_for((9, 0)):
        assert not nf4_matrix.supported([shape(960, 576)], extra, False, False)  # no whole blocks
        assert not nf4_matrix.supported([jax.ShapeDtypeStruct((4096, 4096), BF16)], extra, False, False)
        assert not nf4_matrix.supported(
            [shape(4096, 4096)], jax.ShapeDtypeStruct((4096, 64), BF16), False, True
        )
        assert not nf4_matrix.supported(
            [shape(4096, 4096)], jax.ShapeDtypeStruct((4096, 64), jnp.float32), False, False
        )


def test_the_reference_is_the_dequantised_weights_and_what_stands_beside():
    rng = np.random.default_rng(0)
    weights = [quantize_nf4(rng.normal(size=(out, 128)).astype(np.float32)) for out in (32, 16)]
    dense = np.concatenate([dequantize_nf4(w) for w in weights])
    beside, below = rng.normal(size=(48, 8)), rng.normal(size=(8, 128))
    arrays = [jnp.asarray(x, jnp.float32) for x in (beside, below)]
    np.testing.assert_array_equal(nf4_matrix.nf4_matrix(weights, arrays[0]), np.hstack([dense, arrays[0]]))
    np.testing.assert_array_equal(
        nf4_matrix.nf4_matrix(weights, arrays[1], below=True), np.vstack([dense, arrays[1]])
    )
    eighth = jnp.asarray(rng.normal(size=(128, 8)), E4M3)
    got = nf4_matrix.nf4_matrix(weights, eighth, scale=jnp.float32(0.25), transposed=True)
    want = jnp.asarray(dense.T * 4).astype(E4M3)
    np.testing.assert_array_equal(got.astype(jnp.float32)[:, :48], want.astype(jnp.float32))
