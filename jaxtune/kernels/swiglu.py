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
    d_act: jax.Array, gate_up: jax.Array, xa: jax.Array, d_xa: jax.Array, scales: tuple | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the kernel computes, in three passes.

    Args:
      d_act: [N, F], the gradient of act = silu(gate)·up.
      gate_up: [N, 2F].
      xa: [N, R], x A of gate and up side by side.
      d_xa: [N, S], the gradient of act A in the layer that reads act.
      scales: float32 [N] by which the rows of d_act and of gate_up are to be multiplied, or None.

    Returns:
      d(gate_up) [N, 2F] in gate_up's dtype, or e5m2 with scales; d(gate_up)ᵀ·xa, float32 [2F, R]; actᵀ·d_xa,
      float32 [F, S].
    """
    columns = None if scales is None else [scale[:, None] for scale in scales]
    gate, up = jnp.split(gate_up, 2, axis=1)
    act, d_gate, d_up = _pointwise(d_act, gate, up, columns)
    exact = jnp.concatenate([d_gate, d_up], axis=1)
    d_gate_up = exact.astype(gate_up.dtype)
    db = jnp.dot(d_gate_up.T, xa, preferred_element_type=jnp.float32)
    da = jnp.dot(act.astype(gate_up.dtype).T, d_xa, preferred_element_type=jnp.float32)
    return d_gate_up if scales is None else exact.astype(jnp.float8_e5m2), db, da


def _pointwise(d_act, gate, up, scales):
    """(act, d_gate, d_up) in float32; scales: None, or of the rows of d_act and of gate and up, as columns."""
    d_act, gate, up = (x.astype(jnp.float32) for x in (d_act, gate, up))
    if scales is not None:
        d_act, gate, up = d_act * scales[0], gate * scales[1], up * scales[1]
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    return silu * up, d_act * up * (sigmoid + silu * (1 - sigmoid)), d_act * silu


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


def swiglu_backward(d_act, gate_up, xa, d_xa, scales=None, in_place=False):
    """`reference`, by the kernel where it is supported."""
    rows, ffn = d_act.shape
    if supported(rows, ffn, (xa.shape[1], d_xa.shape[1]), gate_up.dtype):
        return kernel(d_act, gate_up, xa, d_xa, scales, in_place)
    return reference(d_act, gate_up, xa, d_xa, scales)


def _padded(ranks: tuple[int, int]) -> int:
    """Columns of the tiles that hold the ranks: 32 or 64."""
    return 32 if max(ranks) <= 32 else 64


def _transforms(padded: int) -> tuple:
    """How bfloat16 tiles lie in shared memory: the matrix units want both sides of a product swizzled alike."""
    return plgpu.TilingTransform((8, padded)), plgpu.SwizzleTransform(2 * padded)


def _body(steps, blocks, scaled, in_place, *refs):
    """One block: a column of TILE features, `steps` tiles of rows; see `kernel`.

    scaled: whether the rows' scales follow the other inputs. act, exact and written are shared memory: act, d(gate)
    and d(up) as the matrix units read them, and, where scaled, the latter two in e5m2.
    """
    (d_act, gate_up, xa, d_xa), scales, refs = refs[:4], refs[4 : 4 + 2 * scaled], refs[4 + 2 * scaled :]
    db, da, *refs = refs
    d_gate_up, *refs = (gate_up, *refs) if in_place else refs
    act, exact, *written = refs
    written = written[0] if scaled else exact
    column, part = jax.lax.axis_index("column"), jax.lax.axis_index("part")
    padded = xa.shape[1]
    halves = column, column + blocks  # tiles of gate and of up

    def tile(at, width=TILE):
        return plgpu.BlockSpec(
            (TILE, width), lambda i: (part * steps + i, at), transforms=_transforms(padded)
        )

    def scope(d_gate_xa, d_up_xa, act_d_xa):
        def step(indices, d_act, gate, up, xa, d_xa, *scales):
            (i,) = indices
            slot = jax.lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the copies of two steps ago have left this slot
            columns = [jax.lax.broadcast_in_dim(scale[...], (TILE, TILE), (0,)) for scale in scales]
            act_tile, *tiles = _pointwise(d_act[...], gate[...], up[...], columns or None)
            act[...] = act_tile.astype(act.dtype)
            for half, values in enumerate(tiles):
                exact[slot, half] = values.astype(exact.dtype)
                if scaled:
                    written[slot, half] = values.astype(written.dtype)
            plgpu.commit_smem()
            for half, at in enumerate(halves):
                rows, columns = pl.ds((part * steps + i) * TILE, TILE), pl.ds(at * TILE, TILE)
                plgpu.copy_smem_to_gmem(written.at[slot, half], d_gate_up.at[rows, columns])
            plgpu.wgmma(d_gate_xa, exact.at[slot, 0].transpose((1, 0)), xa)
            plgpu.wgmma(d_up_xa, exact.at[slot, 1].transpose((1, 0)), xa)
            plgpu.wgmma(act_d_xa, act.transpose((1, 0)), d_xa)
            plgpu.wgmma_wait(0)

        vector = plgpu.BlockSpec((TILE,), lambda i: (part * steps + i,))
        plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[tile(column), *map(tile, halves), tile(0, padded), tile(0, padded)]
            + [vector] * len(scales),
            max_concurrent_steps=2,
        )(d_act, gate_up, gate_up, xa, d_xa, *scales)
        return d_gate_xa[...], d_up_xa[...], act_d_xa[...]

    accumulators = [plgpu.ACC((TILE, padded), jnp.float32)] * 3
    d_gate_xa, d_up_xa, act_d_xa = pl.run_scoped(scope, *accumulators)
    plgpu.wait_smem_to_gmem(0)
    for product, at in zip((d_gate_xa, d_up_xa), halves, strict=True):
        db[part, pl.ds(at * TILE, TILE)] = product
    da[part, pl.ds(column * TILE, TILE)] = act_d_xa


def kernel(d_act, gate_up, xa, d_xa, scales=None, in_place: bool = False, interpret: Any = None):
    """`reference` in one pass: blocks of 64 features walk down the tokens and keep the skinny products in registers.

    in_place: d(gate_up) takes the place of gate_up, each element after it was read: no second array of that size. Not
    for an array that is kept in a stack, which would be copied out of it; not with scales.
    interpret: plgpu.InterpretGPUParams to run on a CPU.
    """
    rows, ffn = d_act.shape
    tiles = rows // TILE
    steps = next(n for n in range(min(STEPS, tiles), 0, -1) if tiles % n == 0)
    parts, blocks = tiles // steps, ffn // TILE
    ranks = xa.shape[1], d_xa.shape[1]
    padded = _padded(ranks)
    xa, d_xa = (jnp.pad(x, ((0, 0), (0, padded - x.shape[1]))) for x in (xa, d_xa))
    shapes = ((TILE, TILE), (2, 2, TILE, TILE))  # act; by turns, d(gate) and d(up)
    scratch = [plgpu.SMEM(shape, jnp.bfloat16, transforms=_transforms(padded)) for shape in shapes]
    if scales is not None:
        swizzled = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE)
        scratch.append(plgpu.SMEM(shapes[1], jnp.float8_e5m2, transforms=swizzled))
    shapes = [jax.ShapeDtypeStruct((parts, width, padded), jnp.float32) for width in (2 * ffn, ffn)]
    if not in_place:
        kind = gate_up.dtype if scales is None else jnp.float8_e5m2
        shapes.append(jax.ShapeDtypeStruct(gate_up.shape, kind))
    body = partial(_body, steps, blocks, scales is not None, in_place)
    call: Any = pl.kernel(
        lambda *refs: pl.run_scoped(partial(body, *refs), *scratch),
        out_type=shapes,
        mesh=plgpu.Mesh(grid=(blocks, parts), grid_names=("column", "part")),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        name="swiglu_backward",
    )
    if in_place:
        place = jax.new_ref(gate_up)
        db, da = call(d_act, place, xa, d_xa)
        d_gate_up = jax.freeze(place)
    else:
        db, da, d_gate_up = call(d_act, gate_up, xa, d_xa, *(scales or ()))
    return d_gate_up, db.sum(0)[:, : ranks[0]], da.sum(0)[:, : ranks[1]]
