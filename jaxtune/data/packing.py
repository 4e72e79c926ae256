"""Packing several documents into rows of one length, row for row as TRL's `pack_dataset` does it.

BFD is Best Fit Decreasing (Ding et al. 2024, https://arxiv.org/abs/2404.10830), run on 1000 rows at a time.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence

import datasets
import numpy as np
from tqdm.auto import tqdm

from jaxtune.data.columns import DOCUMENTS, gather, list_dataset, ragged_column

STRATEGIES = ("bfd", "bfd_split", "wrapped")
ROWS_AT_ONCE = 1000


def pack(dataset: datasets.Dataset, max_length: int, strategy: str = "bfd") -> datasets.Dataset:
    """Pack a prepared dataset.

    Args:
        dataset: columns input_ids and labels; with documents (rows with images, none longer than max_length) it is
            packed too, for "bfd" alone.
        max_length: tokens of a packed row (the last of every 1000 source rows' may be shorter).
        strategy: "bfd" cuts longer documents off, "bfd_split" goes on with the rest as a document of its own,
            "wrapped" joins all documents and cuts every `max_length` tokens.

    Returns:
        int32 columns input_ids and labels, equal to TRL's, and seq_lengths: the lengths of the documents (or
        pieces of one) in each row, in order. TRL has no seq_lengths for "wrapped", so there documents see
        each other; here each piece is on its own.

    Raises:
        ValueError: unknown strategy or a max_length below 1.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"no packing strategy '{strategy}'; there are {', '.join(STRATEGIES)}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token to pack rows; came {max_length}")
    ids, labels = ragged_column(dataset, "input_ids"), ragged_column(dataset, "labels")
    if DOCUMENTS in dataset.column_names and (strategy != "bfd" or ids.lengths.max() > max_length):
        raise ValueError(
            f"rows with images are not cut: pack them with 'bfd' and max_length of at least {ids.lengths.max()} "
            f"tokens; came {strategy!r} and {max_length}"
        )
    parts = []
    chunks = range(0, len(dataset), ROWS_AT_ONCE)
    for first in tqdm(chunks, desc="Packing", unit="k rows", disable=None, leave=False):
        rows = slice(first, first + ROWS_AT_ONCE)
        parts.append(_plan(ids.starts[rows], ids.lengths[rows], max_length, strategy))
    starts, lengths, per_row = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    tokens_before = np.concatenate([[0], np.cumsum(lengths)])
    row_lengths = np.diff(tokens_before[np.concatenate([[0], np.cumsum(per_row)])])
    columns = {
        "input_ids": (gather(ids.values, starts, lengths), row_lengths),
        "labels": (gather(labels.values, starts, lengths), row_lengths),
        "seq_lengths": (lengths, per_row),
    }
    if DOCUMENTS in dataset.column_names:  # no piece starts within a document: they are not cut
        rows = np.searchsorted(ids.starts, starts)
        columns[DOCUMENTS] = ragged_column(dataset, DOCUMENTS).values[rows], per_row
    return list_dataset(columns)


Plan = tuple[np.ndarray, np.ndarray, np.ndarray]


def _plan(starts: np.ndarray, lengths: np.ndarray, max_length: int, strategy: str) -> Plan:
    """Which pieces make which rows.

    Args:
        starts, lengths: int64 [N], where each document lies among all tokens.

    Returns:
        start of each piece, length of each piece (in packed order), number of pieces of each row.
    """
    filled = lengths > 0
    starts, lengths = starts[filled], lengths[filled]
    if strategy == "wrapped":
        return _wrapped(starts, lengths, max_length)
    if strategy == "bfd":
        lengths = np.minimum(lengths, max_length)
    else:
        starts, lengths = _split(starts, lengths, max_length)
    bins = best_fit_decreasing(lengths, max_length)
    order = np.asarray([document for members in bins for document in members], np.int64)
    return starts[order], lengths[order], np.asarray([len(members) for members in bins], np.int64)


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of document indices: longest document first, each into the fullest bin that still holds it.

    Among equally full bins the one that came to that fill first is taken; equally long documents keep their
    order.

    >>> best_fit_decreasing([4, 2, 3, 1], 4)
    [[0], [2, 3], [1]]
    """
    lengths = np.asarray(lengths)
    bins: list[list[int]] = []
    by_space: dict[int, deque[int]] = defaultdict(deque)  # free tokens -> bins, the oldest first
    spaces: list[int] = []  # the keys of by_space in use, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            space, chosen = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[place]
            chosen = by_space[space].popleft()
            if not by_space[space]:
                del spaces[place]
        bins[chosen].append(document)
        space -= length
        if space > 0:
            if not by_space[space]:
                insort(spaces, space)
            by_space[space].append(chosen)
    return bins


def _split(starts: np.ndarray, lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `max_length` tokens."""
    pieces = -(-lengths // max_length)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
    return starts[owner] + offset, np.minimum(lengths[owner] - offset, max_length)


def _wrapped(starts: np.ndarray, lengths: np.ndarray, max_length: int) -> Plan:
    """All documents in order, cut at each document's end and at every multiple of `max_length`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(max_length, total, max_length))
    begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64)[: len(cuts)]
    owner = np.searchsorted(ends, begins, side="right")
    first = ends - lengths
    rows = -(-total // max_length)
    return (
        starts[owner] + begins - first[owner],
        cuts - begins,
        np.bincount(begins // max_length, minlength=rows),
    )
