"""The product with a frozen weight: its value, its gradient, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
from tolerances import GRADIENT

from jaxtune.kernels.linear import dense, frozen_linear
from jaxtune.quant import quantize_nf4


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
