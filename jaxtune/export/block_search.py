"""The searches for scales (and minima) inside GGML's quantised blocks, many groups at a time.

A group is 16 or 32 consecutive weights that share a scale. Everything is float32, laid out (element, group), so
that a sum over a group adds one element after the other: float32 sums depend on their order, and llama.cpp's
bytes are reached only by its order. For the same reason a product of three is written (a * b) * c, and nothing is
factored out that llama.cpp's formulas keep inside. Source of the mathematics: the k-quants of llama.cpp
(pull request 1684) and its importance-matrix variants (pull requests 4861 and 4930).

Letters: x weights, w their importance in the error, n elements of a group, G groups.
"""

from dataclasses import dataclass

import numpy as np

F = np.float32
SMALLEST = F(1e-15)  # groups whose weights are all smaller count as zero


@dataclass(frozen=True)
class Tries:
    """The inverse scales an affine search tries: (top + first + step * k) / range for k = 0 … count."""

    first: float
    step: float
    count: int

    def numerators(self, top: int) -> np.ndarray:
        steps = F(self.step) * np.arange(self.count + 1, dtype=F)
        return (F(self.first) + steps) + F(top)


def columns(values: np.ndarray, n: int) -> np.ndarray:
    """float32 [...] -> [n, G], contiguous: each group of n consecutive numbers becomes a column."""
    return np.ascontiguousarray(values.reshape(-1, n).T)


def in_order(terms: np.ndarray) -> np.ndarray:
    """Contiguous [n, G] -> [G], summed from the first element to the last in float32."""
    if terms.shape[1] == 1:  # NumPy would sum a single column pairwise
        return np.add.accumulate(terms, axis=0)[-1]
    return np.add.reduce(terms, axis=0)


def inverse(d: np.ndarray) -> np.ndarray:
    """1/d, and 0 where d is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d != 0, F(1) / d, F(0))


def furthest(x: np.ndarray) -> np.ndarray:
    """[n, G] -> [G]: the first of the elements with the largest absolute value, with its sign (a zero is +0)."""
    return np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0] + F(0)


def lowest(x: np.ndarray) -> np.ndarray:
    """[n, G] -> [G]: the first of the lowest elements, which decides the sign of a zero."""
    return np.take_along_axis(x, x.argmin(0)[None], 0)[0]


def affine(
    x: np.ndarray, w: np.ndarray, top: int, tries: Tries, *, absolute: bool = False, want_levels=False
):
    """Scale and minimum with x ≈ scale * level + minimum, level in 0 … top, minimum <= 0.

    Starts from the range of x, then tries other inverse scales, each followed by a weighted least-squares fit;
    the one with the least error stays. The minimum of an accepted try is what the next tries round with.

    Args:
        x, w: [n, G].
        absolute: sum w * |error| instead of w * error².
        want_levels: also return the winning levels [n, G] float32.

    Returns:
        scale [G], minimum [G] and the levels, or None.
    """
    low, high = lowest(x), x.max(0)
    low = start = np.where(low > 0, F(0), low)
    with np.errstate(all="ignore"):
        # Constant groups, and those so small that the inverse overflows: llama.cpp leaves scale and levels at 0.
        flat = ~np.isfinite(F(top) / (high - low))
        high = np.where(flat, low + F(1), high)
        level, term, part = np.empty_like(x), np.empty_like(x), np.empty_like(x)

        def round_with(inv: np.ndarray) -> None:
            np.subtract(x, low, out=level)
            np.multiply(level, inv, out=level)
            np.rint(level, out=level)
            np.clip(level, F(0), F(top), out=level)

        def error(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
            np.multiply(level, scale, out=term)
            np.add(term, minimum, out=term)
            np.subtract(term, x, out=term)
            (np.abs if absolute else np.square)(term, out=term)
            np.multiply(term, w, out=term)
            return in_order(term)

        sum_w, sum_x = in_order(w), in_order(w * x)
        first = F(top) / (high - low)
        round_with(first)
        scale = F(1) / first
        least = error(scale, low)
        best = level.copy() if want_levels else None
        for numerator in tries.numerators(top):
            round_with(numerator / (high - low))
            np.multiply(w, level, out=term)
            sum_l = in_order(term)
            sum_l2 = in_order(np.multiply(term, level, out=part))
            sum_xl = in_order(np.multiply(term, x, out=part))
            determinant = sum_w * sum_l2 - sum_l * sum_l
            new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            above = new_low > 0
            new_scale = np.where(above, sum_xl / sum_l2, new_scale)
            new_low = np.where(above, F(0), new_low)
            new_error = error(new_scale, new_low)
            better = (determinant > 0) & (new_error < least)
            least = np.where(better, new_error, least)
            scale = np.where(better, new_scale, scale)
            low = np.where(better, new_low, low)
            if best is not None:
                np.copyto(best, level, where=better)
    scale[flat] = 0
    low = np.where(flat, start, low)
    if best is not None:
        best[:, flat] = 0
    return scale, low, best


def symmetric(x: np.ndarray, w: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale with x ≈ scale * level, level in -half … half-1, for weights w.

    Tries 19 inverse scales around -half / (largest x), each with its least-squares scale.

    Args:
        x, w: [n, G].

    Returns:
        scale [G] (0 for zero groups) and the winning levels [n, G] float32, counted from 0: level + half, or all
        0 in a zero group.
    """
    extreme = furthest(x)
    zero = np.abs(extreme) < SMALLEST
    extreme = np.where(zero, F(1), extreme)
    level, part, wx = np.empty_like(x), np.empty_like(x), w * x

    def sums(inv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.multiply(x, inv, out=level)
        np.rint(level, out=level)
        np.clip(level, F(-half), F(half - 1), out=level)
        sum_lx = in_order(np.multiply(wx, level, out=part))
        np.multiply(w, level, out=part)
        return sum_lx, in_order(np.multiply(part, level, out=part))

    with np.errstate(all="ignore"):
        winner = F(-half) / extreme
        sum_lx, sum_l2 = sums(winner)
        scale = np.where(sum_l2 != 0, sum_lx / sum_l2, F(0))
        best = scale * sum_lx
        for k in (*range(-9, 0), *range(1, 10)):
            inv = -(F(half) + F(0.1) * F(k)) / extreme
            sum_lx, sum_l2 = sums(inv)
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            scale = np.where(better, sum_lx / sum_l2, scale)
            best = np.where(better, scale * sum_lx, best)
            winner = np.where(better, inv, winner)
        levels = np.clip(np.rint(x * winner), F(-half), F(half - 1)) + F(half)
    levels[:, zero] = 0
    return np.where(zero, F(0), scale), levels


def symmetric_descent(x: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """As `symmetric` with weights x², but improving one level after the other from the first rounding."""
    extreme = furthest(x)
    zero = np.abs(extreme) < SMALLEST
    w = x * x
    level = np.clip(np.rint(x * (F(-half) / np.where(zero, F(1), extreme))), F(-half), F(half - 1))
    scale = _descend(x, w, level, F(-half), F(half - 1))
    level += F(half)
    level[:, zero] = 0
    return np.where(zero, F(0), scale), level


def positive(x: np.ndarray, w: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale with x ≈ scale * level, x >= 0, level in 0 … top: for the scales and minima of a superblock.

    Args:
        x, w: [n, B], B superblocks.

    Returns:
        scale [B] and levels uint8 [n, B].
    """
    highest = np.maximum(x.max(0), F(0))
    zero = highest < SMALLEST
    highest = np.where(zero, F(1), highest)

    def error(inv: np.ndarray) -> np.ndarray:
        difference = x - (F(1) / inv) * np.minimum(np.rint(inv * x), F(top))
        return in_order((w * difference) * difference)

    winner = F(top) / highest
    least = error(winner)
    for k in (*range(-4, 0), *range(1, 5)):
        inv = (F(0.1) * F(k) + F(top)) / highest
        new_error = error(inv)
        better = new_error < least
        least, winner = np.where(better, new_error, least), np.where(better, inv, winner)
    level = np.minimum(np.rint(winner * x), F(top))
    scale = _descend(x, w, level, F(-np.inf), F(top))
    level[:, zero] = 0
    return np.where(zero, F(0), scale), level.astype(np.int32).astype(np.uint8)


def _descend(x, w, level, lowest: np.float32, highest: np.float32) -> np.ndarray:
    """Up to 5 sweeps over the elements of each group; changes `level` in place and returns the scale [G].

    An element moves to the level that fits the scale of all the others, if that lowers the error.
    """
    sum_lx, sum_l2 = in_order((w * x) * level), in_order((w * level) * level)
    with np.errstate(all="ignore"):
        for _ in range(5):
            changed = False
            for x_i, w_i, old in zip(x, w, level):  # rows of `level` are views
                wx_i = w_i * x_i
                rest_lx, rest_l2 = sum_lx - wx_i * old, sum_l2 - (w_i * old) * old
                new = np.clip(np.rint((x_i * rest_l2) / rest_lx), lowest, highest)
                new_lx, new_l2 = rest_lx + wx_i * new, rest_l2 + (w_i * new) * new
                better = (rest_lx > 0) & (new != old) & (new_l2 > 0)
                better &= (new_lx * new_lx) * sum_l2 > (sum_lx * sum_lx) * new_l2
                if better.any():
                    changed = True
                    old[better] = new[better]
                    sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
            if not changed:
                break
        return np.where(sum_l2 > 0, sum_lx / sum_l2, F(0))


# The 16 values of IQ4. Every midpoint of two is a multiple of 1/2, so floor(2a) decides which is nearest to a.
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)
_LOWEST, _HIGHEST = F(-254), F(226)  # twice the first and the last value
_NEAREST = np.searchsorted(NONLINEAR[1:] + NONLINEAR[:-1], np.arange(_LOWEST, _HIGHEST + 1), side="right")
_NEAREST_VALUE = NONLINEAR[_NEAREST]
_NEAREST = _NEAREST.astype(np.uint8)


def _half_steps(a: np.ndarray) -> np.ndarray:
    steps = np.floor(a + a)
    np.clip(steps, _LOWEST, _HIGHEST, out=steps)
    steps -= _LOWEST
    return steps.astype(np.int32)


def nearest(a: np.ndarray) -> np.ndarray:
    """Index uint8 of the value of `NONLINEAR` nearest to a; the higher one of two equally near."""
    return _NEAREST[_half_steps(a)]


def nonlinear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Scale [G] with x ≈ scale * NONLINEAR[index], for x and w [n, G]; 0 for zero groups."""
    extreme = furthest(x)
    zero = np.abs(extreme) < SMALLEST
    extreme = np.where(zero, F(1), extreme)

    def sums(inv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = _NEAREST_VALUE.take(_half_steps(x * inv))
        weighted = w * value
        return in_order(weighted * x), in_order(weighted * value)

    with np.errstate(all="ignore"):
        sum_lx, sum_l2 = sums(F(1) / (-extreme / NONLINEAR[0]))
        scale = np.where(sum_l2 > 0, sum_lx / sum_l2, F(0))
        best = scale * sum_lx
        for k in range(-7, 8):
            sum_lx, sum_l2 = sums((F(k) + NONLINEAR[0]) / extreme)
            better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
            scale = np.where(better, sum_lx / sum_l2, scale)
            best = np.where(better, scale * sum_lx, best)
    return np.where(zero, F(0), scale)
