"""Causal attention over packed rows: a token sees its own document, up to itself, within its window."""

import jax


def attention_mask(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """bool [B, 1, T, S] from int32 positions and segment ids [B, T] (queries) and [B, S] (keys)."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    allowed = (q_segments[:, :, None] == kv_segments[:, None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h], H a multiple of K.
      q_positions, kv_positions: int32 [B, T], [B, S], counted within a document.
      q_segments, kv_segments: int32 [B, T], [B, S]; only equal ids see each other.
      window: keys further back than this many tokens are hidden; None sees all.

    Returns:
      [B, T, H, h] in q's dtype.
    """
    mask = attention_mask(q_positions, kv_positions, q_segments, kv_segments, window)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
