"""Attention of a decode step: rows that share a prompt read its keys and values once.

A step's keys are two arrays: the prompt's, one for each group of rows, and the row's own. Their softmaxes are merged
by the larger of their maxima and the sum of their denominators. Caches are [.., K, tokens, h], heads before tokens, as
the matrix products read them: nothing is transposed or copied in a step.
"""

import jax
import jax.numpy as jnp

from jaxtune.kernels.attention import cudnn_attention, masked_attention, supports_cudnn

KV = tuple[jax.Array, jax.Array]
_HIDDEN = -1e30  # a masked score: finite, so that a part without a visible key is no NaN


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Causal attention of prompts with themselves; what pads their end is seen by no token of theirs.

    Args:
      q: [P, S, H, h]. k, v: [P, S, K, h]. window: tokens seen, None for all.
    """
    if supports_cudnn(q, packed=False):
        return cudnn_attention(q, k, v, None, window)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    one = jnp.zeros_like(positions)
    return masked_attention(
        q, k, v, q_positions=positions, kv_positions=positions, q_segments=one, kv_segments=one, window=window
    )


def decode_attention(
    q: jax.Array, prompt: KV, suffix: KV, lengths: jax.Array, step: jax.Array, window: int | None
) -> jax.Array:
    """One token of each row against its group's prompt and its own suffix; softmax in float32.

    Args:
      q: [P, G, H, h], of tokens at position lengths + step.
      prompt: k, v [P, K, S, h], of which the first `lengths` columns are tokens.
      suffix: k, v [P·G, K, T, h], of which columns 0 to `step` are tokens.
      lengths: int32 [P]. step: int32 [].
      window: keys further back than this many tokens are hidden; None sees all.

    Returns:
      [P·G, H·h] in q's dtype.
    """
    groups, size, heads, h = q.shape
    kv = prompt[0].shape[1]
    per_kv = heads // kv
    scale = h**-0.5
    q = q.reshape(groups, size, kv, per_kv, h)
    by_prompt = q.swapaxes(1, 2).reshape(groups, kv, size * per_kv, h)
    by_row = q.reshape(groups * size, kv, per_kv, h)

    def to_rows(x):  # [P, K, G·H/K, ..] -> [P·G, K, H/K, ..]
        x = x.reshape(groups, kv, size, per_kv, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(groups * size, kv, per_kv, *x.shape[4:])

    def to_prompts(x):
        return x.reshape(groups, size, kv, per_kv).swapaxes(1, 2).reshape(groups, kv, size * per_kv)

    column, own = jnp.arange(prompt[0].shape[2]), jnp.arange(suffix[0].shape[2])
    visible, own_visible = column < lengths[:, None], own <= step
    if window is not None:
        visible &= lengths[:, None] + step - column < window
        own_visible &= step - own < window
    f32 = jnp.float32
    first = jnp.einsum("pkmh,pksh->pkms", by_prompt, prompt[0], preferred_element_type=f32)
    first = jnp.where(visible[:, None, None], first * scale, _HIDDEN)
    second = jnp.einsum("bkrh,bkth->bkrt", by_row, suffix[0], preferred_element_type=f32)
    second = jnp.where(own_visible, second * scale, _HIDDEN)
    top = jnp.maximum(to_rows(first.max(-1)), second.max(-1))  # [B, K, H/K]
    first, second = jnp.exp(first - to_prompts(top)[..., None]), jnp.exp(second - top[..., None])
    total = to_rows(first.sum(-1)) + second.sum(-1)
    dtype = q.dtype
    out = to_rows(jnp.einsum("pkms,pksh->pkmh", first.astype(dtype), prompt[1], preferred_element_type=f32))
    out += jnp.einsum("bkrt,bkth->bkrh", second.astype(dtype), suffix[1], preferred_element_type=f32)
    return (out / total[..., None]).astype(dtype).reshape(groups * size, heads * h)
