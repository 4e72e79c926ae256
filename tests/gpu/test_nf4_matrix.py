"""On an NVIDIA GPU (`pytest -m gpu`): the matrix of dequantised weights by the kernel and by its reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4_matrix
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.gpu
BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn
DIFFERING = 1e-3  # part of the elements that rounding a scale's sum once or twice may move to the neighbour


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
    rng = np.random.default_rng(sum(outs) + width)
    weights = [quantize_nf4(rng.normal(size=(out, width)).astype(np.float32), double_quant) for out in outs]
    extra = jnp.asarray(rng.normal(size=extra), jnp.float32).astype(dtype)
    scale = jnp.float32(2.0**-6) if dtype == E4M3 else None
    assert nf4_matrix.supported(weights, extra, below, transposed)
    got = nf4_matrix.kernel(weights, extra, scale, below, transposed)
    want = nf4_matrix.reference(weights, extra, scale, below, transposed)
    assert got.shape == want.shape and got.dtype == want.dtype
    ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    assert np.isfinite(ours).all()
    assert (ours != theirs).mean() <= (DIFFERING if double_quant else 0)
    assert np.abs(ours - theirs).max() <= np.abs(theirs).max() * (2.0**-3 if dtype == E4M3 else 2.0**-7)
