"""Attention of prompts, and of a decode step, in which rows that share a prompt read its keys and values once.

Caches are [.., K, tokens, h], heads before tokens, as their readers want them: a step transposes and copies nothing.
"""

import jax
import jax.numpy as jnp

from jaxtune.kernels.attention import cudnn_attention, masked_attention, supports_cudnn
from jaxtune.kernels.decode_attention import Attended, decode_attention, merge

KV = tuple[jax.Array, jax.Array]


def prompt_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    softcap: float | None,
    blocks: jax.Array | None,
) -> jax.Array:
    """Causal attention of prompts with themselves; what pads their end is seen by no token of theirs.

    Args:
      q: [P, S, H, h]. k, v: [P, S, K, h]. window: tokens seen, None for all. softcap: of scores, None for none.
      blocks: int32 [P, S], see `masked_attention`.
    """
    if blocks is None and supports_cudnn(q, packed=False, softcap=softcap):
        return cudnn_attention(q, k, v, None, window)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return masked_attention(
        q,
        k,
        v,
        q_positions=positions,
        q_segments=jnp.zeros_like(positions),
        window=window,
        softcap=softcap,
        blocks=blocks,
    )


def _of_prompts(
    q: jax.Array, prompt: KV, first: jax.Array, end: jax.Array, softcap: float | None
) -> Attended:
    """One token of each row, q [P, G, H, h], against columns of its group's cache: [P·G, K, H/K, ..]."""
    groups, size, heads, h = q.shape
    kv = prompt[0].shape[1]
    per_kv = heads // kv
    by_prompt = q.reshape(groups, size, kv, per_kv, h).swapaxes(1, 2).reshape(groups, kv, size * per_kv, h)

    def to_rows(x: jax.Array) -> jax.Array:  # [P, K, G·H/K, ..] -> [P·G, K, H/K, ..]
        x = x.reshape(groups, kv, size, per_kv, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(groups * size, kv, per_kv, *x.shape[4:])

    return jax.tree.map(to_rows, decode_attention(by_prompt, *prompt, first, end, softcap))


def image_attention(q: jax.Array, prompt: KV, seen: jax.Array) -> jax.Array:
    """One token of each row, q [P, G, H, h], against the first `seen` (int32 [P]) columns of its group's cache:
    [P·G, H·h] in q's dtype, 0 where none is seen."""
    out = _of_prompts(q, prompt, jnp.zeros_like(seen), seen, None).out
    return out.reshape(q.shape[0] * q.shape[1], -1)


def group_attention(
    q: jax.Array,
    prompt: KV,
    own: KV,
    lengths: jax.Array,
    step: jax.Array,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """One token of each row against its group's prompt and its own tokens, as one softmax.

    Args:
      q: [P, G, H, h], of tokens at position lengths + step.
      prompt: k, v [P, K, S, h], of which the first `lengths` columns are tokens.
      own: k, v [P·G, K, T, h], of which columns 0 to `step` are tokens.
      lengths: int32 [P]. step: int32 [].
      window: keys further back than this many tokens are hidden; None sees all.
      softcap: of scores, None for none.

    Returns:
      [P·G, H·h] in q's dtype.
    """
    groups, size, heads, h = q.shape
    kv = prompt[0].shape[1]
    per_kv = heads // kv
    # distances are to the token itself: column c of a prompt is lengths + step - c back, of the rows' own step - c
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths + step + 1 - window, 0)
    own_first = jnp.int32(0) if window is None else jnp.maximum(step + 1 - window, 0)
    every = jnp.ones(groups * size, jnp.int32)
    shared = _of_prompts(q, prompt, first, lengths, softcap)
    alone = decode_attention(
        q.reshape(groups * size, kv, per_kv, h), *own, own_first * every, (step + 1) * every, softcap
    )
    return merge([shared, alone]).reshape(groups * size, heads * h)
