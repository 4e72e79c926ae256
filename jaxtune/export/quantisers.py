"""Quantise float32 rows into GGML's block types, to the byte as llama.cpp does on x86-64.

A row is cut into blocks of 32 weights (Q4_0 … Q8_0, IQ4_NL) or superblocks of 256 (the K-quants, IQ4_XS), which in
turn have groups of 16 or 32. The layouts are in `export.block_layouts`, the searches for the scales in
`export.block_search`. With an importance vector (the mean of x² for each input column, from an importance matrix)
errors count in proportion to it. Q8_0 and the 16-bit types have no search and ignore it.

Arithmetic is float32 with each operation rounded; scales are stored as float16, and the levels of the K-quants are
rounded once more with the stored scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxtune.export import block_layouts as layouts
from jaxtune.export.block_layouts import nibbles, store
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
# Weights worked on at once, by measurement: large enough that NumPy's calls cost little beside the work itself, and
# small enough that the handful of arrays of that size stay in a cache.
CHUNK = 1 << 18
SUPERBLOCK = 256
WITH_IMPORTANCE = Tries(-0.9, 0.05, 36)


@dataclass(frozen=True)
class _Affine:
    """A K-quant whose groups have a scale and a minimum.

    Attributes:
        group: weights in a group.
        top, top_scale: the largest level of a weight, and of a scale or minimum.
        tries: the inverse scales searched without importance.
        absolute: without importance, errors are absolute ones with weights |x|, and not squares with rms + |x|.
        sigma2: the factor of the mean square in the weights with importance.
    """

    group: int
    top: int
    top_scale: int
    tries: Tries
    absolute: bool = False
    sigma2: int = 2


AFFINE = {
    Kind.Q2_K: _Affine(16, 3, 15, Tries(-0.5, 0.1, 15), absolute=True, sigma2=1),
    Kind.Q4_K: _Affine(32, 15, 63, Tries(-1.0, 0.1, 20)),
    Kind.Q5_K: _Affine(32, 31, 63, Tries(-0.5, 0.1, 15)),
}


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
        importance = check_importance(importance, width)
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


def check_importance(importance: np.ndarray, width: int) -> np.ndarray:
    """float32 [width] of what was given.

    Raises:
        ValueError: another shape; NaN, infinity or negative numbers.
    """
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
        raise overflow(np.abs(d).max())
    return half


def overflow(value: float) -> ValueError:
    """The error for a weight or scale beyond float16."""
    return ValueError(
        f"float16 ends at 65504 and cannot hold {value:.6g}, a weight or the scale of a block; the training may have "
        "diverged (bf16 and f32 can hold it)"
    )


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


def _rows(levels: np.ndarray, *shape: int) -> np.ndarray:
    """Levels [n, G], counted from 0 -> uint8 [B, *shape], by default [B, 256], in the order of the weights."""
    return np.ascontiguousarray(levels.astype(np.uint8).T).reshape(-1, *(shape or (SUPERBLOCK,)))


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
    return store(_half(d), q)


def _legacy(values: np.ndarray, importance: np.ndarray | None, bits: int, affine_kind: bool) -> np.ndarray:
    """Q4_0, Q5_0 (scale) and Q4_1, Q5_1 (scale and minimum)."""
    if importance is None:
        head, q = (_by_range if affine_kind else _by_extreme)(values.reshape(-1, 32), bits)
    else:
        x = columns(values, 32)
        weights = _weights(x, importance, len(values), _mean_square(values, values.shape[1]))
        if affine_kind:
            scale, low, levels = affine(x, weights, 2**bits - 1, WITH_IMPORTANCE, want_levels=True)
            head, q = (scale, low), _rows(levels, 32)
        else:
            scale, levels = symmetric(x, weights, 2 ** (bits - 1))
            head, q = (scale,), _rows(levels, 32)
    high = [np.packbits(q >> 4, axis=1, bitorder="little")] if bits == 5 else []
    return store(*map(_half, head), *high, nibbles(q.reshape(-1, 2, 16)))


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
    return store(_half(d), nibbles(_rows(nearest(x * inverse(d)), 2, 16)))


def _iq4_weights(x: np.ndarray, values: np.ndarray, importance: np.ndarray | None, block: int) -> np.ndarray:
    if importance is None:
        return x * x
    return _weights(x, importance, len(values), F(2) * _mean_square(values, block))


# Superblocks of 256.


def _affine_superblock(
    values: np.ndarray, importance: np.ndarray | None, kind: Kind
) -> tuple[np.ndarray, ...]:
    """Groups with scale and minimum, those quantised in turn: Q2_K, Q4_K and Q5_K.

    Returns:
        d, dmin float16 [B]; scales and minima uint8 [B, groups]; levels uint8 [B, 256].
    """
    form = AFFINE[kind]
    group, top = form.group, form.top
    x = columns(values, group)
    if importance is None:
        w = np.abs(x) if form.absolute else np.sqrt(in_order(x * x) / F(group)) + np.abs(x)
        search = partial(affine, top=top, tries=form.tries, absolute=form.absolute)
    else:
        w = _weights(x, importance, len(values), F(form.sigma2) * _mean_square(values, SUPERBLOCK))
        search = partial(affine, top=top, tries=WITH_IMPORTANCE)
    scale, low, _ = search(x, w)
    scales, minima = (columns(a, SUPERBLOCK // group) for a in (scale, -low))  # [groups, B]
    if importance is None:
        d, ls = _by_largest(scales, form.top_scale)
        dmin, lm = _by_largest(minima, form.top_scale)
    else:
        group_weights = columns(in_order(w), SUPERBLOCK // group)
        d, ls = positive(scales, group_weights, form.top_scale)
        dmin, lm = positive(minima, group_weights, form.top_scale)
    d, dmin = _half(d), _half(dmin)
    step = (d.astype(F) * ls).T.reshape(-1)  # [G]: the scales a reader will see
    offset = (dmin.astype(F) * lm).T.reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        level = np.clip(np.rint((x + offset) / step), F(0), F(top))
    if (lost := step == 0).any():  # those keep the levels of their own search
        level[:, lost] = search(*(np.compress(lost, a, axis=1) for a in (x, w)), want_levels=True)[2]
    return d, dmin, ls.T, lm.T, _rows(level)


def _by_largest(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [B] and levels uint8 [n, B] such that the largest of each column gets level `top`."""
    largest = np.maximum(values.max(0), F(0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        level = np.rint(np.where(largest > 0, F(top) / largest, F(0)) * values).astype(np.int32)
    return largest / F(top), np.minimum(level.astype(np.uint8), top)


def _q2_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return layouts.q2_k(*_affine_superblock(values, importance, Kind.Q2_K))


def _q4_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return layouts.q4_k(*_affine_superblock(values, importance, Kind.Q4_K))


def _q5_k(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return layouts.q5_k(*_affine_superblock(values, importance, Kind.Q5_K))


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
    return layouts.q3_k(d, ls, _rows(_round_with(x, step, 4, searched)))


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
    blocks = layouts.q6_k(d, ls.astype(np.int8), _rows(_round_with(x, step, 32, searched)))
    blocks[empty] = 0
    return blocks


def _iq4_xs(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x = columns(values, 32)
    scales = columns(nonlinear(x, _iq4_weights(x, values, importance, SUPERBLOCK)), 8)  # [8, B]
    d = -furthest(scales) / F(32)
    ls = np.clip(np.rint(inverse(d) * scales), F(-32), F(31)).T  # [B, 8]
    step = (d[:, None] * ls).reshape(-1)  # here the float32 scale counts, not the stored one
    q = nearest(x * inverse(step))
    return layouts.iq4_xs(_half(d), (ls + F(32)).astype(np.uint8), _rows(q))


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
