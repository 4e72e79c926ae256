"""What the GPU tests measure with, on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import kernels_in, relative
from tolerances import BF16

from jaxtune.kernels import decode_attention, target


@pytest.mark.parametrize("shape", [(1, 14336), (64, 4096), (4096, 16), (2, 512, 8, 64), (300,)])
def test_one_wrong_number_is_seen_and_rounding_is_not(shape):
    want = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = np.array(jnp.asarray(want, jnp.bfloat16), np.float32)
    assert relative(got, want) <= BF16 / 3
    place = tuple(size // 2 for size in shape)
    got[place] = want[place] + 1
    assert relative(got, want) > BF16


def test_kernels_are_counted():
    def attend(x):
        bounds = jnp.zeros(1, jnp.int32), jnp.full(1, 64)
        return decode_attention.decode_attention(x, x, x, *bounds)

    x = jnp.zeros((1, 1, 64, 64), jnp.bfloat16)
    assert kernels_in(attend, x) == 0
    with target.tracing_for((9, 0)):
        assert kernels_in(attend, x) == 1
