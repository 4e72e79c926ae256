"""Which documents cuDNN is told of, worked out from jax's own preparation of its arguments."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

from jaxtune.kernels.attention import packed_layout

HEADS, KV, H = 4, 2, 8
# Per row the lengths of its documents; a row's last may be padding.
ROWS = {
    "every slot used": [[3, 5], [4, 4]],
    "unequal": [[1, 7, 8], [16], [2, 14]],
    "one row": [[5, 6, 5]],
    "one document a row, slots left": [[8], [8]],
    "single tokens": [[1, 1, 1, 1], [4]],
}


def starts_of(rows, slots):
    starts = np.full((len(rows), slots), -1, np.int32)
    for row, lengths in zip(starts, rows):
        row[: len(lengths)] = np.cumsum([0, *lengths[:-1]])
    return jnp.asarray(starts)


def documents_seen(lengths, offsets, rows, tokens):
    """(first token, length) in the flattened batch of every document cuDNN would attend in, as jax hands it over."""
    q = jnp.zeros((rows, tokens, HEADS, H), jnp.bfloat16)
    k = jnp.zeros((rows, tokens, KV, H), jnp.bfloat16)
    q_len, kv_len, q_off, kv_off = _fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    q_len, kv_len, q_off, kv_off = (np.asarray(x).reshape(-1) for x in (q_len, kv_len, q_off, kv_off))
    np.testing.assert_array_equal(q_len, kv_len)
    np.testing.assert_array_equal(q_off // (HEADS * H), kv_off // (KV * H))
    return [(int(at) // (HEADS * H), int(n)) for at, n in zip(q_off, q_len) if n > 0]


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("name", ROWS)
def test_every_document_is_where_it_lies(name, spare):
    rows = ROWS[name]
    tokens = sum(rows[0])
    lengths, offsets = packed_layout(starts_of(rows, max(2, *map(len, rows)) + spare), tokens)
    want = [
        (number * tokens + int(at), length)
        for number, row in enumerate(rows)
        for at, length in zip(np.cumsum([0, *row[:-1]]), row)
    ]
    assert documents_seen(lengths, offsets, len(rows), tokens) == want


def test_the_end_of_a_row_must_not_stand_among_the_offsets():
    """What makes other fills silently wrong: the second row's documents are paired with the wrong places."""
    rows, tokens = ROWS["every slot used"], 8
    lengths, offsets = packed_layout(starts_of(rows, 2), tokens)
    with_ends = offsets.at[:, 2].set(tokens)
    assert documents_seen(lengths, offsets, 2, tokens) == [(0, 3), (3, 5), (8, 4), (12, 4)]
    assert documents_seen(lengths, with_ends, 2, tokens) == [(0, 3), (3, 5), (8, 4), (8, 4)]
