"""Rows in which one prompt stands once before several of its completions.

    [R, P + G·C]:  prompt (padded on the left to P), then G completions of C tokens each (padded on the right)

Everything that treats tokens one by one, which is nearly all of a model, runs on such rows as they are. Attention runs
on the rows spread out, [R·G, P + C], each completion behind its own copy of the prompt's keys and values; what the
copies of the prompt compute there is the same G times, and that of the first is taken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SharedPrefix(NamedTuple):
    """The layout. prompt: P. copies: G.

    positions, segment_ids: int32 [R·G, P + C] of the rows spread out; segment 0 is padding. starts: int32 [R·G, 2],
    where the padding in front and the prompt begin (kernels.attention.packed_layout), the second -1 without padding.
    """

    prompt: int
    copies: int
    positions: jax.Array
    segment_ids: jax.Array
    starts: jax.Array

    def spread(self, x: jax.Array) -> jax.Array:
        """[R, P + G·C, ...] -> [R·G, P + C, ...]."""
        rows, rest = x.shape[0], x.shape[2:]
        prompt = jnp.broadcast_to(x[:, None, : self.prompt], (rows, self.copies, self.prompt, *rest))
        own = x[:, self.prompt :].reshape(rows, self.copies, -1, *rest)
        return jnp.concatenate([prompt, own], axis=2).reshape(rows * self.copies, -1, *rest)

    def gather(self, x: jax.Array) -> jax.Array:
        """[R·G, P + C, ...] -> [R, P + G·C, ...]."""
        apart = x.reshape(-1, self.copies, *x.shape[1:])
        own = apart[:, :, self.prompt :].reshape(apart.shape[0], -1, *x.shape[2:])
        return jnp.concatenate([apart[:, 0, : self.prompt], own], axis=1)

    def predictors(self, hidden: jax.Array) -> jax.Array:
        """Of hidden states [R, P + G·C, D] those that predict each completion's tokens, [R·G, C, D]."""
        rows, width = hidden.shape[0], hidden.shape[-1]
        last = hidden[:, None, self.prompt - 1 : self.prompt]
        own = hidden[:, self.prompt :].reshape(rows, self.copies, -1, width)
        first = jnp.broadcast_to(last, (rows, self.copies, 1, width))
        return jnp.concatenate([first, own[:, :, :-1]], axis=2).reshape(rows * self.copies, -1, width)
