"""The products of `kernels.linear` in 8-bit floats: twice the rate of bfloat16 on a GPU that has them (sm_89 on).

    y  = [x | c·xA] [W | Bᵀ]ᵀ        x, A, B, W in e4m3
    dx = [dy | c·d(xA)] [Wᵀ | A]ᵀ    dy in e5m2, the rest in e4m3

Scales are powers of two, so that taking them out again is exact. A row of the left side has its own, because the
input of down_proj reaches thousands on a few tokens and would push the others out of e4m3's range; the right side
has one, because the scales of NF4 blocks lie within e4m3's range. Only x, dy and W are rounded to 8 bits: the
adapter's columns are sums of several 8-bit numbers, about as exact as bfloat16 (see `_parts`), and cost 3 to 5 R
columns beside thousands; a second product would read and write all of y again. x A, d(xA) and the gradients of A
and B are bfloat16 products of unrounded arrays.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.kernels.keep import keep
from jaxtune.kernels.linear import Adapter, apart, joined_a, joined_b, rows, with_tail
from jaxtune.kernels.nf4_matrix import nf4_matrix
from jaxtune.quant import NF4, dequantize_nf4

NEEDS = (8, 9)  # CUDA compute capability
# An amax below this counts as this: scales and their products stay normal float32 numbers.
SMALLEST = 2.0**-60


class _Kind(NamedTuple):
    """An 8-bit float: its dtype, bits of its fraction, and what a scaled amax stays below, a power of two."""

    dtype: type
    fraction: int
    top: float


E4M3 = _Kind(jnp.float8_e4m3fn, 3, 2.0**8)
E5M2 = _Kind(jnp.float8_e5m2, 2, 2.0**15)

# Which part of the left side meets which of the right side: all pairs that matter beside bfloat16's 8 bits.
FORWARD = ((0, 0), (1, 0), (0, 1))  # two e4m3 parts a side, 4 bits each
BACKWARD = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))  # three e5m2 parts of 3 bits, two e4m3 parts


def power_of_two(amax: jax.Array, kind: _Kind) -> jax.Array:
    """The power of two that brings amax (float32, at least 0) into [top / 2, top). NaN and inf give inf, thus NaN."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, SMALLEST), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32) * (2 / kind.top)


def largest(x: jax.Array, axis: int | None = None) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None, initial=0).astype(jnp.float32)


def rounded(x: jax.Array, kind: _Kind, axis: int | None = 1) -> jax.Array:
    """float32 x [N, K] as its 8-bit numbers say it, scaled by rows or (axis None) as a whole."""
    scale = power_of_two(largest(x, axis), kind)
    return (x / scale).astype(kind.dtype).astype(jnp.float32) * scale


def _weight_amax(weight: NF4) -> jax.Array:
    """A bound of |W| that reads the scales alone, float32 []."""
    if weight.absmax_scale is None or weight.absmax_offset is None:
        return jnp.max(weight.absmax)
    return jnp.max(jnp.abs(weight.absmax_scale)) + jnp.abs(weight.absmax_offset)


def _parts(x: jax.Array, kind: _Kind, pick: tuple[int, ...]) -> jax.Array:
    """Scaled x [N, R] as 8-bit numbers that add up to it: [N, len(pick) · R], the parts that `pick` names."""
    rest, parts = x, []
    for _ in range(max(pick) + 1):
        # reduce_precision: XLA may drop a conversion to 8 bits and back, and the rest with it
        part = jax.lax.reduce_precision(rest, 8, kind.fraction)
        parts.append(part.astype(kind.dtype))
        rest = rest - part
    return jnp.concatenate([parts[i] for i in pick], axis=1)


def _left(pieces: list, extra: jax.Array, kind: _Kind, pick: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x_i [N, K_i], extra float32 [N, R] -> ([x_0 | x_1 … | parts of extra | 0] in 8 bits, rows' scales [N, 1])."""
    scale = power_of_two(functools.reduce(jnp.maximum, (largest(x, 1) for x in (*pieces, extra))), kind)
    inverse = 1 / scale
    columns = [(x.astype(jnp.float32) * inverse).astype(kind.dtype) for x in pieces]
    return jnp.concatenate([*columns, with_tail(_parts(extra * inverse, kind, pick))], axis=1), scale


def scale_of(weights: tuple) -> jax.Array:
    """The one scale [] of weights in e4m3."""
    return power_of_two(jnp.max(jnp.stack([_weight_amax(weight) for weight in weights])), E4M3)


def parts8(x: jax.Array, pick: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x [N, R] -> (the parts that `pick` names in e4m3 [N, tail], their one scale [])."""
    scale = power_of_two(largest(x), E4M3)
    return with_tail(_parts(x.astype(jnp.float32) / scale, E4M3, pick)), scale


def dot8(left: jax.Array, right: jax.Array, dtype) -> jax.Array:
    """left [N, K] · right [O, K]ᵀ -> [N, O]: both contracting dimensions last, as cublasLt wants them."""
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def multiply(
    pieces: list, through: jax.Array, beside: jax.Array, weights: tuple, kind: _Kind, transposed: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """raw [N, O] and scale, whose product is x Wᵀ + through besideᵀ, or with x W where `transposed`; and a bound.

    They stay apart so that whoever reads raw multiplies on the way: no pass has to.

    Args:
      pieces: x [N, K] in pieces that lie side by side.
      through, beside: [N, R], [O, R].

    Returns:
      raw; its rows' scales, powers of two, float32 [N, 1]; what the rows' largest |raw · scale| is at most (by Cauchy
      and Schwarz, knowing of the right side only that it stays below E4M3.top), float32 [N, 1].
    """
    terms = BACKWARD if kind is E5M2 else FORWARD
    with jax.named_scope("dequantise"):
        weight_scale = scale_of(weights)
        parts, beside_scale = parts8(beside, tuple(right for _, right in terms))
        matrix = nf4_matrix(weights, parts, scale=weight_scale, transposed=transposed)  # [O, K + tail]
    with jax.named_scope("quantise"):
        extra = through.astype(jnp.float32) * (beside_scale / weight_scale)
        wide, row_scale = _left(pieces, extra, kind, tuple(left for left, _ in terms))
        scale = row_scale * weight_scale
        norm = jnp.linalg.norm(wide.astype(jnp.float32), axis=1, keepdims=True)
    return dot8(wide, matrix, through.dtype), scale, norm * scale * (wide.shape[1] ** 0.5 * E4M3.top)


def scaled(raw: jax.Array, scale: jax.Array) -> jax.Array:
    return (raw * scale).astype(raw.dtype)


def product(x: jax.Array, weights: tuple, adapters: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(raw, scale) of x [N, in] through the layers side by side, and x A [N, R]."""
    with jax.named_scope("lora"):
        xa = keep(x @ joined_a(adapters), "adapter")
    raw, scale, _ = multiply([x], xa, joined_b(weights, adapters).T, weights, E4M3, transposed=False)
    return raw, scale, xa


def reference(x: jax.Array, weights: tuple, adapters: tuple) -> list[jax.Array]:
    """`fp8_linear` in two float32 products a layer, for x [N, in]: the 8-bit numbers multiplied exactly."""
    x, outputs = x.astype(jnp.float32), []
    for weight, adapter in zip(weights, adapters, strict=True):
        y = rounded(x, E4M3) @ rounded(dequantize_nf4(weight), E4M3, axis=None).T
        outputs.append(y if adapter is None else y + (x @ adapter.a) @ adapter.b)
    return outputs


def fp8_linear(
    x: jax.Array, weights: tuple[NF4, ...], adapters: tuple, name: str | None = None
) -> list[jax.Array]:
    """x W_iᵀ + (x A_i) B_i of layers that share x, with x and the weights rounded to e4m3, and backwards dy to e5m2.

    Args:
      x: bfloat16 or float32 [..., in].
      weights: NF4 [out_i, in]; they get no gradient.
      adapters: an Adapter in x's dtype for each weight, or None.
      name: what `models.remat` calls the outputs, None for what is never kept.

    Returns:
      [..., out_i] of each layer in x's dtype. They are apart, so that what computes their gradients can also take
      the largest of each row, and no pass has to lay them side by side in bfloat16.
    """
    if all(adapter is None for adapter in adapters):  # then one of rank 0
        empty = Adapter(jnp.zeros((x.shape[-1], 0), x.dtype), jnp.zeros((0, rows(weights[0])), x.dtype))
        adapters = (empty, *adapters[1:])
    outputs = _adapted(name, x.reshape(-1, x.shape[-1]), weights, adapters)
    return [y.reshape(*x.shape[:-1], -1) for y in outputs]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(name: str | None, x: jax.Array, weights: tuple, adapters: tuple) -> list[jax.Array]:
    return _forward(name, x, weights, adapters)[0]


def _forward(name, x, weights, adapters):
    raw, scale, xa = product(x, weights, adapters)
    if name is not None:
        raw, scale = keep(raw, name), keep(scale, "adapter")
    ends = np.cumsum([rows(weight) for weight in weights])[:-1]
    return [scaled(part, scale) for part in jnp.split(raw, ends, axis=1)], (x, xa, weights, adapters)


def _backward(_, residuals, dys):
    x, xa, weights, adapters = residuals
    with jax.named_scope("lora"):
        dxa = [dy @ adapter.b.T for adapter, dy in zip(adapters, dys, strict=True) if adapter is not None]
        dxa = jnp.concatenate(dxa, axis=1)  # [N, R]
    # dys stay out of it, so that the largest of their rows are found where they are computed
    weights, dxa = apart(weights, dxa)
    raw, scale, _ = multiply(dys, dxa, joined_a(adapters), weights, E5M2, transposed=True)
    with jax.named_scope("lora"):
        da = jnp.dot(x.T, dxa, preferred_element_type=jnp.float32)  # [in, R]
        grads, rank = [], 0
        for adapter, dy in zip(adapters, dys, strict=True):
            if adapter is None:
                grads.append(None)
                continue
            ranks = slice(rank, rank + len(adapter.b))
            db = jnp.dot(xa[:, ranks].T, dy, preferred_element_type=jnp.float32)
            grads.append(Adapter(da[:, ranks].astype(adapter.a.dtype), db.astype(adapter.b.dtype)))
            rank = ranks.stop
    return scaled(raw, scale), None, tuple(grads)


_adapted.defvjp(_forward, _backward)
