"""Batches of static shape, each reachable by its step number."""

from collections.abc import Iterator, Mapping

import datasets
import numpy as np

from jaxtune.data.columns import IGNORE, ragged_column

Batch = dict[str, np.ndarray]

SMALLEST_BUCKET = 64
BUCKETS = 4


def buckets(max_length: int) -> tuple[int, ...]:
    """The few row lengths (tokens) that unpacked batches are padded to: `max_length` and its halves.

    Each is a compilation of the training step.

    >>> buckets(2048)
    (256, 512, 1024, 2048)
    >>> buckets(100)
    (64, 100)
    """
    sizes = {max_length}
    for halving in range(1, BUCKETS):
        size = -(-max_length // 2**halving)
        size = -(-size // SMALLEST_BUCKET) * SMALLEST_BUCKET
        if size < max_length:
            sizes.add(size)
    return tuple(sorted(sizes))


class Batches:
    """Training and evaluation batches of a prepared dataset.

    Each optimiser step's batch follows from (seed, step number) alone, so a run resumes by asking for its
    next step.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        batch_size: int,
        accumulation: int = 1,
        max_length: int | None,
        packed: bool,
        seed: int = 0,
        shuffle: bool = True,
        pad_token_id: int | None = None,
        pad_to_multiple_of: int | None = None,
        together: int = 1,
        numbers: Mapping[str, np.ndarray] | None = None,
        part: tuple[int, int] = (0, 1),
        rows_per_step: int | None = None,
    ):
        """
        Args:
            dataset: columns input_ids, labels (from `prepare_dataset`), and seq_lengths if `packed` (from
                `pack`).
            batch_size: rows of a micro-batch, B.
            accumulation: micro-batches of an optimiser step, G.
            max_length: tokens; no row may be longer. None: the longest row's length.
            packed: rows hold several documents; all batches are then `max_length` long.
            seed: of the order of rows; every epoch has its own.
            shuffle: False keeps the dataset's order.
            pad_token_id: fills input_ids behind a row's end; None is 0 (padding is never attended to).
            pad_to_multiple_of: pad unpacked rows to multiples of this instead of to `buckets`; every length
                that occurs is a compilation.
            together: so many rows that follow each other stay together, in order; batch_size is a multiple.
            numbers: more of each row, name -> float32 [rows]: in a batch [B, 1], 0 in empty rows.
            part: (i, n): only the i-th of n equal parts of each micro-batch's rows are made, all of one length.
            rows_per_step: rows of an optimiser step where they are fewer than B * G; empty rows fill it up.

        Raises:
            ValueError: no rows, or a row longer than max_length.
        """
        if not len(dataset) or batch_size < 1 or accumulation < 1:
            raise ValueError(
                "expected rows, batch_size and accumulation of at least 1; came "
                f"{len(dataset)}, {batch_size} and {accumulation}"
            )
        if batch_size % part[1]:
            raise ValueError(f"batch_size={batch_size} does not divide into {part[1]} parts")
        self._ids = ragged_column(dataset, "input_ids")
        self._labels = ragged_column(dataset, "labels")
        self._documents = ragged_column(dataset, "seq_lengths") if packed else None
        longest = int(self._ids.lengths.max())
        self.max_length = longest if max_length is None else max_length
        if longest > self.max_length:
            raise ValueError(
                f"a row has {longest} tokens, more than max_length={max_length}; truncate or pack first"
            )
        self.batch_size, self.accumulation = batch_size, accumulation
        self.seed, self.shuffle, self.pad_token_id = seed, shuffle, pad_token_id or 0
        self._together, self._numbers = together, dict(numbers or {})
        self._part = part
        self.rows_per_step = batch_size * accumulation if rows_per_step is None else rows_per_step
        """Rows of an optimiser step."""
        if packed:
            self._sizes = np.asarray([self.max_length])
        elif pad_to_multiple_of:
            self._sizes = np.arange(1, -(-longest // pad_to_multiple_of) + 1) * pad_to_multiple_of
        else:
            self._sizes = np.asarray(buckets(self.max_length))
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see every row once; the last may be short."""
        return -(-len(self._ids) // self.rows_per_step)

    def rows(self, number: int) -> np.ndarray:
        """Which rows of the dataset are in `step(number)`, int64 [at most B * G], in order."""
        if number < 0:
            raise IndexError(f"steps are counted from 0; came {number}")
        epoch, within = divmod(number, self.steps_per_epoch)
        return self._epoch_order(epoch)[within * self.rows_per_step : (within + 1) * self.rows_per_step]

    def own_rows(self, number: int) -> np.ndarray:
        """`rows`, of this process's part: those that `step` returns, before its empty ones."""
        return self._own(self.rows(number), self.accumulation * self.batch_size)

    def step(self, number: int) -> Batch:
        """The batch of optimiser step `number`, counted from 0 over all epochs.

        Returns:
            int32 arrays [G, B, T], of B this process's part: input_ids, labels (-100 = not trained), positions (from
            0 in each document) and segment_ids (documents 1, 2, … of a row; 0 = padding); and starts [G, B, M], the
            first token of each document and of the padding behind the last, -1 in unused places, M the same in every
            step (1 if rows are not packed: a row is one document). A short last step is filled with empty rows.
        """
        batch = self.collate(self.rows(number), self.accumulation * self.batch_size)
        return {name: array.reshape(self.accumulation, -1, array.shape[-1]) for name, array in batch.items()}

    def eval_batches(self) -> Iterator[Batch]:
        """All rows once, in the dataset's order, as int32 arrays [B, T] (of B this process's part); the last batch is
        filled with empty rows."""
        for first in range(0, len(self._ids), self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, len(self._ids)))
            yield self.collate(rows, self.batch_size)

    def step_length(self, number: int) -> int:
        """T of `step(number)`, without making the batch."""
        return self._bucket(self.rows(number))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self._ids))
        if self._order is None or self._order[0] != epoch:
            pieces = np.arange(len(self._ids)).reshape(-1, self._together)
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(pieces).reshape(-1)
        return self._order[1]

    def _bucket(self, rows: np.ndarray) -> int:
        """The smallest static length that holds the longest of `rows`."""
        return int(self._sizes[np.searchsorted(self._sizes, self._ids.lengths[rows].max())])

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row of the dataset, int64 [rows]."""
        return self._ids.lengths

    def collate(self, rows: np.ndarray, height: int, length: int | None = None) -> Batch:
        """Rows of the dataset as arrays [height, T], of each micro-batch this process's part.

        Args:
            height: G * B or B.
            length: T, at least that of the longest; None: the smallest bucket that holds it.
        """
        shape = height // self._part[1], self._bucket(rows) if length is None else length
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, np.int32),
            "labels": np.full(shape, IGNORE, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "starts": self._empty_starts(shape[0]),
            **{name: np.zeros((shape[0], 1), np.float32) for name in self._numbers},
        }
        for place, row in enumerate(self._own(rows, height)):
            ids = self._ids.row(row)
            filled = place, slice(len(ids))
            batch["input_ids"][filled] = ids
            batch["labels"][filled] = self._labels.row(row)
            batch["positions"][filled], batch["segment_ids"][filled] = self._places(row, len(ids))
            for name, values in self._numbers.items():
                batch[name][place] = values[row]
            if self._documents is not None:
                starts = np.concatenate([[0], np.cumsum(self._documents.row(row))])
                starts = starts[starts < shape[1]]  # a full row has no padding
                batch["starts"][place, : len(starts)] = starts
                # the first token of a document has nothing to be predicted from
                batch["labels"][filled][batch["positions"][filled] == 0] = IGNORE
        return batch

    def _own(self, rows: np.ndarray, height: int) -> np.ndarray:
        """Those of the rows in [height] places that are in this process's part of their micro-batch, in order."""
        index, parts = self._part
        each = self.batch_size // parts
        places = (
            np.arange(height).reshape(-1, self.batch_size)[:, index * each : (index + 1) * each].reshape(-1)
        )
        return rows[places[places < len(rows)]]

    def _empty_starts(self, height: int) -> np.ndarray:
        """int32 [height, M]: rows of one document each, which is what an empty row is."""
        width = 1 if self._documents is None else max(2, int(self._documents.lengths.max()) + 1)
        starts = np.full((height, width), -1, np.int32)
        starts[:, 0] = 0
        return starts

    def _places(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segment ids of one row, int [length] each."""
        if self._documents is None:
            return np.arange(length), np.ones(length, np.int32)
        documents = self._documents.row(row)
        starts = np.cumsum(documents) - documents
        return np.arange(length) - np.repeat(starts, documents), np.repeat(
            np.arange(1, len(documents) + 1), documents
        )
