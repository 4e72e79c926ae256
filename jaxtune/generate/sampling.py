"""Choosing the next token: greedy, or sampling after temperature, top-k, top-p and min-p, in that order.

What is cut lies below one number a row, its threshold. It is found by bisection over the 32 bits of a float, which
needs no sorted vocabulary and gives the very set that sorting would: tokens as likely as the least likely one that is
kept are kept too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, with transformers' names.

    do_sample: False takes the most likely token. temperature: logits are divided by it. top_k: keep the k most likely
    (0: all). top_p: keep the smallest set whose probability reaches p. min_p: keep what is at least min_p times as
    likely as the most likely. repetition_penalty: divide (or multiply, below 0) the logits of tokens already there.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; use do_sample=False for greedy"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def cuts(self) -> bool:
        """Whether tokens are chosen from anything but the whole distribution at `temperature`."""
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return self.repetition_penalty != 1 or (self.do_sample and filtered)


class Choice(NamedTuple):
    """token int32 [B]; logprob float32 [B] over the whole vocabulary at the temperature; kept_logprob float32 [B] over
    what was chosen from, None where that is the same."""

    token: jax.Array
    logprob: jax.Array
    kept_logprob: jax.Array | None


def _bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order, both zeros one number."""
    raw = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(raw >> 31 == 1, ~raw, raw | jnp.uint32(1 << 31))


def _least(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The smallest uint32 [B, 1] for which `holds` is true, given that it is for all above."""

    def halve(i, low):
        # every number below `low` fails; is the first that holds in the upper half of what is left?
        middle = low + (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(middle - 1), low, middle)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((rows, 1), jnp.uint32))


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] after temperature, with the tokens that are cut set to -inf; float32."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    rows, vocabulary = logits.shape
    if 0 < sampling.top_k < vocabulary:
        bits = _bits(logits)
        # the k-th largest is the smallest number that fewer than k exceed
        threshold = _least(lambda x: (bits > x).sum(-1, keepdims=True) < sampling.top_k, rows)
        logits = jnp.where(bits < threshold, -jnp.inf, logits)
    if sampling.top_p < 1:
        bits, probabilities = _bits(logits), jax.nn.softmax(logits, axis=-1)
        # a token is kept while the more likely ones have not reached top_p
        more_likely = lambda x: jnp.where(bits > x, probabilities, 0).sum(-1, keepdims=True)  # noqa: E731
        threshold = _least(lambda x: more_likely(x) < sampling.top_p, rows)
        logits = jnp.where(bits < threshold, -jnp.inf, logits)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Repetition penalty (arXiv 1909.05858) on the tokens that bool [B, V] `seen` marks."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def row_keys(key: jax.Array, streams: jax.Array) -> jax.Array:
    """A key for each row: of the call's key and the row's (prompt, sample), int32 [B, 2]."""
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s[0]), s[1]))(streams)


def choose(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, step: jax.Array, sampling: Sampling
) -> Choice:
    """The next token of each row.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], for the repetition penalty; None without one.
      keys: of `row_keys`, [B]; the noise of a row depends on its own key and `step` alone.
    """
    temperature = sampling.temperature if sampling.do_sample else 1.0
    plain = logits.astype(jnp.float32) / temperature
    kept = plain
    if seen is not None:
        kept = penalise(logits, seen, sampling.repetition_penalty) / temperature
    if sampling.do_sample and sampling.cuts():
        kept = filter_logits(kept * temperature, sampling)
    scores = kept
    if sampling.do_sample:  # the largest of logits + Gumbel noise is a sample
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, step), (logits.shape[-1],)))(keys)
        scores = kept + noise
    token = jnp.argmax(scores, -1).astype(jnp.int32)

    def logprob(x):
        return jnp.take_along_axis(x, token[:, None], -1)[:, 0] - jax.nn.logsumexp(x, -1)

    return Choice(token, logprob(plain), logprob(kept) if sampling.cuts() else None)
