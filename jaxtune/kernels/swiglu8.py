"""SwiGLU's forward pass into e4m3: gate and up are read once, a row at a time (Pallas, Mosaic GPU, Hopper).

A row's scale needs its largest, so XLA makes three passes: one for it, one that writes act, one that rounds it. Here a
row of act waits in registers, in bfloat16, until its largest is known.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxtune.kernels import target
from jaxtune.kernels.fp8 import E4M3, power_of_two

LANES = 128  # of a warpgroup; a row is seen as groups of so many features
CHUNK = 16  # groups worked on at a time, at most: registers
# What fits an H100 or H200 (SXM) at 14,336 features: a row of gate and up each in shared memory.
BLOCKS = 3 * 132
MAX_FFN = 256 * LANES  # of one copy


def reference(gate_up: jax.Array, scale: jax.Array, keeps: bool = False) -> tuple[jax.Array, ...]:
    """What the kernel computes.

    Args:
      gate_up: bfloat16 [N, 2F].
      scale: float32 [N], by which its rows are to be multiplied.
      keeps: whether gate_up is returned too, for the backward pass: XLA, which does not let an 8-bit product write
        into the stack of what is kept, would read it again to copy it there.

    Returns:
      act = silu(gate)·up in e4m3 [N, F]; its rows' scales, powers of two, and their largest |gate| or |up|,
      float32 [N]; gate_up where it keeps.
    """
    gate, up = jnp.split(gate_up, 2, axis=1)
    act, top = _pointwise(gate, up, scale[:, None])
    out_scale = power_of_two(jnp.max(jnp.abs(act), axis=1).astype(jnp.float32), E4M3)
    eighth = (act.astype(jnp.float32) / out_scale[:, None]).astype(E4M3.dtype)
    return eighth, out_scale, jnp.max(top, axis=1), *[gate_up] * keeps


def _pointwise(gate, up, scale):
    """(act in gate's dtype, the larger of |gate| and |up| in float32)"""
    wide, up = gate.astype(jnp.float32) * scale, up.astype(jnp.float32) * scale
    act = wide / (1 + jnp.exp(-wide)) * up
    return act.astype(gate.dtype), jnp.maximum(jnp.abs(wide), jnp.abs(up))


def supported(ffn: int, dtype) -> bool:
    """Whether the kernel takes F on the GPU that is traced for."""
    return target.capability() == (9, 0) and dtype == jnp.bfloat16 and ffn % LANES == 0 and ffn <= MAX_FFN


def swiglu8(gate_up, scale, keeps=False):
    """`reference`, by the kernel where it is supported."""
    return (kernel if supported(gate_up.shape[1] // 2, gate_up.dtype) else reference)(gate_up, scale, keeps)


def _body(blocks, chunk, gate_up, scale, eighth, out_scale, top, *refs):
    """One warpgroup takes every `blocks`th row. row_in [2, groups, 128] and row_out are shared memory."""
    *kept, row_in, row_out, loaded = refs
    block, rows, groups = jax.lax.axis_index("block"), scale.shape[0], row_out.shape[0]
    plgpu.copy_gmem_to_smem(gate_up.at[block], row_in, loaded)

    def one_row(i, _):
        row = block + i * blocks
        row_scale = scale[row]
        plgpu.barrier_wait(loaded)
        for copy in kept:
            plgpu.copy_smem_to_gmem(row_in, copy.at[row])
        acts, act_top, in_top = [], jnp.float32(0), jnp.float32(0)
        for at in range(0, groups, chunk):
            part = pl.ds(at, chunk)
            act, tops = _pointwise(row_in[0, part], row_in[1, part], row_scale)
            acts.append(act)
            act_top = jnp.maximum(act_top, jnp.abs(act.astype(jnp.float32)))
            in_top = jnp.maximum(in_top, tops)
        plgpu.commit_smem()  # what was read here, before the copy overwrites it
        # this row of gate and up has left, and act of the row before
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(row + blocks < rows)
        def _():
            plgpu.copy_gmem_to_smem(gate_up.at[row + blocks], row_in, loaded)

        found = jnp.max(power_of_two(act_top, E4M3))  # Mosaic has no bit patterns of scalars
        out_scale[row], top[row] = found, jnp.max(in_top)
        for at, act in zip(range(0, groups, chunk), acts, strict=True):
            row_out[pl.ds(at, chunk)] = (act.astype(jnp.float32) * (1 / found)).astype(row_out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_out, eighth.at[row])
        return 0

    jax.lax.fori_loop(0, (rows - block + blocks - 1) // blocks, one_row, 0)
    plgpu.wait_smem_to_gmem(0)


def kernel(gate_up, scale, keeps: bool = False, blocks: int = BLOCKS, interpret: Any = None):
    """`reference` in one pass. interpret: plgpu.InterpretGPUParams to run on a CPU."""
    rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    groups, blocks = ffn // LANES, min(blocks, rows)
    chunk = next(size for size in range(CHUNK, 0, -1) if groups % size == 0)
    vector = jax.ShapeDtypeStruct((rows,), jnp.float32)
    both = jax.ShapeDtypeStruct((rows, 2, groups, LANES), gate_up.dtype)
    call = plgpu.kernel(
        functools.partial(_body, blocks, chunk),
        out_type=[jax.ShapeDtypeStruct((rows, groups, LANES), E4M3.dtype), vector, vector, *[both] * keeps],
        scratch_types=[
            plgpu.SMEM((2, groups, LANES), gate_up.dtype),
            plgpu.SMEM((groups, LANES), E4M3.dtype),
            plgpu.Barrier(),
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    eighth, out_scale, top, *kept = call(gate_up.reshape(both.shape), scale)
    return eighth.reshape(rows, ffn), out_scale, top, *(copy.reshape(gate_up.shape) for copy in kept)
