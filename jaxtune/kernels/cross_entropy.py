"""LM head and cross entropy in one pass over chunks of tokens: [tokens, vocabulary] logits never exist.

`fused_cross_entropy` takes the gradient while a chunk's logits are at hand, in the forward pass (two matrix products in
all, none recomputed). `token_log_probs` and `token_scores` are for losses whose gradient with respect to a token's
log-probability is not known then (GRPO, DPO): they keep one number a token and make the logits again (three products).
Rows with label -100 are sorted to the end and never visited, so they cost nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels import target

IGNORE = -100


class Options(NamedTuple):
    """Static choices of the loss.

    chunk: tokens a chunk. logit_scale: logits are multiplied by it. softcap: then they become
    softcap·tanh(logits/softcap). temperature: then they are divided by it (reinforcement learning). train_head: also
    return the head's gradient.
    """

    chunk: int = 1024
    softcap: float | None = None
    logit_scale: float = 1.0
    train_head: bool = False
    temperature: float = 1.0


def softcapped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap·tanh(logits/softcap), or the logits themselves."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class _Statistics(NamedTuple):
    """Of each row of logits, float32 [c]."""

    lse: jax.Array
    chosen: jax.Array  # the label's logit
    top: jax.Array  # the largest
    entropy: jax.Array | None = None


def _chunk_logits(hidden, head, options):
    """The logits that p is the softmax of, float32 [c, V]."""
    logits = jnp.dot(hidden, head.T, preferred_element_type=jnp.float32) * options.logit_scale
    return softcapped(logits, options.softcap) * (1 / options.temperature)


def _two_passes(logits, entropy: bool):
    """Of each row the maximum, Σ exp(x - maximum) and, for the entropy, Σ exp(x - maximum)·(x - maximum)."""
    top = jnp.max(logits, axis=1)
    below = logits - top[:, None]
    total = jnp.sum(jnp.exp(below), axis=1)
    return (top, total, jnp.sum(jnp.exp(below) * below, axis=1)) if entropy else (top, total)


def _one_pass(logits, entropy: bool):
    """`_two_passes` in one reduction: a GPU reads the logits once; a CPU is faster with two simple passes."""

    def combine(a, b):
        first = a[0] >= b[0]
        high, low = (jax.tree.map(lambda x, y, f=f: jnp.where(f, x, y), a, b) for f in (first, ~first))
        step = low[0] - high[0]
        weight = jnp.exp(step)
        sums = (high[0], high[1] + weight * low[1])
        return (*sums, high[2] + weight * (low[2] + step * low[1])) if entropy else sums

    nothing = jnp.finfo(jnp.float32).min / 2  # finite: a difference of two infinities is no number
    parts = (logits, jnp.ones_like(logits), jnp.zeros_like(logits))[: 3 if entropy else 2]
    start = tuple(map(jnp.float32, (nothing, 0, 0)))[: len(parts)]
    return jax.lax.reduce(parts, start, combine, (1,))


def _statistics(logits, labels, *, entropy: bool = False) -> _Statistics:
    """Of scaled logits [c, V]."""
    reduce = _two_passes if target.capability() is None else _one_pass
    top, total, *moment = reduce(logits, entropy)
    chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    spread = jnp.log(total) - moment[0] / total if entropy else None
    return _Statistics(top + jnp.log(total), chosen, top, spread)


def _logit_gradient(logits, lse, labels, weights, options, entropy=None, entropy_weights=None):
    """Gradient of Σ weights·(-log p) + Σ entropy_weights·entropy by the product's logits, float32 [c, V]."""
    hot = jnp.arange(logits.shape[-1]) == labels[:, None]
    log_p = logits - lse[:, None]
    p = jnp.exp(log_p)
    grad = (p - hot) * weights[:, None]
    if entropy is not None:
        grad -= p * (log_p + entropy[:, None]) * entropy_weights[:, None]
    grad *= options.logit_scale / options.temperature
    return (
        grad
        if options.softcap is None
        else grad * (1 - (logits * options.temperature / options.softcap) ** 2)
    )


def _fold(labels, options, visit: Callable, start):
    """Folds visit(take, put, labels, weights, carry) over chunks of the rows that have a label.

    take(x) gathers the chunk's rows of x, 0 past the last one; put(x, values) writes them. labels there are 0, weights
    0 instead of 1.
    """
    tokens = labels.shape[0]
    chunk = min(options.chunk, tokens)
    kept = labels != IGNORE
    order = jnp.argsort(~kept, stable=True)
    count = jnp.sum(kept)
    # Out of range from there on: such a row gathers 0, whatever it holds, and scatters nothing.
    order = jnp.where(jnp.arange(tokens) < count, order, tokens)
    order = jnp.pad(order, (0, -tokens % chunk), constant_values=tokens)

    def body(i, carry):
        rows = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
        take = lambda x: x.at[rows].get(mode="fill", fill_value=0)  # noqa: E731
        put = lambda x, values: x.at[rows].set(values, mode="drop")  # noqa: E731
        return visit(take, put, take(labels), (rows < tokens).astype(jnp.float32), carry)

    return jax.lax.fori_loop(0, -(-count // chunk), body, start)


def _empty_gradients(hidden, head, options):
    return jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32) if options.train_head else None


def _through_product(grad, x, head, put, sums):
    """Adds what a chunk's logit gradient gives to the sums (d hidden, d head or None)."""
    d_hidden, d_head = sums
    if d_head is not None:
        d_head += jnp.dot(grad.T, x, preferred_element_type=jnp.float32)
    return put(d_hidden, grad @ head), d_head


def _run(hidden, head, labels, options, differentiate):
    """((loss sum, correct), (d hidden, d head or None)); the latter None where not differentiating."""

    def visit(take, put, y, weights, carry):
        (loss, correct), sums = carry
        x = take(hidden)
        logits = _chunk_logits(x, head, options)
        found = _statistics(logits, y)
        if differentiate:
            grad = _logit_gradient(logits, found.lse, y, weights, options).astype(x.dtype)
            sums = _through_product(grad, x, head, put, sums)
        loss += jnp.sum(weights * (found.lse - found.chosen))
        correct += jnp.sum(weights * (found.chosen >= found.top))
        return (loss, correct), sums

    sums = _empty_gradients(hidden, head, options) if differentiate else None
    return _fold(labels, options, visit, ((jnp.float32(0), jnp.float32(0)), sums))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label) over the rows whose label is not -100, and how many of them the model ranks first.

    Args:
      hidden: [N, D]. head: [V, D], same dtype. labels: int32 [N], already shifted, -100 to leave a row out.
      options: static.

    Returns:
      (loss sum, correct), float32 scalars; sums are float32. Only the loss is differentiable. A label whose logit
      equals the largest is ranked first, also where another token's does too (argmax would take the first of them).
    """
    return _run(hidden, head, labels, options, differentiate=False)[0]


def _forward(hidden, head, labels, options):
    results, gradients = _run(hidden, head, labels, options, differentiate=True)
    return results, (*gradients, head[:0])


def _backward(options, residuals, cotangents):
    d_hidden, d_head, like = residuals
    scale = cotangents[0]
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (d_head * scale).astype(like.dtype), None


fused_cross_entropy.defvjp(_forward, _backward)


class TokenScores(NamedTuple):
    """Of each row, float32 [N], 0 where the label is -100."""

    log_probs: jax.Array  # log p(label); differentiable
    entropies: jax.Array  # of the distribution p, in nats; differentiable
    correct: jax.Array  # 1 where no token is more likely than the label
    mean_logits: jax.Array  # over the vocabulary
    log_sum_sq_probs: jax.Array  # log Σ p²


def token_log_probs(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """log p(label) of each row, and the entropy of p: the first two of `token_scores`."""
    scores = token_scores(hidden, head, labels, options)
    return scores.log_probs, scores.entropies


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_scores(hidden: jax.Array, head: jax.Array, labels: jax.Array, options: Options) -> TokenScores:
    """What is known of each row from its logits.

    Args:
      hidden: [N, D]. head: [V, D], same dtype. labels: int32 [N], already shifted, -100 to leave a row out.
      options: static; p is the softmax of logits as they say.

    Returns:
      log-probabilities and entropies are differentiable with respect to hidden, and to head with options.train_head.
      Under jit, what stays unused is not computed.
    """
    return _token_forward(hidden, head, labels, options)[0]


def _token_forward(hidden, head, labels, options):
    def visit(take, put, y, _, carry):
        scores, lses = carry
        logits = _chunk_logits(take(hidden), head, options)
        found = _statistics(logits, y, entropy=True)
        squares = jnp.sum(jnp.exp(2 * (logits - found.top[:, None])), axis=1)
        values = TokenScores(
            log_probs=found.chosen - found.lse,
            entropies=found.entropy,
            correct=(found.chosen >= found.top).astype(jnp.float32),
            mean_logits=jnp.mean(logits, axis=1),
            log_sum_sq_probs=jnp.log(squares) + 2 * (found.top - found.lse),
        )
        return jax.tree.map(put, scores, values), put(lses, found.lse)

    nothing = jnp.zeros(labels.shape, jnp.float32)
    scores, lse = _fold(labels, options, visit, (TokenScores(*[nothing] * 5), nothing))
    return scores, (hidden, head, labels, lse, scores.entropies)


def _token_backward(options, residuals, cotangents):
    hidden, head, labels, lse, entropies = residuals
    for_log_probs, for_entropies, *_ = cotangents

    def visit(take, put, y, _, sums):
        x = take(hidden)
        logits = _chunk_logits(x, head, options)
        upstream = (-take(for_log_probs), options, take(entropies), take(for_entropies))
        grad = _logit_gradient(logits, take(lse), y, *upstream).astype(x.dtype)
        return _through_product(grad, x, head, put, sums)

    d_hidden, d_head = _fold(labels, options, visit, _empty_gradients(hidden, head, options))
    return d_hidden, None if d_head is None else d_head.astype(head.dtype), None


token_scores.defvjp(_token_forward, _token_backward)
