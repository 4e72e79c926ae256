"""[W | E]: the matrix that a product with NF4 weights and their adapters reads, written in one pass over the codes.

W is the dequantised weights one below the other, E what stands beside (or below) them: the adapters' B or A. In
bfloat16, or in 8-bit floats, there also as Wᵀ: products of 8-bit floats read both sides along their inner axis.

XLA's fusion of the same reaches half of the memory's speed in bfloat16 and a fifth in 8 bits. Here every load and
store is 8 or 16 bytes a thread and whole sectors a warp. A code's value is in the lane of that number (`shfl` takes
it modulo 32, so that nothing needs to be masked): a shift, a shuffle and a multiplication a weight. The arithmetic is
`quant.dequantize_nf4`'s, in float32, rounded once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from jaxtune.kernels import target
from jaxtune.quant import BLOCK, NESTED_BLOCK, NF4, NF4_CODE, dequantize_nf4, dynamic_map

THREADS = 128
UNROLL = 4  # items of a thread: that many loads are under way at once
VECTOR = 16  # bytes of a store
ROWS = 128  # of W that a block turns into columns of Wᵀ
MAX_BYTES = 2**32  # of the result: offsets are 32 bits


def dense(weight: NF4 | jax.Array, dtype) -> jax.Array:
    """A stored weight as [out, in] in `dtype`."""
    return dequantize_nf4(weight, dtype) if isinstance(weight, NF4) else weight.astype(dtype)


def reference(
    weights: Sequence, extra: jax.Array, scale: jax.Array | None, below: bool, transposed: bool
) -> jax.Array:
    """What `nf4_matrix` computes."""
    if scale is None:
        w = jnp.concatenate([dense(weight, extra.dtype) for weight in weights])
    else:
        w = jnp.concatenate([dense(weight, jnp.float32) / scale for weight in weights])
    w = (w.T if transposed else w).astype(extra.dtype)
    return jnp.concatenate([w, extra], axis=0 if below else 1)


def nf4_matrix(
    weights: Sequence[NF4 | jax.Array],
    extra: jax.Array,
    *,
    scale: jax.Array | None = None,
    below: bool = False,
    transposed: bool = False,
) -> jax.Array:
    """[W | extra] or [W; extra] (`below`), with Wᵀ for W where `transposed`, in extra's dtype.

    Args:
      weights: [out_i, in], NF4 for the kernel.
      extra: [sum(out), E], [E, in], or of Wᵀ's sides.
      scale: float32 [], a power of two that W is divided by.
    """
    if supported(weights, extra, below, transposed):
        return kernel(weights, extra, scale, below, transposed)
    return reference(weights, extra, scale, below, transposed)


def supported(weights: Sequence, extra: jax.Array, below: bool, transposed: bool) -> bool:
    """Whether the kernel takes these on the GPU that is traced for."""
    if target.capability() != (9, 0) or extra.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return False
    if not all(isinstance(weight, NF4) for weight in weights) or (transposed and extra.dtype.itemsize != 1):
        return False
    inner = sum(2 * weight.codes.size for weight in weights)
    if (inner + extra.size) * extra.dtype.itemsize >= MAX_BYTES:
        return False
    item = VECTOR // extra.dtype.itemsize
    whole = extra.size % (THREADS * UNROLL * item) == 0 and extra.shape[1] % item == 0
    return whole and all(_blocks(weight, item, transposed) is not None for weight in weights)


def _blocks(weight: NF4, item: int, transposed: bool) -> int | None:
    """CTAs that a weight takes; None if it does not divide into them. item: elements of a store."""
    out, width = len(weight.codes), 2 * weight.codes.shape[1]
    if transposed:
        whole = out % ROWS == 0 and width % (BLOCK * UNROLL) == 0
        return out // ROWS * (width // BLOCK // UNROLL) if whole else None
    elements = 2 * item * THREADS * UNROLL
    return out * width // elements if out * width % elements == 0 else None


class _Part(NamedTuple):
    """CTAs from `first` on work at a weight: its refs' place among the arguments, and where in the result it lies."""

    first: int
    count: int
    refs: slice
    row: int
    width: int
    nested: bool


class _Plan(NamedTuple):
    """All parts, and the result: bytes of an element and of a row; which CTAs copy `extra`, the bytes of its rows and
    where the first lies."""

    parts: tuple[_Part, ...]
    itemsize: int
    pitch: int
    transposed: bool
    scaled: bool
    extra_first: int
    extra_count: int
    extra_row: int
    extra_at: int


_i8, _i32, _i64, _f32 = (
    lambda: ir.IntegerType.get_signless(8),
    lambda: ir.IntegerType.get_signless(32),
    lambda: ir.IntegerType.get_signless(64),
    lambda: ir.F32Type.get(),
)


def int32(value: int) -> ir.Value:
    """A 32-bit constant in inline code."""
    return utils.c(int(np.uint32(value).view(np.int32)), _i32())


def _inline(*arguments: Any, **options: Any) -> Any:
    return llvm.inline_asm(*arguments, **options)


def _at(ref: ir.Value, offset: ir.Value) -> ir.Value:
    """Address in global memory, `offset` (unsigned 32-bit) bytes behind a ref's first."""
    pointer = utils.memref_ptr(ref)
    wide = arith.extui(_i64(), offset)
    moved = llvm.getelementptr(pointer.type, pointer, [wide], [-2147483648], _i8(), llvm.GEPNoWrapFlags.none)
    return llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), moved)


def _load(ref: ir.Value, offset: ir.Value, kind: ir.Type, alignment: int) -> ir.Value:
    return llvm.load(kind, _at(ref, offset), alignment=alignment)


def _load_words(ref: ir.Value, offset: ir.Value, count: int) -> list[ir.Value]:
    vector = _load(ref, offset, ir.VectorType.get((count,), _i32()), 4 * count)
    return [llvm.extractelement(vector, int32(i)) for i in range(count)]


def _store_words(ref: ir.Value, offset: ir.Value, words: list[ir.Value]) -> None:
    kind = ir.VectorType.get((len(words),), _i32())
    vector = llvm.mlir_undef(kind)
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word, int32(i))
    llvm.store(vector, _at(ref, offset), alignment=4 * len(words))


def _quotient(x: ir.Value, by: int) -> tuple[ir.Value, ir.Value]:
    return arith.divui(x, int32(by)), arith.remui(x, int32(by))


def _lane_table() -> ir.Value:
    """The value of code `lane % 16`, float32."""
    lane = arith.andi(utils.thread_idx(), int32(15))
    value = utils.c(float(NF4_CODE[0]), _f32())
    for code in range(1, 16):
        hit = arith.cmpi(arith.CmpIPredicate.eq, lane, int32(code))
        value = arith.select(hit, utils.c(float(NF4_CODE[code]), _f32()), value)
    return value


def _value(table: ir.Value, word: ir.Value, nibble: int) -> ir.Value:
    index = word if nibble == 0 else arith.shrui(word, int32(4 * nibble))
    shuffle = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return _inline(_f32(), [table, index], shuffle, "=f,f,r", has_side_effects=True)


def _packed(low: ir.Value, high: ir.Value, itemsize: int) -> ir.Value:
    """Two float32 as two neighbouring elements: 32 bits of bfloat16, 16 bits of e4m3."""
    name, kind, register = {2: ("bf16x2", _i32(), "r"), 1: ("satfinite.e4m3x2", None, "h")}[itemsize]
    kind = kind or ir.IntegerType.get_signless(16)
    return _inline(kind, [high, low], f"cvt.rn.{name}.f32 $0, $1, $2;", f"={register},f,f")


def _words(values: list[ir.Value], itemsize: int) -> list[ir.Value]:
    """float32 values -> 32-bit words of packed elements."""
    pairs = [_packed(a, b, itemsize) for a, b in zip(values[::2], values[1::2], strict=True)]
    if itemsize == 2:
        return pairs
    wide = [arith.extui(_i32(), pair) for pair in pairs]
    return [arith.ori(a, arith.shli(b, int32(16))) for a, b in zip(wide[::2], wide[1::2], strict=True)]


def _absmax(part: _Part, refs: list, table: ir.Value, index: ir.Value, inverse: ir.Value | None) -> ir.Value:
    """The scale of block `index` of a weight, float32."""
    four = int32(4)
    if part.nested:
        _, codes, scales, offset = refs
        code = arith.extui(_i32(), _load(codes, index, _i8(), 1))
        value = _load(table, arith.muli(code, four), _f32(), 4)
        group = arith.divui(index, int32(NESTED_BLOCK))
        value = arith.mulf(value, _load(scales, arith.muli(group, four), _f32(), 4))
        value = arith.addf(value, _load(offset, int32(0), _f32(), 4))
    else:
        value = _load(refs[1], arith.muli(index, four), _f32(), 4)
    return value if inverse is None else arith.mulf(value, inverse)


class _Items(NamedTuple):
    """What the CTAs of one weight share."""

    part: _Part
    plan: _Plan
    refs: list
    maps: ir.Value
    lane: ir.Value
    inverse: ir.Value | None
    out: ir.Value

    def scale(self, index: ir.Value) -> ir.Value:
        return _absmax(self.part, self.refs, self.maps, index, self.inverse)


def _dequantise_rows(work: _Items, block: ir.Value) -> None:
    """Items of VECTOR/itemsize code bytes, a flat run of them a CTA: two stores each, of a block's halves."""
    part, plan = work.part, work.plan
    item = VECTOR // plan.itemsize  # code bytes of an item, elements of a store
    a_row, a_block = part.width // (2 * item), BLOCK // (2 * item)
    first = arith.addi(arith.muli(block, int32(THREADS * UNROLL)), utils.thread_idx())
    items = [arith.addi(first, int32(THREADS * i)) for i in range(UNROLL)]
    codes = [_load_words(work.refs[0], arith.muli(i, int32(item)), item // 4) for i in items]
    scales = [work.scale(arith.divui(i, int32(a_block))) for i in items]
    for at, words, scale in zip(items, codes, scales, strict=True):
        row, inner = _quotient(at, a_row)
        block_of_row, piece = _quotient(inner, a_block)
        column = arith.addi(arith.muli(block_of_row, int32(BLOCK)), arith.muli(piece, int32(item)))
        start = arith.muli(arith.addi(row, int32(part.row)), int32(plan.pitch))
        start = arith.addi(start, arith.muli(column, int32(plan.itemsize)))
        for half in range(2):  # the high nibbles are the first 32 elements of a block
            values = [
                arith.mulf(_value(work.lane, word, 2 * byte + 1 - half), scale)
                for word in words
                for byte in range(4)
            ]
            place = arith.addi(start, int32(half * BLOCK // 2 * plan.itemsize))
            _store_words(work.out, place, _words(values, plan.itemsize))


def _dequantise_columns(work: _Items, block: ir.Value) -> None:
    """ROWS rows by UNROLL blocks a CTA. A thread turns 8 code bytes of 4 rows into 16 columns of 4 elements, so that
    the 8 threads of 32 rows write whole sectors."""
    part, plan = work.part, work.plan
    warp, lane = _quotient(utils.thread_idx(), 32)
    group, piece = _quotient(lane, 4)
    tile_row, tile_column = _quotient(block, part.width // BLOCK // UNROLL)
    row = arith.addi(
        arith.muli(tile_row, int32(ROWS)),
        arith.addi(arith.muli(warp, int32(32)), arith.muli(group, int32(4))),
    )
    rows = [arith.addi(row, int32(i)) for i in range(4)]
    for step in range(UNROLL):
        block_of_row = arith.addi(arith.muli(tile_column, int32(UNROLL)), int32(step))
        blocks = [arith.addi(arith.muli(r, int32(part.width // BLOCK)), block_of_row) for r in rows]
        offset = arith.muli(piece, int32(8))
        codes = [_load_words(work.refs[0], arith.addi(arith.muli(b, int32(32)), offset), 2) for b in blocks]
        scales = [work.scale(b) for b in blocks]
        for half in range(2):
            for byte in range(8):
                values = [
                    arith.mulf(_value(work.lane, words[byte // 4], 2 * (byte % 4) + 1 - half), scale)
                    for words, scale in zip(codes, scales, strict=True)
                ]
                column = arith.addi(
                    arith.muli(block_of_row, int32(BLOCK)), arith.addi(offset, int32(32 * half + byte))
                )
                place = arith.addi(arith.muli(column, int32(plan.pitch)), arith.addi(row, int32(part.row)))
                _store_words(work.out, place, _words(values, 1))


def _copy_extra(plan: _Plan, extra: ir.Value, out: ir.Value, block: ir.Value) -> None:
    first = arith.addi(arith.muli(block, int32(THREADS * UNROLL)), utils.thread_idx())
    items = [arith.addi(first, int32(THREADS * i)) for i in range(UNROLL)]
    loaded = [_load_words(extra, arith.muli(i, int32(VECTOR)), 4) for i in items]
    for at, words in zip(items, loaded, strict=True):
        row, inner = _quotient(at, plan.extra_row // VECTOR)
        place = arith.addi(arith.muli(row, int32(plan.pitch)), arith.muli(inner, int32(VECTOR)))
        _store_words(out, arith.addi(place, int32(plan.extra_at)), words)


def _program(plan: _Plan, *refs: ir.Value) -> None:
    """What one CTA does: the work of the part that its number falls into."""
    *weights, scale, maps, extra, out = refs
    block = arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x))
    one = utils.c(1.0, _f32())
    inverse = arith.divf(one, _load(scale, int32(0), _f32(), 4)) if plan.scaled else None
    lane = _lane_table()

    def within(first: int, count: int, work: Callable[[ir.Value], None]) -> None:
        local = arith.subi(block, int32(first))  # wraps around below `first`
        branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, local, int32(count)))
        with ir.InsertionPoint(branch.then_block):
            work(local)
            scf.yield_([])

    for part in plan.parts:
        items = _Items(part, plan, weights[part.refs], maps, lane, inverse, out)
        within(
            part.first,
            part.count,
            partial(_dequantise_columns if plan.transposed else _dequantise_rows, items),
        )
    within(plan.extra_first, plan.extra_count, partial(_copy_extra, plan, extra, out))


def _plan(weights: Sequence[NF4], extra: jax.Array, scaled: bool, below: bool, transposed: bool) -> _Plan:
    itemsize = extra.dtype.itemsize
    outs, width = [len(weight.codes) for weight in weights], 2 * weights[0].codes.shape[1]
    inner = sum(outs) if transposed else width
    pitch = (inner if below else inner + extra.shape[1]) * itemsize
    parts, first, row, ref = [], 0, 0, 0
    for weight, out in zip(weights, outs, strict=True):
        nested = weight.absmax_scale is not None
        refs = slice(ref, ref + (4 if nested else 2))
        count = _blocks(weight, VECTOR // itemsize, transposed)
        assert count is not None
        parts.append(_Part(first, count, refs, row, width, nested))
        first, row, ref = first + count, row + out, refs.stop
    extra_at = (width if transposed else sum(outs)) * pitch if below else inner * itemsize
    extra_row, copies = extra.shape[1] * itemsize, extra.size * itemsize // (VECTOR * THREADS * UNROLL)
    return _Plan(tuple(parts), itemsize, pitch, transposed, scaled, first, copies, extra_row, extra_at)


def kernel(weights: Sequence[NF4], extra: jax.Array, scale: jax.Array | None, below: bool, transposed: bool):
    """`reference` in one pass. Inline code throughout: it runs on GPUs only."""
    plan = _plan(weights, extra, scale is not None, below, transposed)
    height = weights[0].codes.shape[1] * 2 if transposed else sum(len(weight.codes) for weight in weights)
    shape = (height + (len(extra) if below else 0), plan.pitch // plan.itemsize)
    arguments = [leaf for weight in weights for leaf in weight if leaf is not None]
    arguments += [jnp.float32(1) if scale is None else scale, jnp.asarray(dynamic_map()), extra]
    arguments = [leaf.reshape(1) if leaf.ndim == 0 else leaf for leaf in arguments]

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(lambda _, *refs: _program(plan, *refs))(
            *refs
        )

    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, extra.dtype),
        grid=(plan.extra_first + plan.extra_count,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return call(*arguments)
