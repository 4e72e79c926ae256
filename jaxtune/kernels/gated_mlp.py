"""down(silu(gate(x))·up(x)) of frozen weights with adapters, with one backward pass for all three layers.

Each product is `linear`'s; what joining them buys is in `swiglu`: the widest arrays are read once on the way back.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxtune.kernels import swiglu
from jaxtune.kernels.keep import is_made_again, keep
from jaxtune.kernels.linear import (
    Adapter,
    adapter_gradients,
    apart,
    beside,
    gradient_matrix,
    input_gradient,
    is_few,
    joined_a,
    joined_product,
    reads_once,
    repeated_product,
    rows,
    skinny,
)

TILE = 8192  # tokens at a time where gate and up are made again; 4096 made the step of an 8B model 2 % longer


def joinable(adapters: tuple[Adapter | None, ...]) -> bool:
    """Whether the kernel has adapters of gate and up, and of down, to take the gradients of."""
    gate, up, down = adapters
    return down is not None and not (gate is None and up is None)


def supported(x: jax.Array, weights: tuple, adapters: tuple[Adapter | None, ...]) -> bool:
    """Whether the kernel behind the backward pass takes x [..., D] and the gate, up and down layers."""
    gate, up, down = adapters
    if down is None or not joinable(adapters):
        return False
    tokens = x.size // x.shape[-1]
    ranks = sum(len(adapter.b) for adapter in (gate, up) if adapter is not None), len(down.b)
    return not is_few(x) and swiglu.supported(tokens, rows(weights[0]), ranks, x.dtype)


def gated_mlp(x: jax.Array, weights: tuple, adapters: tuple[Adapter | None, ...]) -> jax.Array:
    """x [..., D] -> [..., D]; weights and adapters of gate, up and down as in `linear.adapted_linear`."""
    flat = x.reshape(-1, x.shape[-1])
    again = is_made_again("gate_up")
    tiles = tiles_of(len(flat)) if again else 1
    y = _mlp(again, flat, weights, adapters) if tiles == 1 else _tiled(tiles, flat, weights, adapters)
    return y.reshape(*x.shape[:-1], -1)


def tiles_of(tokens: int) -> int:
    """Into how many equal tiles of at most TILE tokens, whole for the kernel, a pass over tokens is split."""
    least = -(-tokens // TILE)
    return next((n for n in range(least, 2 * least) if tokens % (n * swiglu.TILE) == 0), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(again, x, weights, adapters):
    """again: whether gate and up are made again for the backward pass, not kept."""
    return _forward(again, x, weights, adapters)[0]


def _forward(_, x, weights, adapters):
    matrices = beside(weights[:2], adapters[:2]), beside(weights[2:], adapters[2:])
    y, gate_up, *small = _products(x, adapters, matrices)
    return y, (x, gate_up, *small, weights, adapters)


def _products(x, adapters, matrices):
    """(y, gate | up, x A, act A)"""
    gate_up, xa = joined_product(x, adapters[:2], matrices[0])
    gate_up = keep(gate_up, "gate_up")
    y, act_a = joined_product(_act(gate_up), adapters[2:], matrices[1])
    return y, gate_up, xa, act_a


def _act(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=1)
    return jax.nn.silu(gate) * up


def _backward(again, residuals, dy):
    x, gate_up, xa, act_a, weights, adapters = residuals
    if again:  # then no matrix is made before they are there
        weights, (dy, gate_up) = apart(weights, (dy, gate_up))
    else:
        weights, dy = apart(weights, dy)
    matrix = gradient_matrix(weights[:2], adapters[:2])
    dx, *products = _gradients(again, gate_up, x, xa, act_a, dy, weights, adapters, matrix)
    return dx, None, _of_adapters(products, weights, adapters)


def _gradients(in_place, gate_up, x, xa, act_a, dy, weights, adapters, matrix):
    """(dx, float32 gradients of A and B of gate and up, and of those of down); matrix: of gate and up.

    in_place: whether their gradient may be written over gate_up.
    """
    down = gradient_matrix(weights[2:], adapters[2:])
    d_act, d_act_a = input_gradient(dy, weights[2:], adapters[2:], down)
    with jax.named_scope("swiglu"):
        d_gate_up, db, da_down = swiglu.swiglu_backward(d_act, gate_up, xa, d_act_a, in_place=in_place)
    dx, d_xa = input_gradient(d_gate_up, weights[:2], adapters[:2], matrix)
    return dx, skinny(x, d_xa), db.T, da_down, skinny(act_a, dy)


def _of_adapters(products, weights, adapters):
    da, db, da_down, db_down = products
    first = adapter_gradients(da, db, weights[:2], adapters[:2])
    return first + adapter_gradients(da_down, db_down, weights[2:], adapters[2:])


_mlp.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tiles, x, weights, adapters):
    """`_mlp` a tile of tokens at a time. Backwards a tile's gate and up are made again, and the frozen matrices, made
    once, serve that product and the gradient's: what the pass holds does not grow with the number of tokens."""
    return _tiled_forward(tiles, x, weights, adapters)[0]


def _tiled_forward(tiles, x, weights, adapters):
    matrices = beside(weights[:2], adapters[:2]), beside(weights[2:], adapters[2:])
    size, ranks = len(x) // tiles, [joined_a(part).shape[1] for part in (adapters[:2], adapters[2:])]

    def tile(i, arrays):  # y takes the place of x
        y, _, *small = _products(_at(arrays[0], i, size), adapters, matrices)
        return [_put(array, part, i) for array, part in zip(arrays, (y, *small), strict=True)]

    arrays = [x, *(jnp.zeros((len(x), rank), x.dtype) for rank in ranks)]
    y, *small = jax.lax.fori_loop(0, tiles, tile, arrays)
    return y, (x, *keep(small, "adapter"), weights, adapters)


def _tiled_backward(tiles, residuals, dy):
    x, xa, act_a, weights, adapters = residuals
    size, (outer, dy) = len(x) // tiles, apart(weights[:2], dy)
    forward = beside(outer, adapters[:2])
    back = forward if reads_once(outer, adapters[:2]) else gradient_matrix(outer, adapters[:2])

    def part(i, dy):
        x_i, xa_i, act_a_i, dy_i = (_at(array, i, size) for array in (x, xa, act_a, dy))
        gate_up = repeated_product(x_i, xa_i, forward)
        # the matrix of down is made for each tile, when gate and up are there, and gone before their gradients are
        inner, (gate_up, dy_i) = apart(weights[2:], (gate_up, dy_i))
        return _gradients(True, gate_up, x_i, xa_i, act_a_i, dy_i, (*outer, *inner), adapters, back)

    def tile(i, carry):  # dx takes the place of dy
        dy, sums = carry
        dx, *products = part(i, dy)
        return _put(dy, dx, i), jax.tree.map(jnp.add, sums, products)

    sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, 0, dy)[1:])
    dx, sums = jax.lax.fori_loop(0, tiles, tile, (dy, list(sums)))
    return dx, None, _of_adapters(sums, weights, adapters)


def _at(array, i, size):
    """Tile i of an array [N, …], of `size` tokens."""
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def _put(array, part, i):
    return jax.lax.dynamic_update_slice_in_dim(array, part, i * len(part), 0)


_tiled.defvjp(_tiled_forward, _tiled_backward)
