"""down(silu(gate(x))·up(x)) of frozen weights with adapters, with one backward pass for all three layers.

Each product is `linear`'s; what joining them buys is in `swiglu`: the widest arrays are read once on the way back.
"""

import jax
import jax.numpy as jnp

from jaxtune.kernels import swiglu
from jaxtune.kernels.keep import keep
from jaxtune.kernels.linear import (
    Adapter,
    adapter_gradients,
    apart,
    input_gradient,
    is_few,
    joined_product,
    rows,
    skinny,
)


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
    return _mlp(x.reshape(-1, x.shape[-1]), weights, adapters).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _mlp(x, weights, adapters):
    return _forward(x, weights, adapters)[0]


def _forward(x, weights, adapters):
    gate_up, xa = joined_product(x, weights[:2], adapters[:2])
    gate_up = keep(gate_up, "gate_up")
    gate, up = jnp.split(gate_up, 2, axis=1)
    y, act_a = joined_product(jax.nn.silu(gate) * up, weights[2:], adapters[2:])
    return y, (x, xa, gate_up, act_a, weights, adapters)


def _backward(residuals, dy):
    x, xa, gate_up, act_a, weights, adapters = residuals
    weights, dy = apart(weights, dy)
    d_act, d_act_a = input_gradient(dy, weights[2:], adapters[2:])
    with jax.named_scope("swiglu"):
        d_gate_up, db, da_down = swiglu.swiglu_backward(d_act, gate_up, xa, d_act_a)
    dx, d_xa = input_gradient(d_gate_up, weights[:2], adapters[:2])
    first = adapter_gradients(skinny(x, d_xa), db.T, weights[:2], adapters[:2])
    last = adapter_gradients(da_down, skinny(act_a, dy), weights[2:], adapters[2:])
    return dx, None, first + last


_mlp.defvjp(_forward, _backward)
