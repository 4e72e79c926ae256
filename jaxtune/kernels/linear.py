"""The matrix product with a frozen weight: saves the stored form for the backward pass, never a dequantised copy."""

import jax

from jaxtune.quant import NF4, dequantize_nf4


def dense(weight: NF4 | jax.Array, dtype) -> jax.Array:
    """A stored weight as [out, in] in `dtype`."""
    return dequantize_nf4(weight, dtype) if isinstance(weight, NF4) else weight.astype(dtype)


@jax.custom_vjp
def frozen_linear(x: jax.Array, weight: NF4 | jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in] transposed -> [..., out] in x's dtype; the weight gets no gradient."""
    return x @ dense(weight, x.dtype).T


def _forward(x, weight):
    return frozen_linear(x, weight), weight


def _backward(weight, dy):
    # Without the barrier XLA may keep the forward pass's dequantised copy alive until here.
    weight, dy = jax.lax.optimization_barrier((weight, dy))
    return dy @ dense(weight, dy.dtype), None


frozen_linear.defvjp(_forward, _backward)
