"""Which rows run together: groups that share a prompt, padded to few shapes, and what they take of the memory."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.models.decoder import DecoderConfig

PROMPT_COLUMNS = 64  # the smallest cache of a prompt
OWN_COLUMNS = 256  # of a row; it grows as the answers do
PREFILL_TOKENS = 16384  # of a prefill call
# What a row costs a step beside its cache, in tokens of cache: its share of the products.
ROW_COST = 512


def bucket(count: int, unit: int = 1) -> int:
    """The smallest unit·(2^i or 3·2^i) that is at least `count`: few shapes, at most half of one unused."""
    size = unit
    while size < count:
        if size * 3 // 2 >= count and size * 3 % (2 * unit) == 0:
            return size * 3 // 2
        size *= 2
    return size


class Part(NamedTuple):
    """A prompt's number and the output rows that share it here."""

    prompt: int
    rows: tuple[int, ...]


class Slots(NamedTuple):
    """Parts in their places: prompts int32 [P] and rows int32 [P, G], -1 where there is none."""

    prompts: np.ndarray
    rows: np.ndarray


def split(rows: Mapping[int, Sequence[int]], size: int) -> list[Part]:
    """prompt -> its rows, as parts of at most `size` rows."""
    return [
        Part(prompt, tuple(mine[at : at + size]))
        for prompt, mine in rows.items()
        for at in range(0, len(mine), size)
    ]


def seat(parts: Sequence[Part], size: int) -> Slots:
    """Parts in `bucket`s of places."""
    places = bucket(len(parts))
    prompts, rows = np.full(places, -1, np.int32), np.full((places, size), -1, np.int32)
    for place, part in enumerate(parts):
        prompts[place], rows[place, : len(part.rows)] = part.prompt, part.rows
    return Slots(prompts, rows)


def group_size(rows: Mapping[int, Sequence[int]], columns: int, own: int) -> int:
    """Rows a group that cost least: large groups read a prompt once, small ones leave no place empty.

    Args:
      rows: prompt -> its rows. columns: of the prompts' cache. own: of the rows' own.
    """
    largest = max(map(len, rows.values()))
    sizes = {largest} | {1 << i for i in range(largest.bit_length())}
    return min(sorted(sizes, reverse=True), key=lambda size: cost(len(split(rows, size)), size, columns, own))


def cost(groups: int, size: int, columns: int, own: int, weights: float = 0) -> float:
    """Of a decode step, in tokens of cache that are read. weights: what reading those costs."""
    return weights + bucket(groups) * (columns + size * (own + ROW_COST))


class Memory(NamedTuple):
    """Bytes that a wave takes beside weights."""

    prompts: int
    own: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = (f"{name} {value / 1e9:.2f} GB" for name, value in self._asdict().items())
        return f"{self.total / 1e9:.2f} GB ({', '.join(parts)})"


def token_bytes(config: DecoderConfig, dtype) -> int:
    """Keys and values of one token."""
    return 2 * len(config.windows) * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def prefill_batch(groups: int, columns: int) -> int:
    """Prompts of a prefill call: a divisor of `groups`."""
    fits = max(1, PREFILL_TOKENS // columns)
    return max(n for n in range(1, groups + 1) if groups % n == 0 and n <= fits)


def forecast(
    config: DecoderConfig, dtype, groups: int, size: int, columns: int, own: int, flash: bool, seen: int
) -> Memory:
    """What a wave of groups x size rows needs, with caches of these columns, `seen` of them of images.

    flash: whether prompts attend to themselves without a [S, S] matrix.
    """
    c, item, batch = config, jnp.dtype(dtype).itemsize, groups * size
    layers, token = len(c.windows), token_bytes(config, dtype)
    scores = batch * c.num_heads * (columns + own) * (4 + item)
    step = batch * (3 * 4 * c.vocab_size + 4 * c.intermediate_size * item) + 2 * scores
    prompts = prefill_batch(groups, columns)
    width = 3 * c.intermediate_size + 4 * c.hidden_size + 2 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    prefill = prompts * columns * (width * item + token)  # keys and values twice where layers are stacked
    if not flash:
        prefill += 2 * 4 * prompts * c.num_heads * columns * columns
    growing = batch * own * token // (2 * layers)  # one array of the caches is there twice
    of_images = seen * token * len(c.cross_layers) // layers
    prefill += 2 * prompts * of_images
    return Memory(groups * (columns * token + of_images), batch * own * token + growing, max(step, prefill))
