"""Attention of few queries with a cache, as in a step of generation: softmax statistics beside the output.

Queries that read the same keys are rows of one matrix product: the H/K heads of a kv head, and those of all answers
that share a prompt. What it costs is reading keys and values once. Which columns are seen is known on the device only:
columns without a token are not read, and nothing is compiled anew as answers grow.

On Hopper (sm_90) a CTA takes up to 64 queries and a part of the columns, 64 at a time through a ring in shared memory.
Its one warpgroup also starts the copies: two CTAs of a processor take turns at memory and matrix units.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
_HIDDEN = -1e30  # a masked score


class Attended(NamedTuple):
    """Output normalised over the columns seen [B, K, M, h], and their log-sum-exp, float32 [B, K, M].

    0 and -inf where none is seen.
    """

    out: jax.Array
    lse: jax.Array


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    end: jax.Array,
    softcap: float | None = None,
) -> Attended:
    """`decode_attention` in XLA: scores of all columns, softmax in float32."""
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    column = jnp.arange(k.shape[2])
    seen = (column >= first[:, None]) & (column < end[:, None])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1), _HIDDEN)  # finite where nothing is seen
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(-1)
    out = jnp.einsum("bkms,bksh->bkmh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(total, 1e-37)[..., None]
    return Attended(out.astype(q.dtype), top + jnp.log(total))


def merge(parts: list[Attended]) -> jax.Array:
    """One softmax over the columns of all parts; 0 where none sees any. [B, K, M, h] in their dtype."""
    lse = jnp.stack([part.lse for part in parts])
    shares = jax.nn.softmax(jnp.maximum(lse, _HIDDEN), axis=0)  # finite where nothing is seen
    out = jnp.zeros(parts[0].out.shape, jnp.float32)
    for part, share in zip(parts, shares, strict=True):
        out += part.out.astype(jnp.float32) * share[..., None]
    return out.astype(parts[0].out.dtype)


def supported(q: jax.Array, k: jax.Array, softcap: float | None = None) -> bool:
    """Whether the kernel takes these queries and keys on the GPU that the program is traced for."""
    h = q.shape[-1]
    return (
        softcap is None
        and target.capability() == (9, 0)
        and q.dtype == k.dtype == jnp.bfloat16
        and h in (64, 128)
        and k.shape[2] % CHUNK == 0
    )


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    end: jax.Array,
    softcap: float | None = None,
) -> Attended:
    """Softmax attention of every query with the columns from `first` up to `end` of its cache.

    Args:
      q: [B, K, M, h]. k, v: [B, K, S, h].
      first, end: int32 [B], the columns that are seen: 0 <= first, end <= S; none where end <= first.
      softcap: scores become softcap·tanh(scores/softcap).
    """
    if not supported(q, k, softcap):
        return reference(q, k, v, first, end, softcap)
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

    def attend(*refs, **scratch):
        _attend(_add_values if interpret is None else _add_values_twin, *refs, **scratch)

    out, lse = plgpu.kernel(
        attend,
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, kv, padded, h), q.dtype),
            jax.ShapeDtypeStruct((splits, batch, kv, padded), jnp.float32),
        ),
        grid=(batch, kv, padded // rows, splits),
        grid_names=("batch", "kv", "tile", "part"),
        scratch_types=_scratch(h, q.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(jnp.stack([first, end], 1).astype(jnp.int32), q, k, v)
    return out[..., :queries, :], lse[..., :queries]


class _Stages(NamedTuple):
    """Refs in shared memory of keys and values [stages, 64, h], and by stage the barriers: filled, and read by all."""

    k: Any
    v: Any
    k_ready: Any
    v_ready: Any
    free: Any


def _scratch(h: int, dtype) -> dict:
    def swizzled(*shape):
        return plgpu.SMEM(
            shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        )

    chunks = [swizzled(STAGES, CHUNK, h) for _ in range(2)]
    barriers = [plgpu.Barrier(num_barriers=STAGES) for _ in range(3)]
    return {
        "q_s": swizzled(ROWS, h),  # and the output, at the end
        "stages": _Stages(*chunks, *barriers),
        "lse_s": plgpu.SMEM((ROWS,), jnp.float32),
        "q_ready": plgpu.Barrier(),
    }


def _add_values(acc: jax.Array, weights: jax.Array, values) -> jax.Array:
    """acc [64, h] + weights [64, 64] times the values of a chunk (a ref) [64, h]."""
    multiply: Callable = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))
    return multiply(plgpu.ACC.init(acc))


def _add_values_twin(acc: jax.Array, weights: jax.Array, values) -> jax.Array:
    """The same in jnp for the interpreter, which has no operands of wgmma in registers."""
    values = values[...]
    plgpu.commit_smem()  # unlike wgmma's, this read is not ordered with the copy that follows
    return acc + jnp.dot(weights, values, preferred_element_type=jnp.float32)


def _my_chunks(first: jax.Array, end: jax.Array, splits: int) -> tuple[jax.Array, jax.Array]:
    """First and last + 1 chunk of the columns that this CTA reads."""
    part, before = lax.axis_index("part"), lax.div(first, CHUNK)
    chunks = jnp.where(first < end, lax.div(end + CHUNK - 1, CHUNK) - before, 0)
    return before + lax.div(part * chunks, splits), before + lax.div((part + 1) * chunks, splits)


def _scores(q_s, k, visible: jax.Array) -> jax.Array:
    """q Kᵀ of a chunk (refs), float32 [64, 64], in powers of two, which are cheaper."""

    def multiply(ref):
        plgpu.wgmma(ref, q_s, k.transpose((1, 0)))
        return ref[...]

    s = pl.run_scoped(multiply, plgpu.ACC((ROWS, CHUNK), jnp.float32))
    return jnp.where(visible, s * (q_s.shape[1] ** -0.5 * _LOG2E), _HIDDEN)


def _attend(add_values, bounds, q, k, v, out, lse, *, q_s, stages: _Stages, lse_s, q_ready):
    """The program of a CTA: up to 64 queries of one kv head, a part of its columns."""
    batch, head, part = lax.axis_index("batch"), lax.axis_index("kv"), lax.axis_index("part")
    rows, h, layout = min(q.shape[2], ROWS), q.shape[3], plgpu.Layout.WGMMA
    mine = pl.ds(lax.axis_index("tile") * rows, rows)
    first, end = bounds[batch, 0], bounds[batch, 1]
    begin, stop = _my_chunks(first, end, out.shape[0])

    def fetch(chunk, slot):
        columns = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(k.at[batch, head, columns], stages.k.at[slot], stages.k_ready.at[slot])
        plgpu.copy_gmem_to_smem(v.at[batch, head, columns], stages.v.at[slot], stages.v_ready.at[slot])

    # rows of q_s beyond these hold anything: a row of the products depends on its own query alone
    plgpu.copy_gmem_to_smem(q.at[batch, head, mine], q_s.at[pl.ds(0, rows)], q_ready)
    for slot in range(STAGES):
        pl.when(begin + slot < stop)(lambda slot=slot: fetch(begin + slot, slot))
    plgpu.barrier_wait(q_ready)
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 1, layout=layout)

    def chunk(index, carry):
        acc, top, total = carry
        slot, at = lax.rem(index - begin, STAGES), column + index * CHUNK
        plgpu.barrier_wait(stages.k_ready.at[slot])
        s = _scores(q_s, stages.k.at[slot], (at >= first) & (at < end))

        @pl.when((index > begin) & (index - 1 + STAGES < stop))
        def _():  # a warp may be ahead of the others: not before all have read the last chunk
            last = lax.rem(index - 1 - begin, STAGES)
            plgpu.barrier_wait(stages.free.at[last])
            fetch(index - 1 + STAGES, last)

        new_top = jnp.maximum(top, s.max(axis=1))
        weights = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        plgpu.barrier_wait(stages.v_ready.at[slot])
        acc = add_values(acc, weights.astype(q_s.dtype), stages.v.at[slot])
        pl.when(index + STAGES < stop)(lambda: plgpu.barrier_arrive(stages.free.at[slot]))
        return acc, new_top, total * shrink + weights.sum(axis=1)

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    by_row = layout.reduce(1)
    start = full((ROWS, h), 0, layout), full((ROWS,), _HIDDEN, by_row), full((ROWS,), 0, by_row)
    acc, top, total = lax.fori_loop(begin, stop, chunk, start)
    seen = jnp.maximum(total, 1e-37)  # a part without a column: 0, and a log-sum-exp of -inf
    q_s[...] = (acc / lax.broadcast_in_dim(seen, acc.shape, [0])).astype(q_s.dtype)
    lse_s[...] = top / _LOG2E + jnp.log(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s.at[pl.ds(0, rows)], out.at[part, batch, head, mine])
    plgpu.copy_smem_to_gmem(lse_s.at[pl.ds(0, rows)], lse.at[part, batch, head, mine])
    plgpu.wait_smem_to_gmem(0)
