"""Products in 8-bit floats: their error, the adapter's exactness, extreme scales, and what a GPU is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import BF16, FP8, FP8_GRADIENT, GRADIENT

from jaxtune.kernels import fp8, linear, target
from jaxtune.kernels.fp8 import fp8_linear
from jaxtune.kernels.linear import Adapter
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    (128, (128, 64, 64), (8, 8, 8)),  # like q, k, v
    (256, (128,), (8,)),  # like down
    (128, (128, 64, 64), (8, None, 4)),
    (128, (64, 64), (None, None)),
    (64, (64, 64), (None, 80)),  # more ranks than one tile of columns
]


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def layers(width, outs, ranks, double_quant=True, b_scale=0.1):
    """(weights, adapters) of layers that share an input."""
    weights = [
        quantize_nf4(np.asarray(normal(i, out, width, scale=0.1)), double_quant) for i, out in enumerate(outs)
    ]
    adapters = [
        None
        if r is None
        else Adapter(normal(10 + i, width, r, scale=0.1), normal(20 + i, r, out, scale=b_scale))
        for i, (out, r) in enumerate(zip(outs, ranks, strict=True))
    ]
    return tuple(weights), tuple(adapters)


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def joined(x, weights, adapters):
    return jnp.concatenate(fp8_linear(x, weights, adapters), axis=-1)


def probe(product, x, weights, adapters, dy):
    """(y, dx, gradients of the adapters)"""
    y, vjp = jax.vjp(lambda x, a: product(x, weights, a), x, adapters)
    return y, *vjp(dy)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("width, outs, ranks", CASES)
def test_value_and_gradients_are_near_the_float32_reference(width, outs, ranks, double_quant):
    weights, adapters = layers(width, outs, ranks, double_quant)
    x, dy = normal(1, 2, 9, width), normal(2, 2, 9, sum(outs))
    y, dx, grads = jax.jit(lambda: probe(joined, x, weights, adapters, dy))()
    want, want_dx, want_grads = probe(linear.reference, x, weights, adapters, dy)
    assert relative(y, want) < FP8
    assert relative(dx, want_dx) < FP8_GRADIENT
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert relative(got, exact) < GRADIENT  # of A and B: products of unrounded arrays


def test_the_joined_product_is_that_of_the_8_bit_numbers():
    """Beside exact products of the rounded matrices: what the adapter's 8-bit parts leave out is all that differs."""
    weights, adapters = layers(*CASES[2])
    x, dy = normal(1, 18, 128), normal(2, 18, 256)
    y, dx, _ = probe(joined, x, weights, adapters, dy)
    assert relative(y, jnp.concatenate(fp8.reference(x, weights, adapters), axis=1)) < BF16 / 10
    matrix = jnp.concatenate(
        [fp8.rounded(linear.dense(w, jnp.float32), fp8.E4M3, axis=None) for w in weights]
    )
    through = dy @ linear.joined_b(weights, adapters).T @ linear.joined_a(adapters).T
    assert relative(dx, fp8.rounded(dy, fp8.E5M2) @ matrix + through) < BF16 / 10


@pytest.mark.parametrize("b_scale", [1e-6, 1e-3, 0.1, 30.0])
def test_the_adapters_part_is_as_exact_as_bfloat16(b_scale):
    """However large B is beside W: what the adapter adds to y and to dx, down to far below their rounding."""
    weights, adapters = layers(256, (128, 128), (8, 8), b_scale=b_scale)
    rank0 = tuple(Adapter(ad.a[:, :0], ad.b[:0]) for ad in adapters)
    x, dy = normal(1, 32, 256), normal(2, 32, 256)
    a, b = linear.joined_a(adapters), linear.joined_b(weights, adapters)
    with_adapters, without = (probe(joined, x, weights, ads, dy)[:2] for ads in (adapters, rank0))
    for got, base, want in zip(with_adapters, without, (x @ a @ b, dy @ b.T @ a.T), strict=True):
        error = np.linalg.norm(got - base - want)
        assert error < BF16 * np.linalg.norm(want) + BF16 / 500 * np.linalg.norm(got)


def test_a_massive_row_leaves_the_others_as_they_are():
    weights, adapters = layers(*CASES[0])
    x = normal(1, 6, 128)
    y, massive = joined(x, weights, adapters), joined(x.at[2].mul(1e4), weights, adapters)
    np.testing.assert_array_equal(np.delete(massive, 2, 0), np.delete(y, 2, 0))
    assert relative(massive[2], linear.reference(x[2] * 1e4, weights, adapters)) < 2 * FP8


def test_zeros_and_tiny_rows():
    weights, adapters = layers(*CASES[0])
    x = normal(1, 4, 128).at[1].set(0).at[2].mul(1e-12)
    y, dx, grads = probe(joined, x, weights, adapters, normal(2, 4, 256).at[0].set(0))
    assert not y[1].any() and not dx[0].any()
    assert relative(y[2], linear.reference(x[2], weights, adapters)) < 2 * FP8
    nothing = tuple(quantize_nf4(np.zeros((64, 128), np.float32)) for _ in range(2))
    zeros = tuple(Adapter(jnp.zeros((128, 4)), jnp.zeros((4, 64))) for _ in nothing)
    for leaf in jax.tree.leaves(probe(joined, x, nothing, zeros, normal(2, 4, 128))[:2]):
        assert not leaf.any()
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_in_its_row(bad):
    weights, adapters = layers(*CASES[0])
    y, dx, _ = probe(
        joined, normal(1, 4, 128).at[1, 5].set(bad), weights, adapters, normal(2, 4, 256).at[2, 7].set(bad)
    )
    assert not np.isfinite(y[1]).any() and np.isfinite(np.delete(y, 1, 0)).all()
    assert not np.isfinite(dx[2]).any() and np.isfinite(np.delete(dx, 2, 0)).all()


def test_bfloat16_in_bfloat16_out():
    weights, adapters = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 and leaf.ndim == 2 else leaf,
        layers(*CASES[0]),
    )
    x, dy = normal(1, 18, 128).astype(jnp.bfloat16), normal(2, 18, 256).astype(jnp.bfloat16)
    y, dx, grads = probe(joined, x, weights, adapters, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, dx, grads))} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, adapters, dy))
    want, want_dx, want_grads = probe(linear.reference, wide[0], weights, wide[1], wide[2])
    assert relative(y, want) < FP8 and relative(dx, want_dx) < FP8_GRADIENT
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert relative(got, exact) < 2 * BF16  # two products in a row


def test_residuals_are_the_codes():
    """Nothing of the weights' size is kept for the backward pass but their stored form."""
    weights, adapters = layers(512, (256,), (4,))
    _, vjp = jax.vjp(lambda x: joined(x, weights, adapters), jnp.ones((4, 512)))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept < 256 * 512 * 0.75 + 4 * 4 * (512 + 256) * 3


def test_a_gpu_gets_products_of_8_bit_operands_with_both_contracting_dimensions_last():
    """As cublasLt wants them; XLA then calls it without transposing (seen in the HLO of a compiled step)."""
    weights, adapters = layers(128, (256, 256), (16, 16))
    x, dy = jnp.ones((32, 128), jnp.bfloat16), jnp.ones((32, 512), jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters)
    with target.tracing_for((9, 0)):
        traced = jax.jit(lambda x, dy: probe(joined, x, weights, low, dy)[:2]).trace(x, dy)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line and "f8E" in line]
    assert len(products) == 2 and all("contracting_dims = [1] x [1]" in line for line in products)
    assert "tensor<32x256xf8E4M3FN>, tensor<512x256xf8E4M3FN>) -> tensor<32x512xbf16>" in products[0]
    assert "tensor<32x704xf8E5M2>, tensor<128x704xf8E4M3FN>) -> tensor<32x128xbf16>" in products[1]
