"""LM head and cross entropy in one pass over chunks of tokens: [tokens, vocabulary] logits never exist.

The gradient is taken while a chunk's logits are at hand, in the forward pass (two matrix products in all, none
recomputed). Rows with label -100 are sorted to the end and never visited, so they cost nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

IGNORE = -100


class Options(NamedTuple):
    """Static choices of the loss.

    chunk: tokens a chunk. softcap: logits become softcap·tanh(logits/softcap). logit_scale: logits are multiplied by
    it first. train_head: also return the head's gradient.
    """

    chunk: int = 1024
    softcap: float | None = None
    logit_scale: float = 1.0
    train_head: bool = False


def _chunk_logits(hidden, head, options):
    logits = jnp.dot(hidden, head.T, preferred_element_type=jnp.float32) * options.logit_scale
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)


def _logit_gradient(logits, lse, labels, weights, options):
    """d(loss)/d(raw logits) of one chunk, float32 [c, V]."""
    hot = jnp.arange(logits.shape[-1]) == labels[:, None]
    grad = (jnp.exp(logits - lse[:, None]) - hot) * (weights * options.logit_scale)[:, None]
    return grad if options.softcap is None else grad * (1 - (logits / options.softcap) ** 2)


def _run(hidden, head, labels, options, differentiate):
    """(loss sum, correct) and, when differentiating, (d hidden, d head or None)."""
    tokens = hidden.shape[0]
    chunk = min(options.chunk, tokens)
    order = jnp.argsort(labels == IGNORE, stable=True)
    order = jnp.pad(
        order, (0, -tokens % chunk), constant_values=tokens
    )  # out of range: gathers 0, scatters nothing
    count = jnp.sum(labels != IGNORE)
    train_head = differentiate and options.train_head

    def body(i, carry):
        loss, correct, d_hidden, d_head = carry
        rows = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
        x = hidden.at[rows].get(mode="fill", fill_value=0)
        y = labels.at[rows].get(mode="fill", fill_value=IGNORE)
        weights = (y != IGNORE).astype(jnp.float32)
        y = jnp.maximum(y, 0)
        logits = _chunk_logits(x, head, options)
        lse = jax.nn.logsumexp(logits, axis=-1)
        loss += jnp.sum(weights * (lse - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]))
        correct += jnp.sum(weights * (jnp.argmax(logits, -1) == y))
        if differentiate:
            grad = _logit_gradient(logits, lse, y, weights, options).astype(x.dtype)
            d_hidden = d_hidden.at[rows].set(grad @ head, mode="drop")
            if train_head:
                d_head += jnp.dot(grad.T, x, preferred_element_type=jnp.float32)
        return loss, correct, d_hidden, d_head

    start = (
        jnp.float32(0),
        jnp.float32(0),
        jnp.zeros_like(hidden) if differentiate else None,
        jnp.zeros(head.shape, jnp.float32) if train_head else None,
    )
    return jax.lax.fori_loop(0, -(-count // chunk), body, start)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label) over the rows whose label is not -100, and how many of them the model ranks first.

    Args:
      hidden: [N, D]. head: [V, D], same dtype. labels: int32 [N], already shifted, -100 to leave a row out.
      options: static.

    Returns:
      (loss sum, correct), float32 scalars; logits and sums are float32. Only the loss is differentiable.
    """
    return _run(hidden, head, labels, options, differentiate=False)[:2]


def _forward(hidden, head, labels, options):
    loss, correct, d_hidden, d_head = _run(hidden, head, labels, options, differentiate=True)
    return (loss, correct), (d_hidden, d_head, head[:0])


def _backward(options, residuals, cotangents):
    d_hidden, d_head, like = residuals
    scale = cotangents[0]
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (d_head * scale).astype(like.dtype), None


fused_cross_entropy.defvjp(_forward, _backward)
