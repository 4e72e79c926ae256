"""On an NVIDIA GPU (`pytest -m gpu`): the SwiGLU kernels beside their references, on fresh random inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, poisoned, relative
from tolerances import BF16

from jaxtune.kernels import swiglu, swiglu8, target

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if target.capability() != (9, 0):
        pytest.skip(f"the kernels are for sm_90, this is {target.capability()}")


def arrays(draws, rows, ffn, r, s):
    return [2 * draws.normal(rows, width, dtype=jnp.bfloat16) for width in (ffn, 2 * ffn, r, s)]


@pytest.mark.parametrize(
    "rows, ffn, r, s", [(256, 512, 32, 16), (192, 128, 8, 16), (128, 256, 64, 40), (4096, 1536, 16, 8)]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_backward_pass(rows, ffn, r, s, in_place):
    given = arrays(Draws(), rows, ffn, r, s)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(swiglu.reference)(*(x.astype(jnp.float32) for x in given))
    for ours, theirs in zip(poisoned(partial(swiglu.kernel, in_place=in_place))(*given), want, strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("rows, ffn, r, s", [(256, 512, 32, 16), (4096, 1536, 16, 8)])
def test_the_backward_pass_in_8_bits(rows, ffn, r, s):
    """Written in e5m2: the neighbours of a value may be taken where bfloat16 rounds the other way."""
    draws = Draws()
    given, spread = arrays(draws, rows, ffn, r, s), draws.powers_of_two(2, rows)
    scales = (spread[0], 2.0**-4 * spread[1])
    got, want = poisoned(swiglu.kernel)(*given, scales), jax.jit(swiglu.reference)(*given, scales)
    assert got[0].dtype == jnp.float8_e5m2
    ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (got[0], want[0]))
    assert np.isfinite(ours).all() and (ours != theirs).mean() < 1e-2
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("rows, ffn", [(300, 1536), (64, 14336), (1000, 4864)])
def test_the_forward_pass_in_8_bits(rows, ffn):
    draws = Draws()
    gate_up = (3 * draws.normal(rows, 2 * ffn)).astype(jnp.bfloat16).at[1].set(0).at[2].multiply(100)
    scale = draws.powers_of_two(rows)
    assert swiglu8.supported(ffn, gate_up.dtype)
    got = poisoned(partial(swiglu8.kernel, keeps=True))(gate_up, scale)
    with jax.disable_jit():  # compiled, XLA leaves out that act is rounded to bfloat16 first: 1.7 % apart
        want = swiglu8.reference(gate_up, scale)
    ours, theirs = (np.asarray(x[0].astype(jnp.float32) * x[1][:, None]) for x in (got, want))
    assert np.isfinite(ours).all() and np.linalg.norm(ours - theirs) <= BF16 * np.linalg.norm(theirs)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-6)
    np.testing.assert_array_equal(got[3], gate_up)
