"""On a Hopper GPU (`pytest -m gpu`): the NF4 product for few rows beside its float32 reference, inputs new each run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, fresh_seed, kernels_in, poisoned, relative
from tolerances import BF16

from jaxtune.kernels import target
from jaxtune.kernels.linear import Adapter, adapted_linear
from jaxtune.kernels.nf4_matmul import fold, nf4_matmul, reference
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")


def given(m, width, outs, ranks):
    draws = Draws()
    low = lambda *shape: draws.normal(*shape, dtype=jnp.bfloat16)  # noqa: E731
    weights = tuple(quantize_nf4(draws.normal(out, width)) for out in outs)
    adapters = tuple(
        None if rank is None else Adapter(low(width, rank), low(rank, out))
        for rank, out in zip(ranks, outs, strict=True)
    )
    return low(m, width), weights, adapters


def check(got, arguments):
    with jax.default_matmul_precision("highest"):
        want = reference(*arguments)
    assert relative(got, want) <= BF16


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 31, 32, 63, 64])
def test_layers_that_share_x(m):
    arguments = given(m, 1024, (1024, 256, 256), (16, 8, None))
    assert kernels_in(adapted_linear, *arguments) == 1
    check(poisoned(adapted_linear)(*arguments), arguments)


@pytest.mark.parametrize(
    "m, width, out", [(1, 4096, 14336), (8, 14336, 4096), (64, 4096, 14336), (64, 14336, 4096), (3, 3584, 64)]
)
def test_large_layers(m, width, out):
    arguments = given(m, width, (out,), (None,))
    check(poisoned(nf4_matmul)(*arguments[:2], None), arguments)


def test_it_repeats_to_the_bit():
    x, weights, adapters = given(16, 4096, (4096,), (16,))
    call, lora = poisoned(nf4_matmul), fold(weights, adapters)
    np.testing.assert_array_equal(call(x, weights, lora), call(x, weights, lora))


def test_a_block_of_zeros():
    weight = np.random.default_rng(fresh_seed()).normal(size=(256, 1024)).astype(np.float32)
    weight[:, 64:128], weight[5] = 0, 0
    arguments = jnp.ones((8, 1024), jnp.bfloat16), (quantize_nf4(weight, double_quant=False),), (None,)
    got = poisoned(nf4_matmul)(*arguments[:2], None)
    assert (np.asarray(got)[:, 5] == 0).all()
    check(got, arguments)
