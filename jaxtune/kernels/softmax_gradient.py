"""Softmax and its gradient of a chunk of logits, read once from memory (Pallas, Mosaic GPU, Hopper).

A row of 128,256 float32 logits is 513 KB: more than an SM's shared memory, less than the L2 cache's share of an SM. A
block takes a row at a time: it streams the row through a ring of tiles in shared memory for the maximum and the sum,
then walks back from the row's end. The tiles still in the ring are not loaded again, and the others come back from
L2, the last read first, which is the order a cache keeps best.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # of a warpgroup; a row is seen as groups of so many logits
BLOCKS = 132  # SMs of an H100 or H200 (SXM); a block's shared memory lets no second one onto its SM
BARRIERS = 32  # Mosaic's limit for one array of barriers: one a slot of the rings
TILES = {jnp.dtype(jnp.float32): range(8, 13), jnp.dtype(jnp.bfloat16): range(8, 17)}  # fit shared memory


class Plan(NamedTuple):
    """How a row of V logits is shared out: `warpgroups`·`rounds` tiles of `tile` groups, then `tail` groups."""

    warpgroups: int
    tile: int
    rounds: int
    tail: int
    slots: int  # tiles of a warpgroup's ring


def plan_for(vocabulary: int, dtype: jax.typing.DTypeLike, warpgroups: int = 4) -> Plan | None:
    """The plan with the shortest tail, which one warpgroup works on alone; None where the kernel does not apply."""
    groups, rest = divmod(vocabulary, LANES)
    sizes = TILES.get(jnp.dtype(dtype))
    if rest or sizes is None or groups < warpgroups * sizes[-1]:
        return None
    tile = min(sizes, key=lambda size: (groups % (warpgroups * size), -size))
    rounds, tail = divmod(groups, warpgroups * tile)
    return Plan(warpgroups, tile, rounds, tail, min(rounds, BARRIERS // warpgroups))


def supported(logits: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whole groups of 128, float32 or bfloat16, at least 6,144 (float32) of them: all of today's large vocabularies."""
    return plan_for(logits.shape[1], logits.dtype) is not None


def reference(logits: jax.Array, weights: jax.Array, scale: float = 1.0) -> tuple[jax.Array, ...]:
    """`softmax_gradient` in jax.numpy."""
    scaled = logits.astype(jnp.float32) * scale
    top = jnp.max(scaled, axis=1)
    total = jnp.sum(jnp.exp(scaled - top[:, None]), axis=1)
    lse = top + jnp.log(total)
    grad = jnp.exp(scaled - lse[:, None]) * (weights * scale)[:, None]
    return top, lse, grad.astype(jnp.bfloat16)


def softmax_gradient(
    logits: jax.Array,
    weights: jax.Array,
    scale: float = 1.0,
    *,
    plan: Plan | None = None,
    blocks: int = BLOCKS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax of scale·logits, and what it gives to the gradient of a loss: the label's own part is the caller's.

    Args:
      logits: [c, V] float32 or bfloat16. weights: float32 [c], the upstream gradient of each row.
      scale: positive. plan, blocks: how the work is shared out. interpret: run on the CPU.

    Returns:
      Of each row the largest scaled logit and the log of the sum of their exponentials, float32 [c]; and
      bfloat16 [c, V], weight·scale·softmax.
    """
    rows, vocabulary = logits.shape
    plan = plan or plan_for(vocabulary, logits.dtype)
    if plan is None:
        raise ValueError(f"no kernel for logits {logits.dtype}{logits.shape}: see supported()")
    groups, blocks = vocabulary // LANES, min(blocks, rows)
    vector = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def body(*refs, **scratch):
        _Warpgroup(*refs, **scratch, plan=plan, blocks=blocks, scale=scale).work()

    kernel = plgpu.kernel(
        body,
        out_type=(vector, vector, jax.ShapeDtypeStruct((rows, groups, LANES), jnp.bfloat16)),
        scratch_types=_scratch(plan, logits.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    top, total, grad = kernel(logits.reshape(rows, groups, LANES), weights)
    return top * scale, top * scale + jnp.log(total), grad.reshape(rows, vocabulary)


def _scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    tail = (max(plan.tail, 1), LANES)
    return {
        "ring": plgpu.SMEM((plan.warpgroups, plan.slots, plan.tile, LANES), dtype),
        "staged": plgpu.SMEM((plan.warpgroups, 2, plan.tile, LANES), jnp.bfloat16),
        "tail": plgpu.SMEM(tail, dtype),
        "tail_staged": plgpu.SMEM(tail, jnp.bfloat16),
        "tops": plgpu.SMEM((plan.warpgroups * LANES,), jnp.float32),
        "totals": plgpu.SMEM((plan.warpgroups * LANES,), jnp.float32),
        "agreed": plgpu.SMEM((2,), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=plan.warpgroups * plan.slots),
        "tail_loaded": plgpu.Barrier(),
        "met": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """What one warpgroup of a block does. In global memory a row is [V/128, 128]; the rest is shared memory."""

    logits: Any  # [c, V/128, 128]
    weights: Any  # [c]
    top: Any  # [c]
    total: Any  # [c]
    grad: Any  # [c, V/128, 128]
    ring: Any  # [warpgroups, slots, tile, 128]: tile t of a row lies in slot t % slots
    staged: Any  # [warpgroups, 2, tile, 128], gradients on their way out
    tail: Any
    tail_staged: Any
    tops: Any  # [warpgroups·128], each lane's maximum, and
    totals: Any  # its sum of exponentials under that maximum
    agreed: Any  # the row's maximum, and weight·scale over its sum
    loaded: Any  # a barrier a slot
    tail_loaded: Any
    met: Any  # all warpgroups
    plan: Plan
    blocks: int
    scale: float

    @property
    def index(self):
        return lax.axis_index("warpgroup")

    def when_tail(self, do) -> None:
        if self.plan.tail:
            pl.when(self.index == self.plan.warpgroups - 1)(do)

    def power(self, logits):
        """exp(scale·logits); the hardware has 2^x."""
        return jnp.exp2(logits * (self.scale * math.log2(math.e)))

    def columns(self, t):
        """Tile t of this warpgroup; neighbouring warpgroups read neighbouring tiles."""
        return pl.ds((t * self.plan.warpgroups + self.index) * self.plan.tile, self.plan.tile)

    def tail_columns(self):
        whole = self.plan.warpgroups * self.plan.rounds * self.plan.tile
        return pl.ds(whole, self.plan.tail)

    def load(self, row, t) -> None:
        slot = lax.rem(t, self.plan.slots)
        barrier = self.loaded.at[self.index * self.plan.slots + slot]
        plgpu.copy_gmem_to_smem(self.logits.at[row, self.columns(t)], self.ring.at[self.index, slot], barrier)

    def load_tail(self, row) -> None:
        plgpu.copy_gmem_to_smem(self.logits.at[row, self.tail_columns()], self.tail, self.tail_loaded)

    def wait(self, t) -> None:
        plgpu.barrier_wait(self.loaded.at[self.index * self.plan.slots + lax.rem(t, self.plan.slots)])

    def work(self) -> None:
        block, rows = lax.axis_index("block"), self.weights.shape[0]
        for t in range(self.plan.slots):
            self.load(block, t)
        self.when_tail(lambda: self.load_tail(block))

        def one_row(i, _):
            row = block + i * self.blocks
            self.read(row)
            self.agree(row)
            self.write(row)
            return 0

        lax.fori_loop(0, (rows - block + self.blocks - 1) // self.blocks, one_row, 0)
        plgpu.wait_smem_to_gmem(0)

    def read(self, row) -> None:
        """First way, to the row's end: each lane's maximum and sum into `tops` and `totals`."""
        plan = self.plan

        def add(ref, groups, carry):
            top, total = carry
            values = [ref[g].astype(jnp.float32) for g in range(groups)]
            new = functools.reduce(jnp.maximum, values, top)
            total = total * self.power(top - new)
            return new, functools.reduce(jnp.add, [self.power(x - new) for x in values], total)

        def add_tile(t, carry):
            self.wait(t)
            carry = add(self.ring.at[self.index, lax.rem(t, plan.slots)], plan.tile, carry)

            @pl.when(t + plan.slots < plan.rounds)
            def _():
                plgpu.commit_smem()  # what was read here, before the copy overwrites it
                self.load(row, t + plan.slots)

            return carry

        lowest = jnp.full((LANES,), jnp.finfo(jnp.float32).min)
        carry = lax.fori_loop(0, plan.rounds, add_tile, (lowest, jnp.zeros((LANES,), jnp.float32)))
        mine = pl.ds(self.index * LANES, LANES)
        self.tops[mine], self.totals[mine] = carry

        def add_tail():
            plgpu.barrier_wait(self.tail_loaded)
            self.tops[mine], self.totals[mine] = add(self.tail, plan.tail, carry)

        self.when_tail(add_tail)

    def agree(self, row) -> None:
        """One warpgroup puts the lanes' sums together: Mosaic's scratch for a reduction serves one at a time."""
        self.meet()

        @pl.when(self.index == 0)
        def _():
            tops = self.tops[...]
            top = jnp.max(tops)
            total = jnp.sum(self.totals[...] * self.power(tops - top))
            self.top[row], self.total[row] = top, total
            self.agreed[0], self.agreed[1] = top, self.weights[row] * self.scale / total

        self.meet()

    def meet(self) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def write(self, row) -> None:
        """The way back: the gradient, and the next row's first tiles into the slots that fall free."""
        plan, following = self.plan, row + self.blocks
        top, factor = self.agreed[0], self.agreed[1]
        more = following < self.weights.shape[0]

        def put(source, staged, columns):
            staged[...] = (self.power(source[...].astype(jnp.float32) - top) * factor).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, self.grad.at[row, columns])

        def put_tile(step, _):
            t = plan.rounds - 1 - step
            pl.when(step >= plan.slots)(lambda: self.wait(t))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of two steps before: the same place is used
            source = self.ring.at[self.index, lax.rem(t, plan.slots)]
            put(source, self.staged.at[self.index, lax.rem(step, 2)], self.columns(t))
            pl.when(t >= plan.slots)(lambda: self.load(row, t - plan.slots))
            pl.when((t < plan.slots) & more)(lambda: self.load(following, t))
            return 0

        def put_tail():
            put(self.tail, self.tail_staged, self.tail_columns())
            pl.when(more)(lambda: self.load_tail(following))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the row before: long done
        self.when_tail(put_tail)
        lax.fori_loop(0, plan.rounds, put_tile, 0)
