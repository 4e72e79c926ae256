"""Attention of few queries with a cache, as in a step of generation: softmax statistics beside the output.

Queries that read the same keys are rows of one matrix product: the H/K heads of a kv head, and those of all answers
that share a prompt. What it costs is reading keys and values once. Which columns are seen is known on the device only:
columns without a token are not read, and nothing is compiled anew as answers grow.

On Hopper (sm_90) a CTA takes up to 64 queries and a part of the columns, 64 at a time through a ring in shared memory.
Its one warpgroup also starts the copies: two CTAs of a processor take turns at memory and matrix units.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtune.kernels import target

CHUNK = 64  # columns of a cache that a stage holds
ROWS = 64  # queries of a CTA, the long side of wgmma
STAGES = 3
SMS = 132  # of an H100 or H200
_LOG2E = 1.4426950408889634


class Attended(NamedTuple):
    """Output normalised over the columns seen [B, K, M, h], and their log-sum-exp, float32 [B, K, M]; -inf: none."""

    out: jax.Array
    lse: jax.Array


def reference(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array) -> Attended:
    """`decode_attention` in XLA: scores of all columns, softmax in float32."""
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    column = jnp.arange(k.shape[2])
    seen = (column >= first[:, None]) & (column < end[:, None])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1), -1e30)  # finite where nothing is seen
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = jnp.einsum("bkms,bksh->bkmh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(total, 1e-37)[..., None]
    return Attended(out.astype(q.dtype), top + jnp.log(total))


def merge(parts: list[Attended]) -> jax.Array:
    """One softmax over the columns of all parts; at least one column is seen. [B, K, M, h] in their dtype."""
    lse = jnp.stack([part.lse for part in parts])
    shares = jax.nn.softmax(lse, axis=0)
    out = jnp.zeros(parts[0].out.shape, jnp.float32)
    for part, share in zip(parts, shares, strict=True):
        out += part.out.astype(jnp.float32) * share[..., None]
    return out.astype(parts[0].out.dtype)


def supported(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel takes these queries and keys on the GPU that the program is traced for."""
    h = q.shape[-1]
    return (
        target.capability() == (9, 0)
        and q.dtype == k.dtype == jnp.bfloat16
        and h in (64, 128)
        and k.shape[2] % CHUNK == 0
    )


def decode_attention(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array) -> Attended:
    """Softmax attention of every query with the columns from `first` up to `end` of its cache.

    Args:
      q: [B, K, M, h]. k, v: [B, K, S, h].
      first, end: int32 [B], the columns that are seen: 0 <= first <= end <= S.
    """
    if not supported(q, k):
        return reference(q, k, v, first, end)
    out, lse = kernel(q, k, v, first, end)
    if len(out) == 1:
        return Attended(out[0], lse[0])
    parts = [Attended(*part) for part in zip(out, lse, strict=True)]
    return Attended(merge(parts), jax.nn.logsumexp(lse, axis=0))


def _splits(ctas: int, columns: int) -> int:
    """Parts of the columns, so that every processor has two CTAs, of two chunks at least."""
    return max(1, min(2 * SMS // ctas, columns // (2 * CHUNK)))


def kernel(q, k, v, first, end, interpret: plgpu.InterpretGPUParams | None = None, splits: int | None = None):
    """(bfloat16 [parts, B, K, M, h], float32 [parts, B, K, M]): `decode_attention` of each part of the columns."""
    batch, kv, queries, h = q.shape
    step = 8 if queries <= ROWS else ROWS
    padded = -(-queries // step) * step
    rows = min(padded, ROWS)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - queries), (0, 0)))
    splits = _splits(batch * kv * (padded // rows), k.shape[2]) if splits is None else splits
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    out, lse = plgpu.kernel(
        partial(_body, _add_values if interpret is None else _add_values_twin),
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, kv, padded, h), q.dtype),
            jax.ShapeDtypeStruct((splits, batch, kv, padded), jnp.float32),
        ),
        grid=(batch, kv, padded // rows, splits),
        grid_names=("batch", "kv", "tile", "part"),
        scratch_types={
            "q_s": plgpu.SMEM((ROWS, h), q.dtype, transforms=swizzled),
            "k_s": plgpu.SMEM((STAGES, CHUNK, h), q.dtype, transforms=swizzled),
            "v_s": plgpu.SMEM((STAGES, CHUNK, h), q.dtype, transforms=swizzled),
            "lse_s": plgpu.SMEM((ROWS,), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "k_ready": plgpu.Barrier(num_barriers=STAGES),
            "v_ready": plgpu.Barrier(num_barriers=STAGES),
            "free": plgpu.Barrier(num_barriers=STAGES),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack([first, end], 1).astype(jnp.int32), q, k, v)
    return out[..., :queries, :], lse[..., :queries]


def _add_values(acc: jax.Array, weights: jax.Array, values) -> jax.Array:
    """acc [64, h] + weights [64, 64] times the values of a chunk (a ref) [64, h]."""
    multiply: Callable = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))
    return multiply(plgpu.ACC.init(acc))


def _add_values_twin(acc: jax.Array, weights: jax.Array, values) -> jax.Array:
    """The same in jnp for the interpreter, which has no operands of wgmma in registers."""
    values = values[...]
    plgpu.commit_smem()  # unlike wgmma's, this read is not ordered with the copy that follows
    return acc + jnp.dot(weights, values, preferred_element_type=jnp.float32)


def _body(add_values, bounds, q, k, v, out, lse, *, q_s, k_s, v_s, lse_s, q_ready, k_ready, v_ready, free):
    batch, head, part = lax.axis_index("batch"), lax.axis_index("kv"), lax.axis_index("part")
    splits, rows, h = out.shape[0], min(q.shape[2], ROWS), q.shape[3]
    mine = pl.ds(lax.axis_index("tile") * rows, rows)
    first, end = bounds[batch, 0], bounds[batch, 1]
    before = lax.div(first, CHUNK)
    chunks = jnp.maximum(lax.div(end + CHUNK - 1, CHUNK) - before, 0)
    begin, stop = before + lax.div(part * chunks, splits), before + lax.div((part + 1) * chunks, splits)

    def fetch(chunk, slot):
        columns = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(k.at[batch, head, columns], k_s.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(v.at[batch, head, columns], v_s.at[slot], v_ready.at[slot])

    # rows of q_s beyond these hold anything: a row of the products depends on its own query alone
    plgpu.copy_gmem_to_smem(q.at[batch, head, mine], q_s.at[pl.ds(0, rows)], q_ready)
    for slot in range(STAGES):
        pl.when(begin + slot < stop)(lambda slot=slot: fetch(begin + slot, slot))
    plgpu.barrier_wait(q_ready)

    layout = plgpu.Layout.WGMMA
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 1, layout=layout)
    scale = h**-0.5 * _LOG2E  # powers of two are cheaper

    def body(chunk, carry):
        acc, top, total = carry
        slot = lax.rem(chunk - begin, STAGES)

        def scores(ref):
            plgpu.wgmma(ref, q_s, k_s.at[slot].transpose((1, 0)))
            return ref[...]

        plgpu.barrier_wait(k_ready.at[slot])
        s = pl.run_scoped(scores, plgpu.ACC((ROWS, CHUNK), jnp.float32)) * scale

        @pl.when((chunk > begin) & (chunk - 1 + STAGES < stop))
        def _():  # all four warps have read the stage before
            last = lax.rem(chunk - 1 - begin, STAGES)
            plgpu.barrier_wait(free.at[last])
            fetch(chunk - 1 + STAGES, last)

        at = column + chunk * CHUNK
        s = jnp.where(at >= first, jnp.where(at < end, s, -1e30), -1e30)
        new_top = jnp.maximum(top, s.max(axis=1))
        weights = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        weights = weights.astype(q_s.dtype)
        plgpu.barrier_wait(v_ready.at[slot])
        acc = add_values(acc, weights, v_s.at[slot])
        pl.when(chunk + STAGES < stop)(lambda: plgpu.barrier_arrive(free.at[slot]))
        return acc, new_top, total

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    by_row = layout.reduce(1)
    start = full((ROWS, h), 0, layout), full((ROWS,), -1e30, by_row), full((ROWS,), 0, by_row)
    acc, top, total = lax.fori_loop(begin, stop, body, start)
    seen = jnp.maximum(total, 1e-37)  # a part without a column: 0, and a log-sum-exp that weighs nothing
    q_s[...] = (acc / lax.broadcast_in_dim(seen, acc.shape, [0])).astype(q_s.dtype)
    lse_s[...] = top / _LOG2E + jnp.log(seen)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s.at[pl.ds(0, rows)], out.at[part, batch, head, mine])
    plgpu.copy_smem_to_gmem(lse_s.at[pl.ds(0, rows)], lse.at[part, batch, head, mine])
    plgpu.wait_smem_to_gmem(0)
