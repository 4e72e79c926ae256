"""Products with frozen weights and their LoRA adapters: they save the stored form, never a dequantised copy.

y_i = x W_iᵀ + (x A_i) B_i for several layers of one input, such as q, k and v. `reference` says it in two products a
layer. On a GPU that second, skinny one costs a quarter of the first, because y is read and written again; there one
product over K = in + ranks does it all: [x | x A] [W | Bᵀ]ᵀ, and backwards [dx | d(xA)] = dy [W | Bᵀ].

A batch of generation is too few rows to dequantise for; `nf4_matmul` reads the codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels import nf4_matmul, target
from jaxtune.kernels.keep import keep
from jaxtune.kernels.nf4_matrix import dense, nf4_matrix
from jaxtune.quant import NF4

# Of x: below, as in generation, writing the joined matrix costs more than a second pass over y.
FEW_ROWS = 256
TAIL = 64  # columns that hold the ranks are a multiple of this: whole tiles for the matrix units


class Adapter(NamedTuple):
    """LoRA of one layer: a [in, R], b [R, out] with the scaling in it."""

    a: jax.Array
    b: jax.Array


@jax.custom_vjp
def frozen_linear(x: jax.Array, weight: NF4 | jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in] transposed -> [..., out] in x's dtype; the weight gets no gradient."""
    return x @ dense(weight, x.dtype).T


def _frozen_forward(x, weight):
    return frozen_linear(x, weight), weight


def apart(weights: tuple, dy):
    """The weights and the gradient dy (a pytree), such that XLA does not take what the backward pass makes of them for
    what the forward pass has made, and keep that until here.

    A barrier before something small does it; before the codes, a GPU would copy them out of their stack.
    """
    marks = [_mark(weight) for weight in weights]
    marks, dy = jax.lax.optimization_barrier((marks, dy))
    return tuple(_marked(weight, mark) for weight, mark in zip(weights, marks, strict=True)), dy


def _mark(weight: NF4 | jax.Array) -> jax.Array:
    if not isinstance(weight, NF4):
        return weight
    return weight.absmax if weight.absmax_offset is None else weight.absmax_offset


def _marked(weight: NF4 | jax.Array, mark: jax.Array) -> NF4 | jax.Array:
    if not isinstance(weight, NF4):
        return mark
    return weight._replace(**{"absmax" if weight.absmax_offset is None else "absmax_offset": mark})


def _frozen_backward(weight, dy):
    (weight,), dy = apart((weight,), dy)
    return dy @ dense(weight, dy.dtype), None


frozen_linear.defvjp(_frozen_forward, _frozen_backward)


def reference(x: jax.Array, weights: tuple, adapters: tuple) -> jax.Array:
    """`adapted_linear` in two products a layer."""
    products = (frozen_linear(x, weight) for weight in weights)
    parts = [y if ad is None else y + (x @ ad.a) @ ad.b for y, ad in zip(products, adapters, strict=True)]
    return jnp.concatenate(parts, axis=-1)


def adapted_linear(
    x: jax.Array, weights: tuple, adapters: tuple, folded: nf4_matmul.Lora | None = None
) -> jax.Array:
    """x W_iᵀ + (x A_i) B_i of layers that share x, side by side.

    Args:
      x: [..., in].
      weights: frozen, NF4 or arrays [out_i, in]; they get no gradient.
      adapters: an Adapter in x's dtype for each weight, or None.
      folded: `nf4_matmul.fold` of both, which a caller of many products makes once.

    Returns:
      [..., sum of out_i] in x's dtype.
    """
    if _reads_codes(x, weights, adapters):
        folded = nf4_matmul.fold(weights, adapters) if folded is None else folded
        return _from_codes(x.reshape(-1, x.shape[-1]), weights, adapters, folded).reshape(*x.shape[:-1], -1)
    if is_few(x) or target.capability() is None or all(adapter is None for adapter in adapters):
        return reference(x, weights, adapters)
    return _joined(x.reshape(-1, x.shape[-1]), weights, adapters).reshape(*x.shape[:-1], -1)


def is_few(x: jax.Array) -> bool:
    """Whether x [..., in] has so few rows that reading the weights is what its products cost."""
    return x.size // x.shape[-1] < FEW_ROWS


def rows(weight: NF4 | jax.Array) -> int:
    """out of a stored weight [out, in]."""
    return (weight.codes if isinstance(weight, NF4) else weight).shape[0]


def _reads_codes(x: jax.Array, weights: tuple, adapters: tuple) -> bool:
    if not all(isinstance(weight, NF4) for weight in weights):
        return False
    width = x.shape[-1]
    rank = max(0 if adapter is None else adapter.a.shape[1] for adapter in adapters)
    shapes = [(rows(weight), width) for weight in weights]
    return nf4_matmul.supported(x.size // width, x.dtype, shapes, rank)


@jax.custom_vjp
def _from_codes(x: jax.Array, weights: tuple, adapters: tuple, folded: nf4_matmul.Lora | None) -> jax.Array:
    """[N, in] -> [N, sum(out)]; the gradient is that of the adapters, not of `folded`."""
    return nf4_matmul.nf4_matmul(x, weights, folded).astype(x.dtype)


def _from_codes_forward(x, weights, adapters, folded):
    return _from_codes(x, weights, adapters, folded), (x, weights, adapters)


def _from_codes_backward(residuals, dy):
    x, weights, adapters = residuals  # training on so few rows is no case to be fast in
    dx, grads = jax.vjp(lambda x, adapters: reference(x, weights, adapters), x, adapters)[1](dy)
    return dx, None, grads, None


_from_codes.defvjp(_from_codes_forward, _from_codes_backward)


def joined_a(adapters: tuple) -> jax.Array:
    """The A of all layers side by side, [in, R]."""
    return jnp.concatenate([adapter.a for adapter in adapters if adapter is not None], axis=1)


def joined_b(weights: tuple, adapters: tuple) -> jax.Array:
    """Their B on the diagonal of blocks, [R, sum(out)]."""
    blocks, before, after = [], 0, sum(map(rows, weights))
    for weight, adapter in zip(weights, adapters, strict=True):
        after -= rows(weight)
        if adapter is not None:
            blocks.append(jnp.pad(adapter.b, ((0, 0), (before, after))))
        before += rows(weight)
    return jnp.concatenate(blocks)


def tail_columns(rank: int) -> int:
    return -(-rank // TAIL) * TAIL


def with_tail(columns: jax.Array) -> jax.Array:
    """[N, R] -> [N, tail], zeros behind."""
    rank = columns.shape[1]
    return jnp.pad(columns, ((0, 0), (0, tail_columns(rank) - rank)))


def beside(weights: tuple, adapters: tuple) -> jax.Array:
    """[W | Bᵀ | 0], [sum(out), in + tail]: what `joined_product` takes."""
    with jax.named_scope("dequantise"):
        return nf4_matrix(weights, with_tail(joined_b(weights, adapters).T))


def _below(weights: tuple, adapters: tuple) -> jax.Array:
    """[W; Aᵀ; 0], [sum(out) + tail, in]."""
    with jax.named_scope("dequantise"):
        return nf4_matrix(weights, with_tail(joined_a(adapters)).T, below=True)


def _widen(x: jax.Array, through: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [N, K] and through [K, R] -> ([x | x·through | 0], x·through).

    x is made in the wider buffer and the product is put beside it, so that nothing is copied where x is computed by
    a fusion.
    """
    rank, tail = through.shape[1], tail_columns(through.shape[1])
    wide = jnp.pad(x, ((0, 0), (0, tail)))
    with jax.named_scope("lora"):
        product = keep(wide @ jnp.pad(through, ((0, tail), (0, 0))), "adapter")
    return jax.lax.dynamic_update_slice(wide, product, (0, x.shape[1])), product[:, :rank]


def joined_product(x: jax.Array, adapters: tuple, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [N, in] -> (y [N, sum(out)], x A [N, R]) in one product over K = in + R; matrix: `beside` of the layers."""
    wide, xa = _widen(x, joined_a(adapters))
    return _times_transposed(wide, matrix), xa


def repeated_product(x: jax.Array, xa: jax.Array, matrix: jax.Array) -> jax.Array:
    """y of `joined_product` once more, from the x A it returned."""
    return _times_transposed(jnp.concatenate([x, with_tail(xa)], axis=1), matrix)


def _times_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x · matrixᵀ in one operation: XLA would move a transposition of its own out of a loop and keep what it made."""
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())))


def gradient_matrix(weights: tuple, adapters: tuple) -> jax.Array:
    """What `input_gradient` takes: `beside` where dy is the widest array, else [W; Aᵀ; 0]."""
    return (beside if reads_once(weights, adapters) else _below)(weights, adapters)


def reads_once(weights: tuple, adapters: tuple) -> bool:
    """Whether dy [N, sum(out)] is so much wider than x that two passes over dx cost less than two over dy."""
    return sum(map(rows, weights)) >= 3 * len(joined_a(adapters))


def input_gradient(
    dy: jax.Array, weights: tuple, adapters: tuple, matrix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dy [N, sum(out)] -> (dx [N, in], d(x A) [N, R]) of `joined_product`; matrix: `gradient_matrix`."""
    a = joined_a(adapters)
    width = a.shape[0]
    if not reads_once(weights, adapters):
        wide, dxa = _widen(dy, joined_b(weights, adapters).T)
        return wide @ matrix, dxa
    both = dy @ matrix
    dxa = both[:, width : width + a.shape[1]]
    with jax.named_scope("lora"):
        # without the barrier XLA copies the slice to add to it inside the skinny product
        return both[:, :width] + jax.lax.optimization_barrier(dxa @ a.T), dxa


def adapter_gradients(da: jax.Array, db: jax.Array, weights: tuple, adapters: tuple) -> tuple:
    """xᵀ·d(x A) [in, R] and (x A)ᵀ·dy [R, sum(out)] -> the gradient of each adapter, None where there is none."""
    grads, rank, row = [], 0, 0
    for weight, adapter in zip(weights, adapters, strict=True):
        grad = None
        if adapter is not None:
            ranks, columns = slice(rank, rank + len(adapter.b)), slice(row, row + rows(weight))
            grad = Adapter(da[:, ranks].astype(adapter.a.dtype), db[ranks, columns].astype(adapter.b.dtype))
            rank = ranks.stop
        row += rows(weight)
        grads.append(grad)
    return tuple(grads)


def skinny(left: jax.Array, right: jax.Array) -> jax.Array:
    """leftᵀ·right over all tokens, float32: the gradient of an A or a B."""
    with jax.named_scope("lora"):
        return jnp.dot(left.T, right, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _joined(x: jax.Array, weights: tuple, adapters: tuple) -> jax.Array:
    """[N, in] -> [N, sum(out)]."""
    return joined_product(x, adapters, beside(weights, adapters))[0]


def _joined_forward(x, weights, adapters):
    y, xa = joined_product(x, adapters, beside(weights, adapters))
    return y, (x, xa, weights, adapters)


def _joined_backward(residuals, dy):
    x, xa, weights, adapters = residuals
    weights, dy = apart(weights, dy)
    dx, dxa = input_gradient(dy, weights, adapters, gradient_matrix(weights, adapters))
    return dx, None, adapter_gradients(skinny(x, dxa), skinny(xa, dy), weights, adapters)


_joined.defvjp(_joined_forward, _joined_backward)
