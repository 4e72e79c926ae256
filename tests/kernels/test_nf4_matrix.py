"""The matrix of dequantised weights beside the adapters: its reference, and its kernel's code run in NumPy and lowered.

The kernel is inline code, which no interpreter runs: here NumPy stands for the operations it is made of, for all
threads at once. The GPU's own are in tests/gpu/test_nf4_matrix.py.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4_matrix, target
from jaxtune.quant import NF4, NF4_CODE, dequantize_nf4, dynamic_map, quantize_nf4

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


class Written:
    """A result: its bytes, and how often each was written."""

    def __init__(self, count):
        self.bytes, self.times = np.zeros(count, np.uint8), np.zeros(count, int)

    def store(self, offset, words):
        data = np.stack(np.broadcast_arrays(*words), -1).astype("<u4").view(np.uint8)
        assert (offset % data.shape[-1] == 0).all()
        places = offset[..., None] + np.arange(data.shape[-1])
        self.bytes[places] = data
        np.add.at(self.times, places, 1)


def load(ref, offset, kind, alignment):
    """The numbers of a type that lie `offset` bytes behind the first of a ref, an array."""
    assert np.all(offset % alignment == 0)
    size = np.dtype(kind).itemsize
    return ref.ravel().view(np.uint8)[offset[..., None] + np.arange(size)].view(kind)[..., 0]


def load_words(ref, offset, count):
    assert np.all(offset % (4 * count) == 0)
    return [load(ref, offset + np.uint32(4 * i), np.uint32, 4) for i in range(count)]


def packed(low, high, itemsize):
    pair = np.stack([low, high], -1).astype(BF16 if itemsize == 2 else E4M3)
    return pair.view(np.uint32 if itemsize == 2 else np.uint16)[..., 0]


@pytest.fixture
def numpy_for_threads(monkeypatch):
    """What the kernel's code is made of acts on arrays [CTAs, threads], unsigned and of 32 bits as on a GPU."""
    for name, instead in {
        "arith": SimpleNamespace(
            addi=np.add, muli=np.multiply, divui=np.floor_divide, remui=np.remainder, shrui=np.right_shift,
            shli=np.left_shift, ori=np.bitwise_or, extui=lambda kind, x: x.astype(kind), addf=np.add, mulf=np.multiply,
        ),
        "utils": SimpleNamespace(thread_idx=lambda: np.arange(nf4_matrix.THREADS, dtype=np.uint32)),
        "_i8": lambda: np.uint8,
        "_i32": lambda: np.uint32,
        "_f32": lambda: np.float32,
        "int32": np.uint32,
        "_load": load,
        "_load_words": load_words,
        "_value": lambda table, word, nibble: table[(word >> np.uint32(4 * nibble)) & np.uint32(15)],
        "_packed": packed,
        "_store_words": Written.store,
    }.items():  # fmt: skip
        monkeypatch.setattr(nf4_matrix, name, instead)


def run(weights, extra, scale, below, transposed):
    """The kernel's result and how often each of its bytes was written: every part of its plan, in NumPy."""
    want = nf4_matrix.reference(weights, extra, scale, below, transposed)
    plan = nf4_matrix._plan(weights, extra, scale is not None, below, transposed)
    leaves = [np.asarray(leaf) for weight in weights for leaf in weight if leaf is not None]
    inverse, out = None if scale is None else np.float32(1 / scale), Written(want.nbytes)
    work = nf4_matrix._dequantise_columns if transposed else nf4_matrix._dequantise_rows
    ctas = 0
    for part in plan.parts:
        assert part.first == ctas
        items = nf4_matrix._Items(part, plan, leaves[part.refs], dynamic_map(), NF4_CODE, inverse, out)
        work(items, np.arange(part.count, dtype=np.uint32)[:, None])
        ctas += part.count
    assert plan.extra_first == ctas
    nf4_matrix._copy_extra(
        plan, np.asarray(extra), out, np.arange(plan.extra_count, dtype=np.uint32)[:, None]
    )
    return out.bytes.view(want.dtype).reshape(want.shape), out.times, np.asarray(want)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "outs, width, extra, dtype, below, transposed",
    [
        ((128, 64, 64), 256, (256, 64), BF16, False, False),  # like q, k and v
        ((128, 128), 256, (256, 128), BF16, False, False),
        ((128,), 256, (64, 256), BF16, True, False),
        ((128, 64), 256, (192, 192), BF16, False, False),
        ((256, 128, 128), 256, (512, 192), E4M3, False, False),
        ((128,), 512, (256, 512), E4M3, True, False),
        ((256, 128), 256, (256, 192), E4M3, False, True),
        ((256, 128), 512, (64, 384), E4M3, True, True),
    ],
)
def test_the_kernels_code_writes_every_byte_once(
    numpy_for_threads, outs, width, extra, dtype, below, transposed, double_quant
):
    rng = np.random.default_rng(0)
    weights = [quantize_nf4(rng.normal(size=(out, width)).astype(np.float32), double_quant) for out in outs]
    extra = jnp.asarray(rng.normal(size=extra), dtype)
    with target.tracing_for((9, 0)):
        assert nf4_matrix.supported(weights, extra, below, transposed)
    scale = np.float32(2.0**-6) if dtype == E4M3 else None
    got, times, want = run(weights, extra, scale, below, transposed)
    assert (times == 1).all()
    np.testing.assert_array_equal(got, want)
