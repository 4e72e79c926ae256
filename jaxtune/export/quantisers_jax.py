"""The K-quants in JAX, for a GPU: the algorithms of `export.quantisers`, compiled.

The bytes are not promised to be llama.cpp's: a compiler fuses products with sums into one rounding and turns divisions
by constants into products, so that a few blocks in a thousand round otherwise, with the same error on the whole. Two
things keep it at that: sums are written out in order (`_total`), and where a rounding decides it is kept (`Exact`).
The NumPy path gives the bytes.

Laid out as there: x and w [n, G], G groups of n weights; searches keep their state in [G].
"""

import operator
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jax import lax

from jaxtune.export import block_layouts as layouts
from jaxtune.export.block_search import SMALLEST, Tries
from jaxtune.export.quantisers import (
    AFFINE,
    SUPERBLOCK,
    WITH_IMPORTANCE,
    check_importance,
    overflow,
    row_bytes,
)

Kind = GGMLQuantizationType
KINDS = frozenset({Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K})
# Superblocks compiled for: a tensor goes through in parts of the first size that holds it all, or of the last.
_SIZES = (1 << 12, 1 << 14, 1 << 16)


def quantise(values: np.ndarray | jax.Array, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
    """As `quantisers.quantise`, for the types in `KINDS`, on JAX's default device.

    Args:
        values: float32 [rows, width], of NumPy or JAX.
        kind, importance: as there.

    Returns:
        uint8 [rows, row_bytes].

    Raises:
        ValueError: as there.
    """
    rows, width = values.shape
    blocks_here = blocks_on_device(values, kind, importance)
    out = np.empty((rows, row_bytes(kind, width)), np.uint8).reshape(rows * width // SUPERBLOCK, -1)
    at = 0
    for blocks, finite, largest in blocks_here:
        if not finite:
            raise ValueError("the weights contain NaN or infinity; a file with them would be useless")
        if largest > np.finfo(np.float16).max:
            raise overflow(float(largest))
        out[at : at + len(blocks)] = np.asarray(blocks)[: len(out) - at]
        at += len(blocks)
    return out.reshape(rows, -1)


def blocks_on_device(
    values: np.ndarray | jax.Array, kind: Kind, importance: np.ndarray | None = None
) -> list:
    """`quantise` before its results are looked at: parts of (blocks uint8 [B, bytes], finite, largest scale), the last
    part filled up with zeros."""
    width = values.shape[1]
    row_bytes(kind, width)  # raises for a width that is no multiple of a superblock
    x = values.reshape(-1, SUPERBLOCK)
    weights = None if importance is None else jnp.asarray(check_importance(importance, width))
    step = next((size for size in _SIZES if len(x) <= size), _SIZES[-1])
    return [_part(x[i : i + step], kind, weights, step, i) for i in range(0, len(x), step)]


def _part(x, kind: Kind, importance: jax.Array | None, size: int, start: int):
    """One part, filled up with zeros to `size` superblocks; runs in the background."""
    x = jnp.asarray(x, jnp.float32)
    x = jnp.pad(x, ((0, size - len(x)), (0, 0)))
    if importance is not None:
        per_row = importance.reshape(-1, SUPERBLOCK)
        importance = per_row[(start + np.arange(size)) % len(per_row)]
    return _quantise(x, importance, np.int32(0), kind)


@partial(jax.jit, static_argnames="kind")
def _quantise(x: jax.Array, importance: jax.Array | None, zero: jax.Array, kind: Kind):
    """Superblocks float32 [B, 256] -> blocks uint8 [B, bytes], whether x is finite, the largest scale.

    zero: a 0 that the compiler does not know.
    """

    exact = Exact(zero)
    if kind in AFFINE:
        scales, parts = _affine_superblock(exact, x, importance, kind)
    else:
        scales, parts = (_q3_k if kind == Kind.Q3_K else _q6_k)(exact, x, importance)
    blocks = getattr(layouts, kind.name.lower())(*(d.astype(jnp.float16) for d in scales), *parts)
    if kind == Kind.Q6_K:
        blocks = jnp.where((scales[0] == 0)[:, None], 0, blocks)
    return blocks, jnp.isfinite(x).all(), jnp.abs(jnp.stack(scales)).max()


def _columns(x: jax.Array, n: int) -> jax.Array:
    return x.reshape(-1, n).T


def _total(terms: jax.Array) -> jax.Array:
    """[n, G] -> [G], summed from the first element to the last."""
    return reduce(operator.add, [terms[i] for i in range(len(terms))])


def _rows(levels: jax.Array) -> jax.Array:
    return levels.astype(jnp.uint8).T.reshape(-1, SUPERBLOCK)


class Exact(NamedTuple):
    """Float32 arithmetic whose roundings the compiler may not leave out.

    zero: a 0 that it does not know. A detour over the bits of a number, with it, keeps that number: a product out of a
    fused multiply-add, a conversion to float16 and back from being taken for nothing. A GPU's own division and root of
    float32 are units off; in float64 they are not, if what follows is kept from them: LLVM narrows the division of two
    widened numbers back to float32, and XLA converts a float64 to float16 in one step.
    """

    zero: jax.Array

    def _kept(self, a: jax.Array) -> jax.Array:
        bits = jnp.dtype(f"int{8 * a.dtype.itemsize}")
        return lax.bitcast_convert_type(lax.bitcast_convert_type(a, bits) ^ self.zero.astype(bits), a.dtype)

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a * b."""
        return self._kept(a * b)

    def over(self, a, b) -> jax.Array:
        """a / b, to the nearest."""
        with jax.enable_x64(True):
            quotient = self._kept(jnp.asarray(a, jnp.float64) / jnp.asarray(b, jnp.float64)).astype(
                jnp.float32
            )
        return self._kept(quotient)

    def root(self, a: jax.Array) -> jax.Array:
        """√a, to the nearest."""
        with jax.enable_x64(True):
            root = self._kept(jnp.sqrt(a.astype(jnp.float64))).astype(jnp.float32)
        return self._kept(root)

    def stored(self, d: jax.Array) -> jax.Array:
        """What a reader will see of a scale: float16, in float32."""
        return self._kept(d.astype(jnp.float16)).astype(jnp.float32)


def _weights(exact: Exact, x: jax.Array, importance: jax.Array, factor: float, n: int) -> jax.Array:
    squares = exact.times(x, x)
    rows = squares.T.reshape(8, 32, -1)  # 256 additions in order, in 8 rounds
    sums = lax.fori_loop(
        0, 8, lambda i, total: _total(jnp.concatenate([total[None], rows[i]])), jnp.zeros(len(x))
    )
    sigma2 = factor * sums / SUPERBLOCK
    return _columns(importance * exact.root(sigma2[:, None] + squares), n)


def _affine_superblock(exact: Exact, x: jax.Array, importance: jax.Array | None, kind: Kind):
    """d and dmin, and scales, minima, levels, of Q2_K, Q4_K, Q5_K."""
    form = AFFINE[kind]
    columns = _columns(x, form.group)
    if importance is None:
        rms = 0 if form.absolute else exact.root(_total(exact.times(columns, columns)) / form.group)
        w, tries, absolute = rms + jnp.abs(columns), form.tries, form.absolute
    else:
        w = _weights(exact, x, importance, form.sigma2, form.group)
        tries, absolute = WITH_IMPORTANCE, False
    scale, low, inv, low_before = _affine(exact, columns, w, form.top, tries, absolute)
    groups = SUPERBLOCK // form.group
    scales, minima = _columns(scale, groups), _columns(-low, groups)
    if importance is None:
        (d, ls), (dmin, lm) = (_by_largest(exact, a, form.top_scale) for a in (scales, minima))
    else:
        group_weights = _columns(_total(w), groups)
        both = jnp.concatenate([scales, minima], 1), jnp.concatenate([group_weights, group_weights], 1)
        d, ls = _positive(exact, *both, form.top_scale)
        (d, dmin), (ls, lm) = jnp.split(d, 2), jnp.split(ls, 2, 1)
    step, offset = ((exact.stored(a) * b).T.reshape(-1) for a, b in ((d, ls), (dmin, lm)))
    searched = jnp.rint((columns - low_before) * inv)
    level = jnp.where(step == 0, searched, jnp.rint(exact.over(columns + offset, step)))
    levels = _rows(jnp.clip(level, 0, form.top))
    return (d, dmin), (ls.T.astype(jnp.uint8), lm.T.astype(jnp.uint8), levels)


def _affine(exact: Exact, x, w, top: int, tries: Tries, absolute: bool):
    """As `block_search.affine`; instead of levels, the inverse scale and the minimum that made them.

    All products are rounded: levels that are all one higher, with a minimum that is a step lower, have the same error,
    and roundings alone decide between them.
    """
    low = jnp.minimum(x.min(0), 0)
    flat = ~jnp.isfinite(exact.over(top, x.max(0) - low))
    high = jnp.where(flat, low + 1, x.max(0))
    sum_w, sum_x = _total(w), _total(exact.times(w, x))
    numerators = jnp.asarray(tries.numerators(top))

    def levels(inv, low):
        return jnp.clip(jnp.rint((x - low) * inv), 0, top)

    def error(level, scale, low):
        difference = exact.times(level, scale) + low - x
        return _total(
            exact.times(w, jnp.abs(difference) if absolute else exact.times(difference, difference))
        )

    def attempt(k, state):
        _, low, least, *_ = state
        inv = exact.over(numerators[k], high - low)
        level = levels(inv, low)
        term = exact.times(w, level)
        sum_l, sum_l2, sum_xl = _total(term), _total(exact.times(term, level)), _total(exact.times(term, x))
        determinant = exact.times(sum_w, sum_l2) - exact.times(sum_l, sum_l)
        new_scale = exact.over(exact.times(sum_w, sum_xl) - exact.times(sum_x, sum_l), determinant)
        new_low = exact.over(exact.times(sum_l2, sum_x) - exact.times(sum_l, sum_xl), determinant)
        new_scale = jnp.where(new_low > 0, exact.over(sum_xl, sum_l2), new_scale)
        new_low = jnp.minimum(new_low, 0)
        new_error = error(level, new_scale, new_low)
        better = (determinant > 0) & (new_error < least)
        new = (new_scale, new_low, new_error, inv, low)
        return tuple(jnp.where(better, a, b) for a, b in zip(new, state))

    first = exact.over(top, high - low)
    one = exact.over(1, first)
    start = (one, low, error(levels(first, low), one, low), first, low)
    scale, best_low, _, inv, low_before = lax.fori_loop(0, len(numerators), attempt, start)
    zero = jnp.zeros_like(low)
    return tuple(
        jnp.where(flat, a, b) for a, b in ((zero, scale), (low, best_low), (zero, inv), (low, low_before))
    )


def _by_largest(exact: Exact, values: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    largest = jnp.maximum(values.max(0), 0)
    level = jnp.rint(jnp.where(largest > 0, exact.over(top, largest), 0) * values)
    return exact.over(largest, top), jnp.where(jnp.isfinite(level), jnp.clip(level, 0, top), 0)


def _extreme(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first element of the largest absolute value, or 1 where that is as good as zero, and where it is."""
    extreme = jnp.take_along_axis(x, jnp.abs(x).argmax(0)[None], 0)[0]
    zero = jnp.abs(extreme) < SMALLEST
    return jnp.where(zero, 1, extreme), zero


def _symmetric(exact: Exact, x, w, half: int):
    """As `block_search.symmetric`."""
    extreme, zero = _extreme(x)
    numerators = jnp.asarray(
        [-(np.float32(half) + np.float32(0.1) * np.float32(k)) for k in range(-9, 10) if k]
    )

    def sums(inv):
        level = jnp.clip(jnp.rint(x * inv), -half, half - 1)
        return _total(w * x * level), _total(w * level * level)

    def attempt(k, state):
        _, best, _ = state
        inv = exact.over(numerators[k], extreme)
        sum_lx, sum_l2 = sums(inv)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        new_scale = exact.over(sum_lx, sum_l2)
        return tuple(jnp.where(better, a, b) for a, b in zip((new_scale, new_scale * sum_lx, inv), state))

    winner = exact.over(-half, extreme)
    sum_lx, sum_l2 = sums(winner)
    scale = jnp.where(sum_l2 != 0, exact.over(sum_lx, sum_l2), 0)
    scale, _, winner = lax.fori_loop(0, len(numerators), attempt, (scale, scale * sum_lx, winner))
    levels = jnp.clip(jnp.rint(x * winner), -half, half - 1) + half
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, levels)


def _descend(exact: Exact, x, w, level, lowest: float, highest: float):
    """As `block_search._descend`; returns the scale and the levels."""

    def sweep(_, state):
        sum_lx, sum_l2, *levels = state
        for i in range(len(x)):
            old, wx = levels[i], w[i] * x[i]
            rest_lx, rest_l2 = sum_lx - exact.times(wx, old), sum_l2 - exact.times(w[i] * old, old)
            new = jnp.clip(jnp.rint(exact.over(x[i] * rest_l2, rest_lx)), lowest, highest)
            new_lx, new_l2 = rest_lx + exact.times(wx, new), rest_l2 + exact.times(w[i] * new, new)
            better = (rest_lx > 0) & (new != old) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            levels[i] = jnp.where(better, new, old)
            sum_lx, sum_l2 = jnp.where(better, new_lx, sum_lx), jnp.where(better, new_l2, sum_l2)
        return sum_lx, sum_l2, *levels

    start = (_total(w * x * level), _total(w * level * level), *level)
    sum_lx, sum_l2, *levels = lax.fori_loop(0, 5, sweep, start)
    return jnp.where(sum_l2 > 0, exact.over(sum_lx, sum_l2), 0), jnp.stack(levels)


def _symmetric_descent(exact: Exact, x, half: int):
    extreme, zero = _extreme(x)
    level = jnp.clip(jnp.rint(x * exact.over(-half, extreme)), -half, half - 1)
    scale, level = _descend(exact, x, x * x, level, -half, half - 1)
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, level + half)


def _positive(exact: Exact, x, w, top: int):
    """As `block_search.positive`."""
    highest = jnp.maximum(x.max(0), 0)
    zero = highest < SMALLEST
    highest = jnp.where(zero, 1, highest)

    def error(inv):
        difference = x - exact.times(exact.over(1, inv), jnp.minimum(jnp.rint(inv * x), top))
        return _total(exact.times(w * difference, difference))

    winner = exact.over(top, highest)
    least = error(winner)
    for k in (*range(-4, 0), *range(1, 5)):
        inv = exact.over(np.float32(0.1) * np.float32(k) + np.float32(top), highest)
        new_error = error(inv)
        winner = jnp.where(new_error < least, inv, winner)
        least = jnp.minimum(new_error, least)
    scale, level = _descend(exact, x, w, jnp.minimum(jnp.rint(winner * x), top), 0, top)
    return jnp.where(zero, 0, scale), jnp.where(zero, 0, level)


def _round_with(exact: Exact, x, step, half: int, searched):
    level = jnp.clip(jnp.rint(exact.over(x, step)), -half, half - 1) + half
    return _rows(jnp.where(step == 0, searched, level))


def _q3_k(exact: Exact, x: jax.Array, importance: jax.Array | None):
    columns = _columns(x, 16)
    if importance is None:
        scale, searched = _symmetric_descent(exact, columns, 4)
        scales = _columns(scale, 16)
        largest, _ = _extreme(scales)
        empty = (scales == 0).all(0)
        inv = exact.over(-32, largest)
        ls = jnp.where(empty, 0, jnp.clip(jnp.rint(inv * scales), -32, 31) + 32)
        d = jnp.where(empty, 0, exact.over(1, inv))
    else:
        w = _weights(exact, x, importance, 2, 16)
        scale, searched = _symmetric(exact, columns, w, 4)
        d, ls = _symmetric(exact, _columns(scale, 16), _columns(_total(w), 16), 32)
    step = (exact.stored(d)[:, None] * (ls.T - 32)).reshape(-1)
    return (d,), (ls.T.astype(jnp.uint8), _round_with(exact, columns, step, 4, searched))


def _q6_k(exact: Exact, x: jax.Array, importance: jax.Array | None):
    columns = _columns(x, 16)
    w = columns * columns if importance is None else _columns(importance, 16)
    scale, searched = _symmetric(exact, columns, w, 32)
    scales = _columns(scale, 16)
    largest, empty = _extreme(scales)
    inv = exact.over(-128, largest)
    ls = jnp.minimum(jnp.rint(inv * scales), 127).T
    d = jnp.where(empty, 0, exact.over(1, inv))
    step = (exact.stored(d)[:, None] * ls).reshape(-1)
    return (d,), (ls.astype(jnp.int8), _round_with(exact, columns, step, 32, searched))
