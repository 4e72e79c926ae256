"""The product with a frozen weight: its value, its gradient, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENT

from jaxtune.kernels import linear, target
from jaxtune.kernels.linear import Adapter, adapted_linear, dense, frozen_linear, reference
from jaxtune.quant import quantize_nf4


@pytest.fixture(autouse=True)
def rows_enough(monkeypatch):
    """The tests' few rows count as many, so that a GPU's program joins its products."""
    monkeypatch.setattr(linear, "FEW_ROWS", 0)


def test_value_and_gradient_are_those_of_the_dequantised_weight():
    rng = np.random.default_rng(0)
    weight = quantize_nf4(rng.normal(size=(96, 128)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(5, 7, 128)), jnp.float32)
    matrix = dense(weight, jnp.float32)

    def probe(product):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)

    got, got_grad = probe(lambda x: frozen_linear(x, weight))
    want, want_grad = probe(lambda x: x @ matrix.T)
    np.testing.assert_allclose(got, want, rtol=GRADIENT)
    assert np.abs(got_grad - want_grad).max() <= GRADIENT * np.abs(want_grad).max()


def test_residuals_are_the_codes():
    """The backward pass keeps the stored weight and nothing of the size of the dequantised one."""
    weight = quantize_nf4(np.ones((256, 512), np.float32))
    x = jnp.ones((4, 512))
    _, vjp = jax.vjp(lambda x: frozen_linear(x, weight), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept <= sum(leaf.nbytes for leaf in weight if leaf is not None)


def layers(width, outs, ranks, seed=0):
    """(weights, adapters) of layers that share an input: NF4 but the last, an adapter where a rank is given."""
    rng = np.random.default_rng(seed)
    weights = [(0.1 * rng.normal(size=(out, width))).astype(np.float32) for out in outs]
    stored = [*(quantize_nf4(w) for w in weights[:-1]), jnp.asarray(weights[-1])]
    adapters = [
        None
        if rank is None
        else Adapter(
            *(jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for s in ((width, rank), (rank, out)))
        )
        for out, rank in zip(outs, ranks, strict=True)
    ]
    return tuple(stored), tuple(adapters)


@pytest.mark.parametrize(
    "width, outs, ranks",
    [
        (128, (128, 64, 64), (8, 8, 8)),  # like q, k, v
        (128, (256, 256), (16, 4)),  # like gate and up: the way back goes over the narrow side
        (256, (128,), (8,)),  # like down
        (128, (128, 64, 64), (8, None, 4)),
        (64, (64, 64), (None, 80)),  # more ranks than one tile of columns
    ],
)
def test_the_joined_product_is_the_reference(width, outs, ranks):
    """Value and all gradients of the one product that a GPU gets, computed here."""
    weights, adapters = layers(width, outs, ranks)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, width)), jnp.float32)

    dy = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, sum(outs))), jnp.float32)

    def probe(product):
        y, vjp = jax.vjp(lambda x, a: product(x, weights, a), x, adapters)
        return jax.tree.leaves((y, vjp(dy)))

    want = probe(reference)
    with target.tracing_for((9, 0)):
        got = probe(adapted_linear)
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() <= GRADIENT * np.abs(theirs).max()


def test_the_joined_product_reads_each_weight_once():
    """One product of all layers forward, over the codes: no second pass over the output."""
    weights, adapters = layers(128, (256, 256), (16, 16))
    with target.tracing_for((9, 0)):
        program = jax.jit(lambda x: adapted_linear(x, weights, adapters)).lower(jnp.ones((32, 128))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert sum("tensor<32x192xf32>, tensor<512x192xf32>" in line for line in products) == 1
    assert sum("-> tensor<32x32xf32>" in line for line in products) == 1


def test_few_rows_are_not_worth_a_joined_matrix(monkeypatch):
    """As in generation: on a GPU too two products, and no copy of the weights beside them."""
    monkeypatch.undo()
    weights, adapters = layers(128, (64, 64), (8, 8))
    with target.tracing_for((9, 0)):
        programs = [
            jax.jit(lambda x: adapted_linear(x, weights, adapters)).lower(jnp.ones((rows, 128))).as_text()
            for rows in (1, linear.FEW_ROWS - 1, linear.FEW_ROWS)
        ]
    assert ["tensor<128x192" in p or "tensor<192x128" in p for p in programs] == [False, False, True]


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_backward_pass_dequantises_anew_and_leaves_codes_in_place(double_quant):
    """A barrier before the scales: before the codes it would have a GPU copy them out of their stack."""
    weight = quantize_nf4(np.ones((128, 256), np.float32), double_quant)
    adapter = Adapter(jnp.ones((256, 8)), jnp.ones((8, 128)))
    for adapters in ((None,), (adapter,)):
        with target.tracing_for((9, 0)):
            grad = jax.jit(jax.grad(lambda x, a=adapters: adapted_linear(x, (weight,), a).sum()))
            program = grad.lower(jnp.ones((32, 256))).as_text()
        barriers = [line for line in program.splitlines() if "optimization_barrier" in line]
        scale = "tensor<f32>" if double_quant else "tensor<128x4xf32>"
        assert any(scale in line for line in barriers)
        assert not any("128x128xui8" in line for line in barriers)
