"""On a Hopper GPU (`pytest -m gpu`): what a kernel leaves unwritten is seen."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, poisoned

from jaxtune.kernels import target

pytestmark = pytest.mark.gpu


def first_of_four(x: jax.Array) -> jax.Array:
    """A kernel whose result [4, 64, 128] holds x [64, 128] in the first place and nothing else."""

    def body(x, out, tile, loaded):
        plgpu.copy_gmem_to_smem(x, tile, loaded)
        plgpu.barrier_wait(loaded)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[0])
        plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((4, *x.shape), x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        grid=(1,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return call(x)


@pytest.mark.parametrize("later", [lambda y: y, lambda y: 2 * y], ids=["a result", "on the way to one"])
def test_what_is_not_written_is_nan(later):
    if target.capability() != (9, 0):
        pytest.skip(f"the kernel is for sm_90, this is {target.capability()}")
    x = Draws().normal(64, 128, dtype=jnp.bfloat16)
    got = np.asarray(poisoned(lambda x: later(first_of_four(x)))(x), np.float32)
    np.testing.assert_array_equal(got[0], np.asarray(later(x), np.float32))
    assert np.isnan(got[1:]).all()
