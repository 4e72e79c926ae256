"""x Wᵀ for NF4 weights and few rows of x, as in generation: the codes are read once and never become a matrix.

At 64 rows or fewer the product is bound by reading W. Dequantising it first writes and reads it again in 16 bits:
nine times the bytes. Here yᵀ = W xᵀ is made by the matrix units of Hopper (sm_90): 64 rows of W are their long side,
the tokens, padded to a multiple of 8, their short one, and a weight goes from its code straight into the register
in which the unit reads it.

What a byte of codes means comes from a table in shared memory of 256 pairs of bfloat16, once for each of the 32
lanes, so that every lane has a bank to itself: one instruction and one load for two weights. The order of the columns
within a block is chosen for this (`_in_kernel_order`): x is permuted, which costs nothing beside W. Scales are
applied to the float32 product of a block, not to its weights.

A CTA takes `warpgroups`·64 rows of W and a part of its columns; the parts are added in XLA, together with what
follows (LoRA, residual).
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

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
from jaxtune.quant import BLOCK, NF4, NF4_CODE, dequantize_absmax, dequantize_nf4

MAX_ROWS = 64
CHUNK = 256  # columns that a stage holds: 128 bytes of codes a row, the widest swizzle
SMS = 132  # of an H100 or H200: how many parts to make
SHARED = 226 * 1024  # bytes of shared memory for a CTA, barriers left out
WG_ROWS = 64  # of W, the long side of wgmma
WORDS = BLOCK // 8  # 32-bit words of codes in a block
_BLOCKS = CHUNK // BLOCK


class Config(NamedTuple):
    """warpgroups: that multiply, each with 64 rows of W. stages: chunks in flight. table: lookup in shared memory, or
    in registers by byte permutation."""

    warpgroups: int
    stages: int
    table: bool = True


def reference(x: jax.Array, weights: tuple[NF4, ...]) -> jax.Array:
    """x [M, in] times each weight [out_i, in] transposed, side by side: float32 [M, sum(out_i)]."""
    x = x.astype(jnp.float32)
    return jnp.concatenate([x @ dequantize_nf4(weight).T for weight in weights], axis=1)


@cache
def _pairs() -> np.ndarray:
    """uint32 [256, 32]: the two bfloat16 that a byte stands for, its high nibble's in the low half."""
    bits = NF4_CODE.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return np.repeat((bits[byte >> 4] | bits[byte & 15] << 16)[:, None], 32, 1)


def _in_kernel_order(x: jax.Array) -> jax.Array:
    """Columns of x [M, in] as the kernel meets them: 8q + 2t + e of a block is its column 32e + 8t + q.

    Lane t of four reads 8 bytes in a row, 8t to 8t + 7, and byte q goes where wgmma has columns 8q + 2t and the next.
    """
    m, width = x.shape
    return x.reshape(m, width // BLOCK, 2, 4, 8).transpose(0, 1, 4, 3, 2).reshape(m, width)


def _const(value: int) -> ir.Value:
    return utils.c(int(np.uint32(value).view(np.int32)), ir.IntegerType.get_signless(32))


def _lookup_in_table(table: ir.Value):
    """words -> four bfloat16 pairs, from the table in shared memory."""
    i32 = ir.IntegerType.get_signless(32)
    base = llvm.ptrtoint(i32, utils.memref_ptr(table))
    lane = arith.shli(arith.andi(utils.thread_idx(), _const(31)), _const(2))

    def pairs(word):
        out = []
        for byte in range(4):
            # byte · 128 bytes; the lane's bank is or-ed in the same instruction
            shift = 8 * byte - 7
            moved = arith.shrui(word, _const(shift)) if shift > 0 else arith.shli(word, _const(-shift))
            place = arith.addi(arith.ori(arith.andi(moved, _const(0x7F80)), lane), base)
            out.append(llvm.inline_asm(i32, [place], "ld.shared.b32 $0, [$1];", "=r,r"))
        return out

    return pairs


def _lookup_in_registers():
    """words -> four bfloat16 pairs: the table's two byte planes lie in registers and `prmt` picks four bytes at once."""
    raw = NF4_CODE.astype(jnp.bfloat16).view(np.uint8).reshape(16, 2)
    planes = [[_const(v) for v in np.ascontiguousarray(raw[:, p]).view(np.uint32)] for p in range(2)]

    def plane(table, codes, upper):
        below, above = utils.prmt(table[0], table[1], codes), utils.prmt(table[2], table[3], codes)
        return utils.prmt(below, above, upper)

    def pairs(word):
        out = []
        index = arith.andi(word, _const(0x77777777))
        top = arith.andi(arith.shrui(word, _const(1)), _const(0x44444444))
        for half in range(2):  # four codes each
            shift = _const(16 * half)
            codes = arith.shrui(index, shift)
            upper = arith.ori(arith.andi(arith.shrui(top, shift), _const(0x4444)), _const(0x3210))
            low, high = (plane(table, codes, upper) for table in planes)
            out += [utils.prmt(low, high, _const(selector)) for selector in (0x4051, 0x6273)]
        return out

    return pairs


def _weights_in_registers(words: jax.Array, table, block: int, config: Config) -> jax.Array:
    """Codes int32 [64, in a chunk/8] -> the unscaled weights of one block, bfloat16 [64, 64]; inline PTX."""
    layout = plgpu.Layout.WGMMA
    arguments = (layout, plgpu.RefType()) if config.table else (layout,)

    @plgpu.inline_mgpu(
        arg_types=arguments, return_type=plgpu.ShapeDtypeStruct((WG_ROWS, BLOCK), jnp.bfloat16, layout=layout)
    )
    def decode(_, words, *table):
        lookup = _lookup_in_table(*table) if table else _lookup_in_registers()
        bf16, i32 = ir.BF16Type.get(), ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), bf16)
        mine = words[:, WORDS * block : WORDS * (block + 1)].registers  # a thread's: [.., half of the 16 rows, ..]
        out = np.empty(layout.to_mgpu().registers_shape((WG_ROWS, BLOCK)), object)
        flat_in, flat_out = mine.reshape(1, 1, 2), out.reshape(1, BLOCK // 8, 2)
        for rows in range(2):
            for i in range(2):
                word = vector.extract(flat_in[0, 0, rows], [], [i])
                for byte, value in enumerate(lookup(word)):
                    bits = vector.broadcast(ir.VectorType.get((1,), i32), value)
                    flat_out[0, 4 * i + byte, rows] = vector.bitcast(pair, bits)
        return FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return decode(words, table) if config.table else decode(words)


def _scales_in_registers(scales: jax.Array) -> list[jax.Array]:
    """Ref [64, blocks] -> the column of each block, float32 [64], where the products' rows are; inline."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    column = plgpu.ShapeDtypeStruct((WG_ROWS,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[column] * _BLOCKS)
    def load(_, ref):
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        thread = arith.remui(utils.thread_idx(), _const(128))
        row = arith.addi(
            arith.muli(arith.divui(thread, _const(32)), _const(16)),
            arith.divui(arith.remui(thread, _const(32)), _const(4)),
        )
        out = [np.empty(layout.to_mgpu().registers_shape((WG_ROWS,)), object) for _ in range(_BLOCKS)]
        for half in range(2):
            at = arith.index_cast(index, arith.addi(row, _const(8 * half)))
            four = vector.load(ir.VectorType.get((_BLOCKS,), f32), ref, [at, utils.c(0, index)])
            for block in range(_BLOCKS):
                one = vector.extract_strided_slice(ir.VectorType.get((1,), f32), four, [block], [1], [1])
                out[block].reshape(2)[half] = one
        return [FragmentedArray(_registers=o, _layout=layout.to_mgpu(), _is_signed=None) for o in out]

    return load(scales)


def _block_products(words: jax.Array, scales, x, table, config: Config) -> Iterator[tuple]:
    """Of each block of a chunk: its scales, float32 [64], and its unscaled product, float32 [64, N].

    words: codes int32 [64, in/8]. scales: ref [64, blocks]. x: ref [N, in]. table: ref of `_pairs`.
    """
    for block, scale in enumerate(_scales_in_registers(scales)):
        weights = _weights_in_registers(words, table, block, config)

        def multiply(acc, block=block, weights=weights):
            plgpu.wgmma(acc, weights, x.at[:, pl.ds(block * BLOCK, BLOCK)].T)
            return acc[...]

        yield scale, pl.run_scoped(multiply, plgpu.ACC((WG_ROWS, x.shape[0]), jnp.float32))


def _block_products_twin(words: jax.Array, scales, x, table, config: Config) -> Iterator[tuple]:
    """The same in jnp for the interpreter, which has neither inline code nor operands of wgmma in registers."""
    del config
    codes = (words[..., None] >> (8 * jnp.arange(4))) & 255
    codes = codes.reshape(WG_ROWS, _BLOCKS, 4, 8).swapaxes(2, 3)  # lane t has bytes 8t + q: here [.., q, t]
    pairs = table[...][codes, 0]
    halves = jnp.stack([pairs << 16, pairs & np.uint32(0xFFFF0000)], -1)  # bfloat16 is the upper half of float32
    weights = lax.bitcast_convert_type(halves, jnp.float32).reshape(WG_ROWS, _BLOCKS, BLOCK)
    columns = x[...].astype(jnp.float32).reshape(-1, _BLOCKS, BLOCK)
    for block in range(_BLOCKS):
        yield scales[:, block], weights[:, block] @ columns[:, block].T


class _Plan(NamedTuple):
    """tiles: of each weight, `rows` rows of W each. The columns' chunks are cut into `splits` parts."""

    tiles: tuple[int, ...]
    rows: int
    chunks: int
    splits: int


def _plan(outs: tuple[int, ...], width: int, config: Config) -> _Plan:
    rows = config.warpgroups * WG_ROWS
    tiles, chunks = tuple(out // rows for out in outs), width // CHUNK
    return _Plan(tiles, rows, chunks, min(chunks, max(1, SMS // sum(tiles))))


def _part(plan: _Plan, index) -> tuple:
    """First chunk of a part of the columns and their number."""
    first = index * plan.chunks // plan.splits
    return first, (index + 1) * plan.chunks // plan.splits - first


def _load(plan: _Plan, config: Config, x, weights, buffers, ready, free) -> None:
    """The thread that copies: chunks of x, codes and scales into the stages, as these become free."""
    tile, (first, count) = lax.axis_index("tile"), _part(plan, lax.axis_index("part"))
    x_s, codes_s, scales_s = buffers

    def issue(chunk, slot):
        start, begin = chunk * CHUNK, 0
        plgpu.copy_gmem_to_smem(x.at[:, pl.ds(start, CHUNK)], x_s.at[slot], ready.at[slot])
        for (codes, scales), tiles in zip(weights, plan.tiles, strict=True):

            @pl.when((tile >= begin) & (tile < begin + tiles))
            def _(codes=codes, scales=scales, begin=begin):
                rows = pl.ds((tile - begin) * plan.rows, plan.rows)
                words, blocks = pl.ds(chunk * (CHUNK // 8), CHUNK // 8), pl.ds(chunk * _BLOCKS, _BLOCKS)
                plgpu.copy_gmem_to_smem(codes.at[rows, words], codes_s.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(scales.at[rows, blocks], scales_s.at[slot], ready.at[slot])

            begin += tiles

    @pl.loop(0, count + config.stages)
    def _(step):
        slot = lax.rem(step, config.stages)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        @pl.when(step < count)
        def _():
            issue(first + step, slot)


def _multiply(plan: _Plan, config: Config, products, wg, buffers, table, ready, free) -> jax.Array:
    """A warpgroup that multiplies: float32 [64, N] of its rows of W over the CTA's columns."""
    x_s, codes_s, scales_s = buffers
    rows = pl.ds(wg * WG_ROWS, WG_ROWS)
    _, count = _part(plan, lax.axis_index("part"))

    def chunk(step, acc):
        slot = lax.rem(step, config.stages)
        plgpu.barrier_wait(ready.at[slot])
        words = plgpu.load(codes_s.at[slot, rows], layout=plgpu.Layout.WGMMA)
        for scale, product in products(words, scales_s.at[slot, rows], x_s.at[slot], table, config):
            acc += product * lax.broadcast_in_dim(scale, acc.shape, [0])
        plgpu.barrier_arrive(free.at[slot])
        return acc

    zeros = jnp.zeros((WG_ROWS, x_s.shape[1]), jnp.float32)
    return lax.fori_loop(0, count, chunk, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))


def _swizzled(*shape: int, dtype) -> plgpu.SMEM:
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def _scratch(tokens: int, plan: _Plan, config: Config) -> dict:
    stages = config.stages
    return {
        "buffers": (
            _swizzled(stages, tokens, CHUNK, dtype=jnp.bfloat16),
            _swizzled(stages, plan.rows, CHUNK // 8, dtype=jnp.int32),
            plgpu.SMEM((stages, plan.rows, _BLOCKS), jnp.float32),
        ),
        "table_s": plgpu.SMEM((256, 32), jnp.uint32),
        "out_s": plgpu.SMEM((plan.rows, tokens), jnp.float32),
        "filled": plgpu.Barrier(num_barriers=1),
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=config.warpgroups),
    }


def _call(x, weights, config: Config, interpret) -> jax.Array:
    """x bfloat16 [N, in] in kernel order, N a multiple of 8 -> float32 [parts, sum(out), N]."""
    tokens, width = x.shape
    outs = tuple(codes.shape[0] for codes, _ in weights)
    plan = _plan(outs, width, config)
    products = _block_products if interpret is None else _block_products_twin

    def body(x, weights, table, out, *, buffers, table_s, out_s, filled, ready, free):
        wg = lax.axis_index("wg")

        @pl.when(wg == config.warpgroups)
        def _():
            plgpu.copy_gmem_to_smem(table, table_s, filled)
            _load(plan, config, x, weights, buffers, ready, free)

        @pl.when(wg < config.warpgroups)
        def _():
            plgpu.barrier_wait(filled)
            mine = pl.ds(wg * WG_ROWS, WG_ROWS)
            out_s[mine] = _multiply(plan, config, products, wg, buffers, table_s, ready, free)
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
    return kernel(x, weights, jnp.asarray(_pairs()))


def nf4_matmul(
    x: jax.Array, weights: tuple[NF4, ...], config: Config | None = None, interpret=None
) -> jax.Array:
    """x Wᵀ of weights that share x, side by side.

    Args:
      x: bfloat16 [M, in], M at most 64.
      weights: [out_i, in] for which `supported` holds.
      config: by default the one that suits M.
      interpret: plgpu.InterpretGPUParams, to run on a CPU.

    Returns:
      float32 [M, sum(out_i)].
    """
    m = x.shape[0]
    padded = jnp.pad(_in_kernel_order(x), ((0, -m % 8), (0, 0)))
    given = []
    for weight in weights:
        out, half = weight.codes.shape
        words = lax.bitcast_convert_type(weight.codes.reshape(out, half // 4, 4), jnp.int32)
        given.append((words, dequantize_absmax(weight)))
    outs = tuple(codes.shape[0] for codes, _ in given)
    parts = _call(padded, tuple(given), config or _config(len(padded), outs), interpret)
    return parts.sum(0).T[:m]


def _config(tokens: int, outs: tuple[int, ...]) -> Config:
    """What suits a padded number of tokens: 256 rows of W a CTA where x leaves room for them in shared memory."""
    widest = 4 if tokens <= 32 else 2
    warpgroups = next(w for w in (4, 2, 1) if w <= widest and all(out % (w * WG_ROWS) == 0 for out in outs))
    rows = warpgroups * WG_ROWS
    stage = 2 * tokens * CHUNK + rows * (CHUNK // 2 + 4 * _BLOCKS)
    return Config(warpgroups, min(8, (SHARED - _pairs().nbytes - 4 * rows * tokens) // stage))
