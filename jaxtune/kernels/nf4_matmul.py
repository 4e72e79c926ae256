"""x Wᵀ for NF4 weights and few rows of x, as in generation: the codes are read once and never become a matrix.

At 64 rows or fewer the product is bound by reading W. Dequantising it first writes and reads it again in 16 bits:
nine times the bytes. Here yᵀ = W xᵀ is made by the matrix units of Hopper (sm_90): 64 rows of W are their long side,
the tokens, padded to a multiple of 8, their short one, and a weight goes from its code straight into the register
in which the unit reads it.

What a byte of codes means comes from a table in shared memory of 256 pairs of bfloat16, once for each of the 32
lanes, so that every lane has a bank to itself: two instructions and one load for two weights. The order of the columns
within a block is chosen for this (`_in_kernel_order`): x is permuted, which costs nothing beside W. Scales are
applied to the float32 product of a block, not to its weights.

A CTA takes `warpgroups`·64 rows of W and a part of its columns; the parts are added in XLA, in one fusion with what
follows. Layers that share x are tiles of one launch, and their LoRA is added where a CTA waits for its first codes:
by itself it would be two more launches a layer, each as long as a quarter of the product.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxtune.kernels import target
from jaxtune.kernels.nf4_matrix import int32
from jaxtune.quant import BLOCK, NF4, NF4_CODE, dequantize_absmax, dequantize_nf4

MAX_ROWS = 64
MAX_RANK = 256  # of the adapters: what one copy takes along a dimension
CHUNK = 256  # columns that a stage holds: 128 bytes of codes a row, the widest swizzle
SMS = 132  # of an H100 or H200: how many parts to make
SHARED = 226 * 1024  # bytes of shared memory for a CTA, barriers left out
WG_ROWS = 64  # of W, the long side of wgmma
WORDS = BLOCK // 8  # 32-bit words of codes in a block
_BLOCKS = CHUNK // BLOCK


class Config(NamedTuple):
    """warpgroups: that multiply, each with 64 rows of W. stages: chunks in flight."""

    warpgroups: int
    stages: int


class Lora(NamedTuple):
    """The adapters of layers that share x as the kernel takes them, made by `fold`; R is their largest rank.

    a: [layers · R, in], columns in kernel order. b: [R, sum(out)], the layers side by side.
    """

    a: jax.Array
    b: jax.Array


def fold(weights: tuple[NF4, ...], adapters: tuple) -> Lora | None:
    """Adapters (A [in, R_i], B [R_i, out_i]) or None of each weight as `Lora`; None if none has an adapter.

    Not to be done for each token: it is up to two launches a product, six of the 35 that a layer would have.
    """
    given = [adapter for adapter in adapters if adapter is not None]
    if not given:
        return None
    (width, _), dtype, rank = given[0][0].shape, given[0][0].dtype, max(a.shape[1] for a, _ in given)
    every_a, every_b = [], []
    for weight, adapter in zip(weights, adapters, strict=True):
        none = jnp.zeros((width, 0), dtype), jnp.zeros((0, len(weight.codes)), dtype)
        a, b = none if adapter is None else adapter
        missing = rank - a.shape[1]
        every_a.append(jnp.pad(a, ((0, 0), (0, missing))))
        every_b.append(jnp.pad(b, ((0, missing), (0, 0))))
    return Lora(_in_kernel_order(jnp.concatenate(every_a, 1).T), jnp.concatenate(every_b, 1))


def reference(x: jax.Array, weights: tuple[NF4, ...], adapters: tuple) -> jax.Array:
    """x W_iᵀ + (x A_i) B_i side by side, float32 [M, sum(out_i)]; arguments as of `nf4_matmul`."""
    x = x.astype(jnp.float32)
    parts = [x @ dequantize_nf4(weight).T for weight in weights]
    for i, adapter in enumerate(adapters):
        if adapter is not None:
            a, b = adapter
            parts[i] += (x @ a.astype(jnp.float32)) @ b.astype(jnp.float32)
    return jnp.concatenate(parts, axis=1)


def supported(rows: int, dtype, shapes: Sequence[tuple[int, int]], rank: int) -> bool:
    """Whether the kernel takes x [rows, in] in `dtype` with NF4 weights of these shapes [out, in] and LoRA's rank."""
    fits = all(out % WG_ROWS == 0 and width % CHUNK == 0 for out, width in shapes)
    hopper = target.capability() == (9, 0)
    few = 0 < rows <= MAX_ROWS and dtype == jnp.bfloat16 and rank <= MAX_RANK
    return hopper and few and fits and config_for(rows, [out for out, _ in shapes], rank) is not None


def config_for(rows: int, outs: Sequence[int], rank: int) -> Config | None:
    """The most rows of W a CTA, so that x is read less often, that leave shared memory for three stages; or None."""
    tokens = _padded(rows)
    for warpgroups in (4, 2, 1):
        tile = warpgroups * WG_ROWS
        fixed = _pairs().nbytes + 4 * tile * tokens + rank * (2 * tile + 4 * tokens)
        stages = (SHARED - fixed) // (2 * tokens * CHUNK + tile * (CHUNK // 2 + 4 * _BLOCKS))
        if stages >= 3 and all(out % tile == 0 for out in outs):
            return Config(warpgroups, min(8, stages))
    return None


def _padded(rows: int) -> int:
    return -(-rows // 8) * 8


@cache
def values() -> np.ndarray:
    """The 16 values as bfloat16: all the nearest but two, which go the other way.

    With all of them nearest a weight would be 0.05 % of a standard deviation too large on average. Random errors of a
    row's weights cancel, a common one is added up by whatever mean x has: 1.5 % of y for a constant x.
    """
    nearest = NF4_CODE.astype(jnp.bfloat16)
    other = nearest.view(np.uint16) + np.where(np.abs(nearest.astype(np.float32)) < np.abs(NF4_CODE), 1, -1)
    return np.where(np.isin(np.arange(16), (3, 8)), other.astype(np.uint16).view(jnp.bfloat16), nearest)


@cache
def _pairs() -> np.ndarray:
    """uint32 [256, 32]: the two bfloat16 that a byte stands for, its high nibble's in the low half."""
    bits = values().view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return np.repeat((bits[byte >> 4] | bits[byte & 15] << 16)[:, None], 32, 1)


def _in_kernel_order(x: jax.Array) -> jax.Array:
    """Columns of x [M, in] as the kernel meets them: 8q + 2t + e of a block is its column 32e + 8t + q.

    Lane t of four reads 8 bytes in a row, 8t to 8t + 7, and byte q goes where wgmma has columns 8q + 2t and the next.
    """
    m, width = x.shape
    return x.reshape(m, width // BLOCK, 2, 4, 8).transpose(0, 1, 4, 3, 2).reshape(m, width)


def _pairs_of(word: ir.Value, table: ir.Value) -> list:
    """Eight codes in 32 bits -> their four bfloat16 pairs, from `_pairs` in shared memory."""
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.shli(arith.andi(utils.thread_idx(), int32(31)), int32(2))
    column = arith.addi(lane, llvm.ptrtoint(i32, utils.memref_ptr(table)))
    out = []
    for i in range(4):
        # one instruction, as are shift and addition
        byte = utils.prmt(word, int32(0), int32(0x4440 + i))
        place = arith.addi(arith.shli(byte, int32(7)), column)
        out.append(llvm.inline_asm(i32, [place], "ld.shared.b32 $0, [$1];", "=r,r"))
    return out


def _weights_in_registers(words: jax.Array, table, block: int) -> jax.Array:
    """Codes int32 [64, in a chunk/8] -> the unscaled weights of one block, bfloat16 [64, 64]; inline PTX."""
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((WG_ROWS, BLOCK), jnp.bfloat16, layout=layout),
    )
    def decode(_, words, table):
        pair, one = ir.VectorType.get((2,), ir.BF16Type.get()), ir.IntegerType.get_signless(32)
        mine = words[:, WORDS * block : WORDS * (block + 1)].registers
        out = np.empty(layout.to_mgpu().registers_shape((WG_ROWS, BLOCK)), object)
        # a thread has rows r and r + 8 of its warp's 16, and of each 8 columns the two from 2·(its lane % 4)
        by_row, out_by_row = mine.reshape(2), out.reshape(BLOCK // 8, 2)
        for row in range(2):
            for i in range(2):
                word = vector.extract(by_row[row], [], [i])
                for byte, value in enumerate(_pairs_of(word, table)):
                    bits = vector.broadcast(ir.VectorType.get((1,), one), value)
                    out_by_row[4 * i + byte, row] = vector.bitcast(pair, bits)
        return FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return decode(words, table)


def _scales_in_registers(scales: jax.Array) -> list[jax.Array]:
    """Ref [64, blocks] -> the column of each block, float32 [64], where the products' rows are; inline."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    column = plgpu.ShapeDtypeStruct((WG_ROWS,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[column] * _BLOCKS)
    def load(_, ref):
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        thread = arith.remui(utils.thread_idx(), int32(128))
        row = arith.addi(
            arith.muli(arith.divui(thread, int32(32)), int32(16)),
            arith.divui(arith.remui(thread, int32(32)), int32(4)),
        )
        out = [np.empty(layout.to_mgpu().registers_shape((WG_ROWS,)), object) for _ in range(_BLOCKS)]
        for half in range(2):
            at = arith.index_cast(index, arith.addi(row, int32(8 * half)))
            four = vector.load(ir.VectorType.get((_BLOCKS,), f32), ref, [at, utils.c(0, index)])
            for block in range(_BLOCKS):
                one = vector.extract_strided_slice(ir.VectorType.get((1,), f32), four, [block], [1], [1])
                out[block].reshape(2)[half] = one
        return [FragmentedArray(_registers=o, _layout=layout.to_mgpu(), _is_signed=None) for o in out]

    return load(scales)


def _block_products(words: jax.Array, scales, x, table) -> Iterator[tuple]:
    """Of each block of a chunk: its scales, float32 [64], and its unscaled product, float32 [64, N].

    words: codes int32 [64, in/8]. scales: ref [64, blocks]. x: ref [N, in]. table: ref of `_pairs`.
    """
    weights = _weights_in_registers(words, table, 0)
    for block, scale in enumerate(_scales_in_registers(scales)):

        def multiply(acc, block=block, weights=weights):
            plgpu.wgmma(acc, weights, x.at[:, pl.ds(block * BLOCK, BLOCK)].T)
            # while the matrix unit works
            following = _weights_in_registers(words, table, block + 1) if block + 1 < _BLOCKS else None
            return acc[...], following

        product, weights = pl.run_scoped(multiply, plgpu.ACC((WG_ROWS, x.shape[0]), jnp.float32))
        yield scale, product


def _block_products_twin(words: jax.Array, scales, x, table) -> Iterator[tuple]:
    """The same in jnp for the interpreter, which has neither inline code nor operands of wgmma in registers."""
    codes = (words[..., None] >> (8 * jnp.arange(4))) & 255
    codes = codes.reshape(WG_ROWS, _BLOCKS, 4, 8).swapaxes(2, 3)  # lane t has bytes 8t + q: here [.., q, t]
    pairs = table[...][codes, 0]
    # bfloat16 is the upper half of float32
    halves = jnp.stack([pairs << 16, pairs & np.uint32(0xFFFF0000)], -1)
    weights = lax.bitcast_convert_type(halves, jnp.float32).reshape(WG_ROWS, _BLOCKS, BLOCK)
    columns = x[...].astype(jnp.float32).reshape(-1, _BLOCKS, BLOCK)
    for block in range(_BLOCKS):
        yield scales[:, block], weights[:, block] @ columns[:, block].T


class _Plan(NamedTuple):
    """tiles: of each weight, `rows` rows of W each. The columns' chunks are cut into `splits` parts. rank: of the
    adapters, 0 without."""

    tiles: tuple[int, ...]
    rows: int
    chunks: int
    splits: int
    rank: int


class _Stages(NamedTuple):
    """Refs in shared memory, by stage, and their barriers: `ready` to be read, `free` to be filled."""

    x: Any  # bfloat16 [stages, N, CHUNK]
    codes: Any  # int32 [stages, rows, CHUNK/8]
    scales: Any  # float32 [stages, rows, CHUNK/64]
    ready: Any
    free: Any


class _Constants(NamedTuple):
    """Refs in shared memory that are filled once, and the barrier that says so."""

    table: Any  # uint32 [256, 32]
    xa: Any  # float32 [R, N], None without adapters
    b: Any  # bfloat16 [R, rows], None without adapters
    ready: Any


def _plan(outs: Sequence[int], width: int, rank: int, config: Config) -> _Plan:
    rows = config.warpgroups * WG_ROWS
    tiles, chunks = tuple(out // rows for out in outs), width // CHUNK
    return _Plan(tiles, rows, chunks, min(chunks, max(1, SMS // sum(tiles))), rank)


def _part(plan: _Plan, index) -> tuple:
    """First chunk of a part of the columns and their number."""
    first = index * plan.chunks // plan.splits
    return first, (index + 1) * plan.chunks // plan.splits - first


def _of_each_weight(plan: _Plan, do: Callable) -> None:
    """Calls do(i, rows) in the program of the CTAs whose tile is of weight i; rows: where the tile lies in it."""
    tile, begin = lax.axis_index("tile"), 0
    for i, tiles in enumerate(plan.tiles):

        @pl.when((tile >= begin) & (tile < begin + tiles))
        def _(i=i, begin=begin):
            do(i, pl.ds((tile - begin) * plan.rows, plan.rows))

        begin += tiles


def _load(plan: _Plan, config: Config, given, constants: _Constants, stages: _Stages) -> None:
    """The warpgroup that copies: constants, then chunks of x, codes and scales as stages become free."""
    x, weights, table, lora = given
    first, count = _part(plan, lax.axis_index("part"))
    plgpu.copy_gmem_to_smem(table, constants.table, constants.ready)
    if lora is not None:
        xa, b = lora
        rows = pl.ds(lax.axis_index("tile") * plan.rows, plan.rows)
        plgpu.copy_gmem_to_smem(b.at[:, rows], constants.b, constants.ready)
        _of_each_weight(plan, lambda i, _: plgpu.copy_gmem_to_smem(xa.at[i], constants.xa, constants.ready))

    def issue(chunk, slot):
        ready = stages.ready.at[slot]
        words, blocks = pl.ds(chunk * (CHUNK // 8), CHUNK // 8), pl.ds(chunk * _BLOCKS, _BLOCKS)

        def weight(i, rows):
            codes, scales = weights[i]
            plgpu.copy_gmem_to_smem(codes.at[rows, words], stages.codes.at[slot], ready)
            plgpu.copy_gmem_to_smem(scales.at[rows, blocks], stages.scales.at[slot], ready)

        _of_each_weight(plan, weight)
        plgpu.copy_gmem_to_smem(x.at[:, pl.ds(chunk * CHUNK, CHUNK)], stages.x.at[slot], ready)

    @pl.loop(0, count + config.stages)
    def _(step):
        slot = lax.rem(step, config.stages)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(stages.free.at[slot])
            plgpu.commit_smem()  # orders what the others have read with the copy that follows

        @pl.when(step < count)
        def _():
            issue(first + step, slot)


def _multiply(
    plan: _Plan, config: Config, products: Callable, rows, constants: _Constants, stages: _Stages
) -> jax.Array:
    """A warpgroup that multiplies: float32 [64, N] of its rows of the tile over the CTA's columns."""
    part, layout = lax.axis_index("part"), plgpu.Layout.WGMMA
    plgpu.barrier_wait(constants.ready)
    acc = plgpu.layout_cast(jnp.zeros((WG_ROWS, stages.x.shape[1]), jnp.float32), layout)

    def rank(r, acc):
        b = plgpu.load(constants.b.at[r, rows], layout=layout.reduce(1)).astype(jnp.float32)
        xa = plgpu.load(constants.xa.at[r], layout=layout.reduce(0))
        return acc + lax.broadcast_in_dim(b, acc.shape, [0]) * lax.broadcast_in_dim(xa, acc.shape, [1])

    def chunk(step, acc):
        slot = lax.rem(step, config.stages)
        plgpu.barrier_wait(stages.ready.at[slot])
        words = plgpu.load(stages.codes.at[slot, rows], layout=layout)
        scales, x = stages.scales.at[slot, rows], stages.x.at[slot]
        for scale, product in products(words, scales, x, constants.table):
            acc += product * lax.broadcast_in_dim(scale, acc.shape, [0])
        plgpu.barrier_arrive(stages.free.at[slot])
        return acc

    if plan.rank:
        acc = lax.fori_loop(0, jnp.where(part == 0, plan.rank, 0), rank, acc)
    return lax.fori_loop(0, _part(plan, part)[1], chunk, acc)


def _swizzled(*shape: int, dtype):
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def _scratch(tokens: int, plan: _Plan, config: Config) -> dict:
    n, lora = config.stages, plan.rank > 0
    return {
        "stages": _Stages(
            _swizzled(n, tokens, CHUNK, dtype=jnp.bfloat16),
            _swizzled(n, plan.rows, CHUNK // 8, dtype=jnp.int32),
            plgpu.SMEM((n, plan.rows, _BLOCKS), jnp.float32),
            plgpu.Barrier(num_barriers=n, num_arrivals=3),
            plgpu.Barrier(num_barriers=n, num_arrivals=config.warpgroups),
        ),
        "constants": _Constants(
            plgpu.SMEM((256, 32), jnp.uint32),
            plgpu.SMEM((plan.rank, tokens), jnp.float32) if lora else None,
            plgpu.SMEM((plan.rank, plan.rows), jnp.bfloat16) if lora else None,
            plgpu.Barrier(num_barriers=1, num_arrivals=3 if lora else 1),
        ),
        "out_s": plgpu.SMEM((plan.rows, tokens), jnp.float32),
    }


def _call(x, weights, lora, config: Config, interpret) -> jax.Array:
    """x bfloat16 [N, in] in kernel order, N a multiple of 8; weights: (int32 codes, float32 scales) of each; lora:
    (float32 [weights, R, N], bfloat16 [R, sum(out)]) or None -> float32 [parts, sum(out), N]."""
    tokens, width = x.shape
    outs = [codes.shape[0] for codes, _ in weights]
    plan = _plan(outs, width, 0 if lora is None else lora[1].shape[0], config)
    products = _block_products if interpret is None else _block_products_twin
    # products of many tokens need more than their share of registers
    uneven = config.warpgroups == 2 and tokens > 32

    def body(x, weights, table, lora, out, *, stages, constants, out_s):
        wg = lax.axis_index("wg")

        @pl.when(wg == config.warpgroups)
        def _():
            if uneven:
                plgpu.set_max_registers(40, action="decrease")
            _load(plan, config, (x, weights, table, lora), constants, stages)

        @pl.when(wg < config.warpgroups)
        def _():
            if uneven:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * WG_ROWS, WG_ROWS)
            out_s[mine] = _multiply(plan, config, products, mine, constants, stages)
            plgpu.commit_smem()
            rows = pl.ds(lax.axis_index("tile") * plan.rows + wg * WG_ROWS, WG_ROWS)
            plgpu.copy_smem_to_gmem(out_s.at[mine], out.at[lax.axis_index("part"), rows])
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.splits, sum(outs), tokens), jnp.float32),
        grid=(sum(plan.tiles), plan.splits),
        grid_names=("tile", "part"),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        scratch_types=_scratch(tokens, plan, config),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(x, weights, jnp.asarray(_pairs()), lora)


def _times_a(x: jax.Array, a: jax.Array) -> jax.Array:
    """A xᵀ, float32 [layers · R, N].

    A product is two launches, 3.3 us. A multiplication and its sum are one, which reads x again for each row of A:
    1.8 us for 8 rows of x, 5 for 64.
    """
    if len(x) > 32:
        return lax.dot_general(a, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.sum(a[:, None].astype(jnp.float32) * x[None].astype(jnp.float32), -1)


def nf4_matmul(
    x: jax.Array,
    weights: tuple[NF4, ...],
    lora: Lora | None,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x W_iᵀ + (x A_i) B_i of layers that share x, side by side.

    Args:
      x: bfloat16 [M, in].
      weights: [out_i, in]; a float32 absmax is read as it is, a double-quantised one decoded before.
      lora: `fold` of their adapters, bfloat16.
      config: by default `config_for`'s.
      interpret: to run on a CPU, with a twin for what the interpreter lacks.

    Returns:
      float32 [M, sum(out_i)].
    """
    m = len(x)
    x = jnp.pad(_in_kernel_order(x), ((0, _padded(m) - m), (0, 0)))
    rank = 0 if lora is None else len(lora.b)
    given, small = [], None
    for weight in weights:
        out, half = weight.codes.shape
        words = lax.bitcast_convert_type(weight.codes.reshape(out, half // 4, 4), jnp.int32)
        given.append((words, dequantize_absmax(weight)))
    if lora is not None:
        small = _times_a(x, lora.a).reshape(len(weights), rank, len(x)), lora.b
    if config is None:
        config = config_for(m, [weight.codes.shape[0] for weight in weights], rank)
        assert config is not None, "not supported"
    parts = _call(x, tuple(given), small, config, interpret)
    return parts.sum(0).T[:m]
