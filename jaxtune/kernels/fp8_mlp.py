"""down(silu(gate(x))·up(x)) as in `gated_mlp`, with `fp8`'s products.

The wide arrays, act and d(gate | up), are made in 8 bits at once and never in bfloat16. What they give to an adapter
comes out of the same product as what they give to W, in columns beside it.

On the way back d(gate) and d(up) are written in e5m2 by the kernel that computes them, `swiglu`. Their scales come
from a bound, not from their largest, which would take a pass of its own over the widest arrays of a layer:
|d(gate)|, |d(up)| <= 1.1·max|d(act)|·max|gate or up|. A bound 2^L too high costs nothing while L stays below 18: e5m2
has 32 octaves, and of a row with n columns at most √n·2^(L - 32) is lost below them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxtune.kernels.fp8 import E5M2, dot8, multiply, parts8, power_of_two, product, scale_of, scaled
from jaxtune.kernels.keep import is_kept, keep
from jaxtune.kernels.linear import Adapter, adapter_gradients, apart, joined_a, joined_b, skinny
from jaxtune.kernels.nf4_matrix import nf4_matrix
from jaxtune.kernels.swiglu import swiglu_backward
from jaxtune.kernels.swiglu8 import swiglu8


def fp8_gated_mlp(x: jax.Array, weights: tuple, adapters: tuple[Adapter | None, ...]) -> jax.Array:
    """x [..., D] -> [..., D]; NF4 weights and adapters of gate, up and down, of which down and one more have one."""
    return _mlp(is_kept("gate_up"), x.reshape(-1, x.shape[-1]), weights, adapters).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(keeps, x, weights, adapters):
    """keeps: whether gate and up are kept for the backward pass."""
    return _forward(keeps, x, weights, adapters)[0]


def _forward(keeps, x, weights, adapters):
    raw, scale, xa = product(x, weights[:2], adapters[:2])
    scale = keep(scale, "adapter")
    with jax.named_scope("swiglu"):
        act, act_scale, top, *kept = swiglu8(raw, scale[:, 0], keeps)
    raw = keep(kept[0] if kept else raw, "gate_up")
    top = keep(top[:, None], "adapter")
    down = adapters[2]
    y, act_a = _through(act, act_scale[:, None], weights[2:], False, down.a, down.b)
    return y, (x, xa, raw, scale, top, keep(act_a, "adapter"), weights, adapters)


def _backward(_, residuals, dy):
    x, xa, raw, scale, top, act_a, weights, adapters = residuals
    with jax.named_scope("lora"):
        d_act_a = dy @ adapters[2].b.T
    weights, d_act_a = apart(weights, d_act_a)
    d_act, d_scale, bound = multiply(
        [dy], d_act_a, joined_a(adapters[2:]), weights[2:], E5M2, transposed=True
    )
    out_scale = power_of_two(1.1 * bound * top, E5M2)
    with jax.named_scope("swiglu"):
        scales = ((d_scale / out_scale)[:, 0], scale[:, 0])
        d_gate_up, db, da_down = swiglu_backward(d_act, raw, scaled(xa, out_scale), d_act_a, scales)
    a, b = joined_a(adapters[:2]), joined_b(weights[:2], adapters[:2])
    dx, d_xa = _through(d_gate_up, out_scale, weights[:2], True, b.T, a.T)
    first = adapter_gradients(skinny(x, d_xa), db.T, weights[:2], adapters[:2])
    last = adapter_gradients(da_down, skinny(act_a, dy), weights[2:], adapters[2:])
    return dx, None, first + last


def _through(left, scale, weights, transposed, into, out) -> tuple[jax.Array, jax.Array]:
    """8-bit left [N, K] with its rows' scales, into [K, R], out [R, O] -> (left Wᵀ + left·into·out, left·into).

    Wᵀ is W where `transposed`. Both in bfloat16, or what the adapter has.
    """
    (rank, width), dtype = out.shape, out.dtype
    with jax.named_scope("dequantise"):
        weight_scale = scale_of(weights)
        parts, into_scale = parts8(into, (0, 1))
        matrix = nf4_matrix(
            weights, parts.T, scale=weight_scale, below=True, transposed=transposed
        )  # [O + tail, K]
    raw = dot8(left, matrix, dtype)
    with jax.named_scope("lora"):
        high, low = raw[:, width : width + rank], raw[:, width + rank : width + 2 * rank]
        inner = ((high.astype(jnp.float32) + low) * (scale * into_scale)).astype(dtype)
        # without the barrier XLA copies the slice to add to it inside the skinny product
        update = jax.lax.optimization_barrier(inner @ out)
    return (raw[:, :width] * (scale * weight_scale) + update).astype(dtype), inner


_mlp.defvjp(_forward, _backward)
