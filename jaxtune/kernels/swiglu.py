"""The backward pass of SwiGLU together with the adapters' gradients that read what it reads and writes.

With act = silu(gate)·up feeding a layer that has an adapter, and gate and up coming from layers that have one, the
backward pass needs d(gate), d(up), and two skinny products over all tokens: d(gate | up)ᵀ·(x A) for their B and
actᵀ·d(act A) for the next layer's A. Apart they read the widest arrays of a layer five times and write them three
times; the kernel reads three and writes two, once each, and computes `act` again on the way.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxtune.kernels import target

TILE = 64  # rows and columns of one step of one warpgroup
STEPS = 16  # tiles of rows a block walks down before it writes its part of the adapters' gradients
MAX_RANK = 64  # of gate and up together: the products of more would not stay in registers


def reference(
    d_act: jax.Array, gate_up: jax.Array, xa: jax.Array, d_xa: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the kernel computes, in three passes.

    Args:
      d_act: [N, F], the gradient of act = silu(gate)·up.
      gate_up: [N, 2F].
      xa: [N, R], x A of gate and up side by side.
      d_xa: [N, S], the gradient of act A in the layer that reads act.

    Returns:
      d(gate_up) [N, 2F] in gate_up's dtype; d(gate_up)ᵀ·xa, float32 [2F, R]; actᵀ·d_xa, float32 [F, S].
    """
    act, d_gate, d_up = _pointwise(d_act, *jnp.split(gate_up, 2, axis=1))
    d_gate_up = jnp.concatenate([d_gate, d_up], axis=1)
    db = jnp.dot(d_gate_up.T, xa, preferred_element_type=jnp.float32)
    return d_gate_up, db, jnp.dot(act.T, d_xa, preferred_element_type=jnp.float32)


def _pointwise(d_act, gate, up):
    """(act, d_gate, d_up) in gate's dtype, computed in float32."""
    d_act, wide, up = (x.astype(jnp.float32) for x in (d_act, gate, up))
    sigmoid = 1 / (1 + jnp.exp(-wide))
    silu = wide * sigmoid
    d_gate = d_act * up * (sigmoid + silu * (1 - sigmoid))
    return tuple(x.astype(gate.dtype) for x in (silu * up, d_gate, d_act * silu))


def supported(rows: int, ffn: int, ranks: tuple[int, int], dtype) -> bool:
    """Whether the kernel takes N, F, (R, S) on the GPU that is traced for."""
    return (
        target.capability() == (9, 0)
        and dtype == jnp.bfloat16
        and rows % TILE == 0
        and ffn % TILE == 0
        and 0 < min(ranks)
        and max(ranks) <= MAX_RANK
    )


def swiglu_backward(d_act, gate_up, xa, d_xa):
    """`reference`, by the kernel where it is supported."""
    rows, ffn = d_act.shape
    if supported(rows, ffn, (xa.shape[1], d_xa.shape[1]), gate_up.dtype):
        return kernel(d_act, gate_up, xa, d_xa)
    return reference(d_act, gate_up, xa, d_xa)


def _padded(ranks: tuple[int, int]) -> int:
    """Columns of the tiles that hold the ranks: 32 or 64."""
    return 32 if max(ranks) <= 32 else 64


def _transforms(padded: int) -> tuple:
    """How bfloat16 tiles lie in shared memory: the matrix units want both sides of a product swizzled alike."""
    return plgpu.TilingTransform((8, padded)), plgpu.SwizzleTransform(2 * padded)


def _body(steps, blocks, d_act, gate_up, xa, d_xa, d_gate_up, db, da, act, out):
    """One block: a column of TILE features, `steps` tiles of rows; see `kernel`. act and out are shared memory."""
    column, part = jax.lax.axis_index("column"), jax.lax.axis_index("part")
    padded = xa.shape[1]
    halves = column, column + blocks  # tiles of gate and of up

    def tile(at, width=TILE):
        return plgpu.BlockSpec(
            (TILE, width), lambda i: (part * steps + i, at), transforms=_transforms(padded)
        )

    def scope(d_gate_xa, d_up_xa, act_d_xa):
        def step(indices, d_act, gate, up, xa, d_xa):
            (i,) = indices
            slot = jax.lax.rem(i, 2)
            d_gate, d_up = out.at[slot, 0], out.at[slot, 1]
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the copies of two steps ago have left this slot
            act[...], d_gate[...], d_up[...] = _pointwise(d_act[...], gate[...], up[...])
            plgpu.commit_smem()
            for half, at in enumerate(halves):
                rows, columns = pl.ds((part * steps + i) * TILE, TILE), pl.ds(at * TILE, TILE)
                plgpu.copy_smem_to_gmem(out.at[slot, half], d_gate_up.at[rows, columns])
            plgpu.wgmma(d_gate_xa, d_gate.transpose((1, 0)), xa)
            plgpu.wgmma(d_up_xa, d_up.transpose((1, 0)), xa)
            plgpu.wgmma(act_d_xa, act.transpose((1, 0)), d_xa)
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[tile(column), *map(tile, halves), tile(0, padded), tile(0, padded)],
            max_concurrent_steps=2,
        )(d_act, gate_up, gate_up, xa, d_xa)
        return d_gate_xa[...], d_up_xa[...], act_d_xa[...]

    accumulators = [plgpu.ACC((TILE, padded), jnp.float32)] * 3
    d_gate_xa, d_up_xa, act_d_xa = pl.run_scoped(scope, *accumulators)
    plgpu.wait_smem_to_gmem(0)
    for product, at in zip((d_gate_xa, d_up_xa), halves, strict=True):
        db[part, pl.ds(at * TILE, TILE)] = product
    da[part, pl.ds(column * TILE, TILE)] = act_d_xa


def kernel(d_act, gate_up, xa, d_xa, interpret: Any = None):
    """`reference` in one pass: blocks of 64 features walk down the tokens and keep the skinny products in registers.

    interpret: plgpu.InterpretGPUParams to run on a CPU.
    """
    rows, ffn = d_act.shape
    tiles = rows // TILE
    steps = next(n for n in range(min(STEPS, tiles), 0, -1) if tiles % n == 0)
    parts, blocks = tiles // steps, ffn // TILE
    ranks = xa.shape[1], d_xa.shape[1]
    padded = _padded(ranks)
    xa, d_xa = (jnp.pad(x, ((0, 0), (0, padded - x.shape[1]))) for x in (xa, d_xa))
    call = plgpu.kernel(
        partial(_body, steps, blocks),
        out_type=[
            jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype),
            jax.ShapeDtypeStruct((parts, 2 * ffn, padded), jnp.float32),
            jax.ShapeDtypeStruct((parts, ffn, padded), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM(shape, jnp.bfloat16, transforms=_transforms(padded))
            for shape in ((TILE, TILE), (2, 2, TILE, TILE))
        ],
        grid=(blocks, parts),
        grid_names=("column", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    d_gate_up, db, da = call(d_act, gate_up, xa, d_xa)
    return d_gate_up, db.sum(0)[:, : ranks[0]], da.sum(0)[:, : ranks[1]]
