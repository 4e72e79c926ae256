"""down(silu(gate(x))·up(x)) as in `gated_mlp`, with `fp8`'s products: their results keep their rows' scales beside them.

On the way back d(gate) and d(up) are written in e5m2 at once, by `swiglu`. Their rows' scales come from a bound of
what they can be, not from their largest, which would take a pass of its own over the widest arrays of a layer:
|d(gate)|, |d(up)| <= 1.1·|d(act)|·|gate or up|, and |d(act)| is at most the sum of so many products of 8-bit numbers. A
bound 2^L too high costs nothing while L is below 18: e5m2 has 32 octaves, and with n columns what is lost below them
is at most √n·2^(L - 32) of a row.
"""

import jax
import jax.numpy as jnp

from jaxtune.kernels.fp8 import E4M3, E5M2, dot8, largest, multiply, parts8, power_of_two, product, scaled, weights8
from jaxtune.kernels.keep import keep
from jaxtune.kernels.linear import Adapter, adapter_gradients, joined_a, joined_b, skinny, tail_columns
from jaxtune.kernels.swiglu import swiglu_backward


def fp8_gated_mlp(x: jax.Array, weights: tuple, adapters: tuple[Adapter | None, ...]) -> jax.Array:
    """x [..., D] -> [..., D]; NF4 weights and adapters of gate, up and down, of which down and one more have one."""
    return _mlp(x.reshape(-1, x.shape[-1]), weights, adapters).reshape(x.shape)


@jax.custom_vjp
def _mlp(x, weights, adapters):
    return _forward(x, weights, adapters)[0]


def _forward(x, weights, adapters):
    raw, scale, xa = product(x, weights[:2], adapters[:2])
    raw = keep(raw, "gate_up")
    scale, top = keep((scale, largest(raw, 1) * scale), "adapter")
    with jax.named_scope("swiglu"):
        gate, up = (half * scale for half in jnp.split(raw, 2, axis=1))
        act = (jax.nn.silu(gate) * up).astype(x.dtype)
    y, y_scale, act_a = product(act, weights[2:], adapters[2:])
    return scaled(y, y_scale), (x, xa, raw, scale, top, act_a, weights, adapters)


def _backward(residuals, dy):
    x, xa, raw, scale, top, act_a, weights, adapters = residuals
    with jax.named_scope("lora"):
        d_act_a = dy @ adapters[2].b.T
    weights, d_act_a = jax.lax.optimization_barrier((weights, d_act_a))  # as in fp8
    d_act, d_scale = multiply([dy], d_act_a, joined_a(adapters[2:]), weights[2:], E5M2, transposed=True)
    terms = dy.shape[1] + 5 * tail_columns(d_act_a.shape[1])
    bound = 1.1 * top * d_scale * (terms * E5M2.top * E4M3.top)
    out_scale = power_of_two(bound, E5M2)
    with jax.named_scope("swiglu"):
        scales = ((d_scale / out_scale)[:, 0], scale[:, 0])
        d_gate_up, db, da_down = swiglu_backward(d_act, raw, scaled(xa, out_scale), d_act_a, scales)
    dx, d_xa = _input_gradient(d_gate_up, out_scale, weights[:2], adapters[:2], x.dtype)
    first = adapter_gradients(skinny(x, d_xa), db.T, weights[:2], adapters[:2])
    last = adapter_gradients(da_down, skinny(act_a, dy), weights[2:], adapters[2:])
    return dx, None, first + last


def _input_gradient(dy, scale, weights, adapters, dtype) -> tuple[jax.Array, jax.Array]:
    """e5m2 dy [N, sum(out)] with its rows' scales -> (dx [N, in], d(x A) [N, R]), both from one product."""
    a = joined_a(adapters)
    width, rank = a.shape
    with jax.named_scope("dequantise"):
        matrix, weight_scale = weights8(weights, transposed=True)
        parts, b_scale = parts8(joined_b(weights, adapters).T, (0, 1))
        matrix = jnp.concatenate([matrix, parts.T])  # [in + tail, sum(out)]
    raw = dot8(dy, matrix, dtype)
    with jax.named_scope("lora"):
        high, low = raw[:, width : width + rank], raw[:, width + rank : width + 2 * rank]
        dxa = ((high.astype(jnp.float32) + low) * (scale * b_scale)).astype(dtype)
        # without the barrier XLA copies the slice to add to it inside the skinny product
        update = jax.lax.optimization_barrier(dxa @ a.T)
    return scaled(raw[:, :width], scale * weight_scale) + update, dxa


_mlp.defvjp(_forward, _backward)
