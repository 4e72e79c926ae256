"""On a Hopper GPU (`pytest -m gpu`): attention of few queries beside its float32 reference, inputs new each run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, kernels_in, poisoned, relative
from tolerances import BF16

from jaxtune.kernels import target
from jaxtune.kernels.decode_attention import Attended, decode_attention, kernel, merge, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")


def given(batch, kv, queries, h, columns):
    draws = Draws()
    arrays = [draws.normal(batch, kv, n, h, dtype=jnp.bfloat16) for n in (queries, columns, columns)]
    first = jax.random.randint(draws.next_key(), (batch,), 0, columns // 2)
    end = first + jax.random.randint(draws.next_key(), (batch,), 1, columns // 2)
    return *arrays, first, end.at[0].set(columns).at[2:3].set(first[2:3])  # up to the last, and none


def check(got, arguments):
    q, k, v, *bounds = arguments
    with jax.default_matmul_precision("highest"):
        want = reference(*(x.astype(jnp.float32) for x in (q, k, v)), *bounds)
    assert relative(got.out, want.out) <= BF16
    # products of bfloat16 numbers are exact in float32, their sums and ex2.approx err by some 2**-20
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-3)


SHAPES = [
    (256, 8, 4, 128, 1024),
    (8, 8, 4, 128, 256),
    (32, 8, 32, 128, 512),
    (1, 8, 4, 128, 64),
    (4, 3, 24, 64, 192),
    (2, 8, 128, 128, 4096),
    (3, 2, 7, 64, 1536),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape):
    arguments = given(*shape)
    assert kernels_in(decode_attention, *arguments) == 1
    for _ in range(3):  # a race would not show every time
        check(poisoned(decode_attention)(*arguments), arguments)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_parts(splits):
    arguments = given(5, 8, 4, 128, 1024)
    out, lse = poisoned(lambda *a: kernel(*a, splits=splits))(*arguments)
    parts = [Attended(*part) for part in zip(out, lse, strict=True)]
    check(Attended(merge(parts), jax.nn.logsumexp(lse, axis=0)), arguments)
