"""Quantise float32 rows into GGML's block types, to the byte as llama.cpp does on x86-64.

A row is cut into blocks of 32 weights (Q4_0 … Q8_0, IQ4_NL) or superblocks of 256 (the K-quants, IQ4_XS), which in
turn have groups of 16 or 32. The layouts are those of ggml-common.h; the searches for the scales are in
`export.block_search`. With an importance vector (the mean of x² for each input column, from an importance matrix)
errors count in proportion to it. Q8_0 and the 16-bit types have no search and ignore it.

Arithmetic is float32 with each operation rounded; scales are stored as float16, and the levels of the K-quants are
rounded once more with the stored scales.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxtune.export.block_search import (
    SMALLEST,
    F,
    Tries,
    affine,
    columns,
    furthest,
    in_order,
    inverse,
    lowest,
    nearest,
    nonlinear,
    positive,
    symmetric,
    symmetric_descent,
)

Kind = GGMLQuantizationType
CHUNK = (
    1 << 15
)  # weights worked on at once: the handful of arrays of that size stay in the second-level cache
SUPERBLOCK = 256
_WITH_IMPORTANCE = Tries(-0.9, 0.05, 36)


def quantise(values: np.ndarray, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantise the rows of a matrix.

    Args:
        values: float32 [rows, width].
        kind: a float type or one of `KINDS`.
        importance: float32 [width], finite and >= 0, or None.

    Returns:
        uint8 [rows, row_bytes], row_bytes as `row_bytes(kind, width)`.

    Raises:
        ValueError: the width is not a multiple of the type's block; NaN or infinity in the values; a value or a
            scale that float16 cannot hold.
    """
    rows, width = values.shape
    out = np.empty((rows, row_bytes(kind, width)), np.uint8)
    if importance is not None:
        importance = _checked_importance(importance, width)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        part = np.ascontiguousarray(values[start : start + step], F)
        if not np.isfinite(part).all():
            raise ValueError("the weights contain NaN or infinity; a file with them would be useless")
        out[start : start + step] = KINDS[kind](part, importance).reshape(len(part), -1)
    return out


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of `width` weights.

    Raises:
        ValueError: the type is not one jaxtune writes, or the width is not a multiple of its block.
    """
    if kind not in KINDS:
        raise ValueError(
            f"GGML type {kind.name} cannot be written; expected {', '.join(k.name for k in KINDS)}"
        )
    block, nbytes = GGML_QUANT_SIZES[kind]
    if width % block:
        raise ValueError(f"rows of {width} weights cannot be {kind.name}: it has blocks of {block}")
    return width // block * nbytes


def _checked_importance(importance: np.ndarray, width: int) -> np.ndarray:
    importance = np.asarray(importance, F)
    if importance.shape != (width,):
        raise ValueError(f"importance has shape {importance.shape}; expected ({width},), one for each column")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance contains NaN, infinity or negative numbers; collect it again")
    return importance


# Storage. Every function below gets float32 [rows, width] and importance [width] or None, and returns uint8.


def _half(d: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = d.astype(np.float16)
    if np.isinf(half).any():
        raise ValueError(
            f"float16 ends at 65504 and cannot hold {np.abs(d).max():.6g}, a weight or the scale of a block; "
            "the training may have diverged (bf16 and f32 can hold it)"
        )
    return half


def _f32(values: np.ndarray, _) -> np.ndarray:
    return values.view(np.uint8)


def _f16(values: np.ndarray, _) -> np.ndarray:
    return _half(values).view(np.uint8)


def _bf16(values: np.ndarray, _) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if ((rounded & 0x7FFF) == 0x7F80).any():
        raise ValueError(f"bfloat16 cannot hold {np.abs(values).max():.6g}; the training may have diverged")
    return rounded.view(np.uint8)


def _store(*parts: np.ndarray) -> np.ndarray:
    """Blocks [B, bytes] from the parts of their layout: [B] or [B, n], float16 or integers."""
    return np.concatenate([np.ascontiguousarray(p.reshape(len(p), -1)).view(np.uint8) for p in parts], axis=1)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [..., 2, n] -> [..., n]: two halves of a run share its bytes, the first one low."""
    return (q[..., 0, :] & 15) | (q[..., 1, :] << 4)


def _crumbs(q: np.ndarray) -> np.ndarray:
    """uint8 [..., 4, n] -> [..., n]: the 2 low bits of the four quarters of a run, the first one lowest."""
    low = q & 3
    return low[..., 0, :] | (low[..., 1, :] << 2) | (low[..., 2, :] << 4) | (low[..., 3, :] << 6)


def _bit_planes(bits: np.ndarray) -> np.ndarray:
    """[B, 8, 32] of 0 or 1 -> uint8 [B, 32]: bit g of byte j belongs to element j of run g."""
    return np.packbits(bits.astype(bool), axis=1, bitorder="little")[:, 0]


def _rows(levels: np.ndarray, *shape: int) -> np.ndarray:
    """Levels [n, G], counted from 0 -> uint8 [B, *shape], elements in the order of the weights."""
    return np.ascontiguousarray(levels.astype(np.uint8).T).reshape(-1, *shape)


def _truncated(level: np.ndarray, top: int) -> np.ndarray:
    """C's (int8_t) and the upper limit, as uint8; what does not fit int8 becomes 0, as it does there."""
    with np.errstate(invalid="ignore"):
        whole = level.astype(np.int32).astype(np.int8)
    return np.minimum(whole, top).astype(np.uint8)


def _weights(x: np.ndarray, importance: np.ndarray, rows: int, sigma2: np.ndarray) -> np.ndarray:
    """Weights [n, G] of the errors: importance * sqrt(sigma² + x²), sigma2 as [G] or for each superblock or row."""
    n, groups = x.shape
    columns_of_row = np.tile(importance.reshape(-1, n).T, (1, rows))  # [n, G]
    return columns_of_row * np.sqrt(np.repeat(sigma2, groups // len(sigma2)) + x * x)


def _mean_square(values: np.ndarray, n: int) -> np.ndarray:
    """[rows, width] -> the mean of x² over each run of n weights."""
    x = columns(values, n)
    return in_order(x * x) / F(n)


# Blocks of 32.


def _q8_0(values: np.ndarray, _) -> np.ndarray:
    x = values.reshape(-1, 32)
    d = np.abs(x).max(1) / F(127)
    with np.errstate(invalid="ignore", over="ignore"):
        y = x * inverse(d)[:, None]
        size = np.abs(y)
        whole = np.floor(size)
        whole += (size - whole) >= F(0.5)  # C's roundf: halves away from zero
        q = np.copysign(whole, y).astype(np.int32).astype(np.int8)
    return _store(_half(d), q)


def _legacy(values: np.ndarray, importance: np.ndarray | None, bits: int, affine_kind: bool) -> np.ndarray:
    """Q4_0, Q5_0 (scale) and Q4_1, Q5_1 (scale and minimum)."""
    if importance is None:
        head, q = (_by_range if affine_kind else _by_extreme)(values.reshape(-1, 32), bits)
    else:
        x = columns(values, 32)
        weights = _weights(x, importance, len(values), _mean_square(values, values.shape[1]))
        if affine_kind:
            scale, low, levels = affine(x, weights, 2**bits - 1, _WITH_IMPORTANCE, want_levels=True)
            head, q = (scale, low), _rows(levels, 32)
        else:
            scale, levels = symmetric(x, weights, 2 ** (bits - 1))
            head, q = (scale,), _rows(levels, 32)
    high = [np.packbits(q >> 4, axis=1, bitorder="little")] if bits == 5 else []
    return _store(*map(_half, head), *high, _nibbles(q.reshape(-1, 2, 16)))


def _by_extreme(x: np.ndarray, bits: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    half = 2 ** (bits - 1)
    d = furthest(x.T) / F(-half)
    with np.errstate(invalid="ignore", over="ignore"):
        return (d,), _truncated(x * inverse(d)[:, None] + F(half + 0.5), 2 * half - 1)


def _by_range(x: np.ndarray, bits: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    top, low = 2**bits - 1, lowest(x.T)
    with np.errstate(invalid="ignore", over="ignore"):
        d = np.abs(x.max(1) - low) / F(top)  # abs: for -0.0 and 0.0 among zeros
        return (d, low), _truncated((x - low[:, None]) * inverse(d)[:, None] + F(0.5), top)


def _iq4_nl(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x = columns(values, 32)
    d = nonlinear(x, _iq4_weights(x, values, importance, 32))
    return _store(_half(d), _nibbles(_rows(nearest(x * inverse(d)), 2, 16)))


def _iq4_weights(x: np.ndarray, values: np.ndarray, importance: np.ndarray | None, block: int) -> np.ndarray:
    if importance is None:
        return x * x
    return _weights(x, importance, len(values), F(2) * _mean_square(values, block))


# Superblocks of 256.


def _affine_superblock(
    values: np.ndarray,
    importance: np.ndarray | None,
    group: int,
    top: int,
    top_scale: int,
    tries: Tries,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The part that Q2_K, Q4_K and Q5_K share: groups with scale and minimum, those quantised in turn.

    Returns:
        d, dmin float16 [B]; scales and minima uint8 [B, groups]; levels uint8 [B, groups, group].
    """
    x = columns(values, group)
    two_bit = top == 3
    if importance is None:
        # Q2_K is the odd one: weights |x| and absolute errors.
        w = np.abs(x) if two_bit else np.sqrt(in_order(x * x) / F(group)) + np.abs(x)
        search = partial(affine, top=top, tries=tries, absolute=two_bit)
    else:
        sigma2 = _mean_square(values, SUPERBLOCK) * F(1 if two_bit else 2)
        w = _weights(x, importance, len(values), sigma2)
        search = partial(affine, top=top, tries=_WITH_IMPORTANCE)
    scale, low, _ = search(x, w)
    scales, minima = (columns(a, SUPERBLOCK // group) for a in (scale, -low))  # [groups, B]
    if importance is None:
        d, ls = _by_largest(scales, top_scale)
        dmin, lm = _by_largest(minima, top_scale)
    else:
        group_weights = columns(in_order(w), SUPERBLOCK // group)
        d, ls = positive(scales, group_weights, top_scale)
        dmin, lm = positive(minima, group_weights, top_scale)
    d, dmin = _half(d), _half(dmin)
    step = (d.astype(F) * ls).T.reshape(-1)  # [G]: the scales a reader will see
    offset = (dmin.astype(F) * lm).T.reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        level = np.clip(np.rint((x + offset) / step), F(0), F(top))
    if (lost := step == 0).any():  # those keep the levels of their own search
        level[:, lost] = search(*(np.compress(lost, a, axis=1) for a in (x, w)), want_levels=True)[2]
    return d, dmin, ls.T, lm.T, _rows(level, SUPERBLOCK // group, group)


def _by_largest(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [B] and levels uint8 [n, B] such that the largest of each column gets level `top`."""
    largest = np.maximum(values.max(0), F(0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        level = np.rint(np.where(largest > 0, F(top) / largest, F(0)) * values).astype(np.int32)
    return largest / F(top), np.minimum(level.astype(np.uint8), top)


def _six_bits(ls: np.ndarray, lm: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and minima in 12 bytes: the last four give their high bits to the first four."""
    ls, lm, ls_last, lm_last = ls[:, :4], lm[:, :4], ls[:, 4:], lm[:, 4:]
    mixed = (ls_last & 15) | (lm_last << 4)
    return np.concatenate([ls | (ls_last >> 4 << 6), lm | (lm_last >> 4 << 6), mixed], axis=1)


def _q2_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, dmin, ls, lm, q = _affine_superblock(values, importance, 16, 3, 15, Tries(-0.5, 0.1, 15))
    return _store(ls | (lm << 4), _crumbs(q.reshape(-1, 2, 4, 32)), d, dmin)


def _q4_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, dmin, ls, lm, q = _affine_superblock(values, importance, 32, 15, 63, Tries(-1.0, 0.1, 20))
    return _store(d, dmin, _six_bits(ls, lm), _nibbles(q.reshape(-1, 4, 2, 32)))


def _q5_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, dmin, ls, lm, q = _affine_superblock(values, importance, 32, 31, 63, Tries(-0.5, 0.1, 15))
    return _store(d, dmin, _six_bits(ls, lm), _bit_planes(q >> 4), _nibbles(q.reshape(-1, 4, 2, 32)))


def _round_with(x: np.ndarray, step: np.ndarray, half: int, searched: np.ndarray) -> np.ndarray:
    """Levels [n, G] counted from 0 for the steps a reader will see; where a step is 0, those of the search."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        level = np.clip(np.rint(x / step), F(-half), F(half - 1)) + F(half)
    return np.where(step == 0, searched, level)


def _q3_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x = columns(values, 16)
    if importance is None:
        scale, searched = symmetric_descent(x, 4)
        scales = columns(scale, 16)  # [16, B]
        largest = furthest(scales)
        inv = np.where(largest != 0, F(-32) / np.where(largest != 0, largest, F(1)), F(0))
        ls = np.clip(np.rint(inv * scales), F(-32), F(31)) + F(32)
        ls[:, largest == 0] = 0
        d = _half(inverse(inv))
    else:
        w = _weights(x, importance, len(values), F(2) * _mean_square(values, SUPERBLOCK))
        scale, searched = symmetric(x, w, 4)
        d, ls = symmetric(columns(scale, 16), columns(in_order(w), 16), 32)
        d = _half(d)
    ls = ls.T.astype(np.uint8)  # [B, 16]
    step = (d.astype(F)[:, None] * (ls.astype(F) - F(32))).reshape(-1)
    q = _rows(_round_with(x, step, 4, searched), 2, 4, 32)
    packed = np.concatenate([_nibbles(ls.reshape(-1, 2, 8)), _crumbs((ls >> 4).reshape(-1, 4, 4))], axis=1)
    return _store(_bit_planes((q > 3).reshape(-1, 8, 32)), _crumbs(q), packed, d)


def _q6_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x = columns(values, 16)
    w = x * x if importance is None else np.tile(importance.reshape(-1, 16).T, (1, len(values)))
    scale, searched = symmetric(x, w, 32)
    scales = columns(scale, 16)  # [16, B]
    largest = furthest(scales)
    empty = np.abs(largest) < SMALLEST
    inv = F(-128) / np.where(empty, F(1), largest)
    ls = np.minimum(np.rint(inv * scales), F(127)).T  # [B, 16]
    d = _half(F(1) / inv)
    step = (d.astype(F)[:, None] * ls).reshape(-1)
    q = _rows(_round_with(x, step, 32, searched), 2, 4, 32)
    low = np.stack([_nibbles(q[:, :, 0::2]), _nibbles(q[:, :, 1::2])], axis=2)
    blocks = _store(low, _crumbs(q >> 4), ls.astype(np.int32).astype(np.int8), d)
    blocks[empty] = 0
    return blocks


def _iq4_xs(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x = columns(values, 32)
    scales = columns(nonlinear(x, _iq4_weights(x, values, importance, SUPERBLOCK)), 8)  # [8, B]
    d = -furthest(scales) / F(32)
    ls = np.clip(np.rint(inverse(d) * scales), F(-32), F(31)).T  # [B, 8]
    step = (d[:, None] * ls).reshape(-1)  # here the float32 scale counts, not the stored one
    q = _rows(nearest(x * inverse(step)), 8, 2, 16)
    ls = (ls + F(32)).astype(np.uint8)
    low = (ls[:, 0::2] & 15) | (ls[:, 1::2] << 4)
    return _store(_half(d), _crumbs((ls >> 4).reshape(-1, 2, 4, 1)), low, _nibbles(q))


KINDS: dict[Kind, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
    Kind.F32: _f32,
    Kind.F16: _f16,
    Kind.BF16: _bf16,
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: partial(_legacy, bits=4, affine_kind=False),
    Kind.Q4_1: partial(_legacy, bits=4, affine_kind=True),
    Kind.Q5_0: partial(_legacy, bits=5, affine_kind=False),
    Kind.Q5_1: partial(_legacy, bits=5, affine_kind=True),
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
    Kind.IQ4_NL: _iq4_nl,
    Kind.IQ4_XS: _iq4_xs,
}
