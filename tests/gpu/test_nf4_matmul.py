"""On a Hopper GPU (`pytest -m gpu`): the NF4 product for few rows beside its float32 reference, inputs new each run."""

import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import BF16

from jaxtune.kernels import target
from jaxtune.kernels.linear import Adapter, adapted_linear
from jaxtune.kernels.nf4_matmul import fold, nf4_matmul, reference, supported
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")


def given(m, width, outs, ranks):
    seed = secrets.randbits(31)
    print("seed", seed)
    keys = iter(jax.random.split(jax.random.key(seed), 1 + 3 * len(outs)))
    draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)  # noqa: E731
    weights = tuple(quantize_nf4(draw(out, width)) for out in outs)
    adapters = tuple(
        None
        if rank is None
        else Adapter(draw(width, rank).astype(jnp.bfloat16), draw(rank, out).astype(jnp.bfloat16))
        for rank, out in zip(ranks, outs, strict=True)
    )
    return draw(m, width).astype(jnp.bfloat16), weights, adapters


def check(got, arguments):
    with jax.default_matmul_precision("highest"):
        want = np.asarray(reference(*arguments))
    got = np.asarray(got, np.float32)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= BF16 * np.linalg.norm(want)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 31, 32, 63, 64])
def test_layers_that_share_x(m):
    arguments = given(m, 1024, (1024, 256, 256), (16, 8, None))
    assert supported(m, jnp.bfloat16, [(1024, 1024), (256, 1024), (256, 1024)], 16)
    check(jax.jit(adapted_linear)(*arguments), arguments)


@pytest.mark.parametrize(
    "m, width, out", [(1, 4096, 14336), (8, 14336, 4096), (64, 4096, 14336), (64, 14336, 4096), (3, 3584, 64)]
)
def test_large_layers(m, width, out):
    arguments = given(m, width, (out,), (None,))
    check(jax.jit(nf4_matmul)(*arguments[:2], None), arguments)


def test_it_repeats_to_the_bit():
    x, weights, adapters = given(16, 4096, (4096,), (16,))
    call, lora = jax.jit(nf4_matmul), fold(weights, adapters)
    np.testing.assert_array_equal(call(x, weights, lora), call(x, weights, lora))


def test_a_block_of_zeros():
    weight = np.random.default_rng(secrets.randbits(31)).normal(size=(256, 1024)).astype(np.float32)
    weight[:, 64:128], weight[5] = 0, 0
    arguments = jnp.ones((8, 1024), jnp.bfloat16), (quantize_nf4(weight, double_quant=False),), (None,)
    got = jax.jit(nf4_matmul)(*arguments[:2], None)
    assert (np.asarray(got)[:, 5] == 0).all()
    check(got, arguments)
