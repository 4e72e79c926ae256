"""On a Hopper GPU (`pytest -m gpu`): the matrix of dequantised weights beside its reference and beside float32."""

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, poisoned

from jaxtune.kernels import nf4_matrix, target
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.gpu
BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn
HALF_UNIT = {BF16: 2.0**-8, E4M3: 2.0**-4}  # of the last place, over the number
LEAST = {BF16: 0.0, E4M3: 2.0**-10}  # half a unit of the smallest numbers
DIFFERING = 1e-3  # part of the elements that rounding a scale's sum once or twice may move to the neighbour


KV, FFN = 1024, 14336  # of an 8B model
OF_8B = [
    ((4096, KV, KV), 4096, (4096 + 2 * KV, 64), BF16, False, False),
    ((FFN, FFN), 4096, (2 * FFN, 64), BF16, False, False),
    ((4096,), FFN, (64, FFN), BF16, True, False),
    ((4096,), 4096, (4096, 64), E4M3, False, False),
    ((4096, KV, KV), 4096, (4096, 256), E4M3, False, True),
    ((FFN, FFN), 4096, (4096, 192), E4M3, False, True),
    ((FFN, FFN), 4096, (64, 2 * FFN), E4M3, True, True),
]


@pytest.mark.parametrize("outs, width, extra, dtype, below, transposed", OF_8B)
def test_layers_of_an_8b_model(outs, width, extra, dtype, below, transposed):
    check(outs, width, extra, dtype, below, transposed, double_quant=True)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "outs, width, extra, dtype, below, transposed",
    [
        ((256, 128, 128), 512, (512, 64), BF16, False, False),
        ((512,), 768, (64, 768), BF16, True, False),
        ((256, 256), 512, (512, 128), E4M3, False, False),
        ((256, 128), 1024, (1024, 64), E4M3, False, True),
        ((384,), 256, (256, 192), E4M3, False, True),
        ((384,), 256, (64, 256), E4M3, True, False),
        ((256, 128), 1024, (64, 384), E4M3, True, True),
    ],
)
def test_the_kernel_is_the_reference(outs, width, extra, dtype, below, transposed, double_quant):
    check(outs, width, extra, dtype, below, transposed, double_quant)


def check(outs, width, extra, dtype, below, transposed, double_quant):
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")
    draws = Draws()
    weights = [quantize_nf4(draws.normal(out, width), double_quant) for out in outs]
    extra = draws.normal(*extra, dtype=dtype)
    scale = jnp.float32(2.0**-6) if dtype == E4M3 else None
    assert nf4_matrix.supported(weights, extra, below, transposed)
    got = poisoned(lambda *given: nf4_matrix.kernel(*given, below, transposed))(weights, extra, scale)
    want = nf4_matrix.reference(weights, extra, scale, below, transposed)
    exact = nf4_matrix.reference(weights, extra.astype(jnp.float32), scale, below, transposed)
    assert got.shape == want.shape and got.dtype == want.dtype
    ours, theirs, exact = (np.asarray(x.astype(jnp.float32)) for x in (got, want, exact))
    assert np.isfinite(ours).all()
    assert (ours != theirs).mean() <= (DIFFERING if double_quant else 0)
    # the kernel's scales may differ from float32's by rounding: a hundredth more than half a unit
    assert (np.abs(ours - exact) <= 1.01 * HALF_UNIT[dtype] * np.abs(exact) + LEAST[dtype]).all()
