"""Prefill and decode with a key/value cache, one static shape a call.

Prompts are padded on the left, so every row writes its next token in the same cache column. The host sees tokens
after each segment of `SEGMENT` decode steps (after each step when streaming).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.generate.sampling import Sampling, penalise, sample
from jaxtune.kernels.keep import keeping_nothing
from jaxtune.models.decoder import Cache, CausalLM
from jaxtune.models.names import Leaves, join

SEGMENT = 16
PROMPT_BUCKET = 16


class State(NamedTuple):
    """tokens int32 [B, new]: generated so far, pad after the end. last [B]: newest token. step: how many columns are
    filled. done bool [B]. seen bool [B, V] or None: tokens so far, for the repetition penalty."""

    tokens: jax.Array
    last: jax.Array
    step: jax.Array
    done: jax.Array
    seen: jax.Array | None
    cache: Cache
    key: jax.Array


def _empty_cache(model: CausalLM, batch: int, columns: int) -> list:
    c = model.config
    shape = (batch, columns, c.num_kv_heads, c.head_dim)
    zeros = partial(jnp.zeros, dtype=model.dtype)
    return [
        [(zeros((s.repeats, *shape)), zeros((s.repeats, *shape))) for _ in range(s.period)]
        for s in model.plan
    ]


def _choose(model, hidden, seen, key, sampling):
    logits = model.logits(hidden)
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    token = sample(logits, key, sampling)
    return token, None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True)


@partial(jax.jit, static_argnames=("graphdef", "new", "sampling", "stop", "pad"))
def _prefill(graphdef, trainable, base, ids, mask, key, *, new, sampling, stop, pad) -> State:
    """Runs the prompt int32 [B, P] and chooses the first token."""
    model = join(graphdef, trainable, base)
    batch, prompt = ids.shape
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    later = mask.sum(1, keepdims=True) + jnp.arange(new)
    cache = Cache(
        layers=_empty_cache(model, batch, prompt + new),
        positions=jnp.concatenate([positions, later], 1),
        segment_ids=jnp.concatenate([mask, jnp.ones((batch, new), mask.dtype)], 1),
        index=jnp.int32(0),
    )
    hidden, cache = model.hidden(model.embed(ids), positions, mask, cache=cache)
    seen = None
    if sampling.repetition_penalty != 1:
        hot = jnp.zeros((batch, model.config.vocab_size), bool)
        seen = hot.at[jnp.arange(batch)[:, None], ids].max(mask.astype(bool))
    key, now = jax.random.split(key)
    first, seen = _choose(model, hidden[:, -1], seen, now, sampling)
    tokens = jnp.full((batch, new), pad, jnp.int32).at[:, 0].set(first)
    done = jnp.isin(first, jnp.array(stop, jnp.int32))
    return State(tokens, first, jnp.int32(1), done, seen, cache, key)


@partial(
    jax.jit, static_argnames=("graphdef", "steps", "sampling", "stop", "pad"), donate_argnames=("state",)
)
def _decode(graphdef, trainable, base, state: State, *, steps, sampling, stop, pad) -> State:
    """Up to `steps` more tokens; ends early when every row is done."""
    model = join(graphdef, trainable, base)
    limit = jnp.minimum(state.step + steps, state.tokens.shape[1])

    def go_on(state):
        return (state.step < limit) & ~state.done.all()

    def body(state):
        cache, index = state.cache, state.cache.index
        positions = jax.lax.dynamic_slice_in_dim(cache.positions, index, 1, 1)
        ones = jnp.ones_like(positions)
        with keeping_nothing():
            hidden, cache = model.hidden(model.embed(state.last[:, None]), positions, ones, cache=cache)
        key, now = jax.random.split(state.key)
        token, seen = _choose(model, hidden[:, 0], state.seen, now, sampling)
        token = jnp.where(state.done, pad, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, 1)
        done = state.done | jnp.isin(token, jnp.array(stop, jnp.int32))
        return State(tokens, token, state.step + 1, done, seen, cache, key)

    return jax.lax.while_loop(go_on, body, state)


def generate(
    graphdef: nnx.GraphDef,
    trainable: Leaves,
    base: Leaves,
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int],
    pad: int,
    key: jax.Array,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Continues prompts.

    Args:
      graphdef, trainable, base: a split model.
      ids: int32 [B, P], padded on the left. mask: int32 [B, P], 1 where a token is.
      max_new_tokens: at most so many are generated.
      sampling: how they are chosen.
      stop: token ids that end a row. pad: what follows the end.
      key: jax.random.key.
      on_tokens: called with the new tokens int32 [B, n] as they come, one column at a time.

    Returns:
      int32 [B, n], n ≤ max_new_tokens: the stop token included, pad after it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    empty = np.flatnonzero(mask.sum(1) == 0)
    if empty.size:
        raise ValueError(f"prompt {int(empty[0])} is empty: its attention_mask has no 1")
    width = -ids.shape[1] % PROMPT_BUCKET
    ids, mask = (np.pad(np.asarray(a, np.int32), ((0, 0), (width, 0))) for a in (ids, mask))
    options = {"sampling": sampling, "stop": tuple(stop), "pad": pad}
    state = _prefill(graphdef, trainable, base, ids, mask, key, new=max_new_tokens, **options)
    shown = 0
    while True:
        done, step = bool(state.done.all()), int(state.step)
        if on_tokens is not None and step > shown:
            on_tokens(np.asarray(state.tokens[:, shown:step]))
            shown = step
        if done or step >= max_new_tokens:
            return np.asarray(state.tokens[:, :step])
        steps = SEGMENT if on_tokens is None else 1
        state = _decode(graphdef, trainable, base, state, steps=steps, **options)
