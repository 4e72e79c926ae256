"""Batches of rows with images, each reachable by its step number, their images processed ahead of the step."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import datasets
import numpy as np

from jaxtune.data.batches import Batches
from jaxtune.data.columns import DOCUMENTS, ragged_column
from jaxtune.data.image_encoder import ImageArrays
from jaxtune.data.shapes import Shape, choose_shapes, fitting
from jaxtune.data.vision import VisionDataCollator
from jaxtune.images import image_slots

STEPS_AHEAD = 2  # at least; more where there are more workers than micro-batches in a step
LENGTH = "length"  # tokens of a row, beside the family's own names of lengths

VisionBatch = dict[str, Any]


class VisionBatches:
    """Training and evaluation batches of what `VisionDataCollator.prepare` gave, packed or not.

    As `Batches`, each follows from (seed, step number) alone. Besides its arrays a batch has image_slots int32
    [G, B, T], rope_positions int32 [G, B, T, 3] where the family has them, and images, the family's arrays [G, …].
    All lengths are those of one of `shapes`.

    Attributes:
        shapes: lengths that batches are padded to, by name; each is a compilation of the step.
        largest_step: of the first epoch.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        collator: VisionDataCollator,
        *,
        batch_size: int,
        accumulation: int = 1,
        max_length: int | None,
        packed: bool,
        workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        together: int = 1,
        numbers: Mapping[str, np.ndarray] | None = None,
    ):
        """
        Args:
            dataset, packed: columns input_ids, labels and documents, of `pack` if packed.
            batch_size, accumulation, max_length, seed, shuffle, together, numbers: as of `Batches`.
            workers: processes that work ahead; 0: images are processed when a step is asked for.

        Raises:
            ValueError: as `Batches`.
        """
        self._text = Batches(
            dataset,
            batch_size=batch_size,
            accumulation=accumulation,
            max_length=max_length,
            packed=packed,
            seed=seed,
            shuffle=shuffle,
            pad_token_id=collator.tokenizer.pad_token_id,
            together=together,
            numbers=numbers,
        )
        self.batch_size, self.accumulation = batch_size, accumulation
        self._collator, self._workers, self._packed = collator, workers, packed
        self._family = collator.encoder.family
        self._documents = ragged_column(dataset, DOCUMENTS)
        self._names = list(self._family.sizes([{}]))
        self._rotates = self._family.rope_positions(np.zeros(1, np.int32), None) is not None
        self._row_sizes = self._sizes_of_rows()
        self._begun: dict[int, list[Future[ImageArrays]]] = {}
        self.shapes = self._shapes()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see every row once; the last may be short."""
        return self._text.steps_per_epoch

    def rows(self, number: int) -> np.ndarray:
        """Which rows of the dataset are in `step(number)`, in order."""
        return self._text.rows(number)

    def step(self, number: int) -> VisionBatch:
        """The batch of optimiser step `number`, counted from 0; the steps after it are begun."""
        micros = self._micro_batches(number)
        shape = self._shape(micros)
        self._begun = {step: begun for step, begun in self._begun.items() if step >= number}
        for step in range(number, number + 1 + (self._ahead() if self._workers else 0)):
            if step not in self._begun:
                self._begun[step] = self._begin(self._micro_batches(step))
        images = [begun.result() for begun in self._begun.pop(number)]
        parts = [self._collate(rows, shape, made) for rows, made in zip(micros, images, strict=True)]
        return _stacked(parts)

    def eval_batches(self) -> Iterator[VisionBatch]:
        """All rows once, in the dataset's order, as arrays [B, T]; the last batch is filled with empty rows."""
        size, count = self._text.batch_size, len(self._row_sizes)
        parts = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
        begun: list[list[Future[ImageArrays]]] = []
        for place, rows in enumerate(parts):
            while len(begun) < min(len(parts), place + 1 + self._workers):
                begun.append(self._begin([parts[len(begun)]]))
            yield self._collate(rows, self._shape([rows]), begun[place][0].result())
            begun[place] = []

    def close(self) -> None:
        """Forgets what was begun and ends the workers; they start again with the next step."""
        self._begun.clear()
        self._collator.close()

    # -- shapes ----------------------------------------------------------------------------------------------

    def _sizes_of_rows(self) -> np.ndarray:
        """int64 [rows, lengths]: what the images of each row add to each length."""
        sizes = np.zeros((len(self._documents), len(self._names)), np.int64)
        for row in range(len(sizes)):
            for document in self._documents.row(row):
                found = self._collator.known(int(document)).sizes
                sizes[row] += [found.get(name, 0) for name in self._names]
        return sizes

    def _needs(self, micros: Sequence[np.ndarray]) -> Shape:
        """Lengths that hold each of some micro-batches."""
        least = self._family.sizes([{}])
        sums = np.stack([self._row_sizes[rows].sum(0) for rows in micros]).max(0)
        rows = np.concatenate(micros)
        need = {name: max(int(size), least[name]) for name, size in zip(self._names, sums)}
        return {LENGTH: self._length(rows), **need}

    def _length(self, rows: np.ndarray) -> int:
        if self._packed:
            return self._text.max_length
        multiple = self._collator.pad_to_multiple_of or 1
        return -(-int(self._text.row_lengths[rows].max()) // multiple) * multiple

    def _shapes(self) -> list[Shape]:
        """Chosen from the first epoch in its order; the last holds any batch of any order."""
        size = self._text.batch_size
        epoch = [self._needs(self._micro_batches(step)) for step in range(self.steps_per_epoch)]
        needs = {name: np.asarray([need[name] for need in epoch]) for name in epoch[0]}
        most = {
            name: int(np.sort(column)[-size:].sum()) for name, column in zip(self._names, self._row_sizes.T)
        }
        most[LENGTH] = self._length(np.arange(len(self._row_sizes)))
        # A token of the text and a patch of an image are taken to cost the same; the other lengths follow the patches.
        weights = {LENGTH: float(size), self._names[0]: 1.0}
        shapes = choose_shapes(needs, most, weights)
        self.largest_step = max(
            range(len(epoch)), key=lambda step: sum(w * epoch[step][n] for n, w in weights.items())
        )
        limit = self._text.max_length
        return [{**shape, LENGTH: min(shape[LENGTH], max(limit, most[LENGTH]))} for shape in shapes]

    def _shape(self, micros: Sequence[np.ndarray]) -> Shape:
        return fitting(self.shapes, self._needs(micros))

    # -- batches ---------------------------------------------------------------------------------------------

    def _micro_batches(self, number: int) -> list[np.ndarray]:
        """The rows of each micro-batch of a step; a short last step has fewer, and empty ones."""
        rows, size = self._text.rows(number), self._text.batch_size
        return [rows[i * size : (i + 1) * size] for i in range(self._text.accumulation)]

    def _ahead(self) -> int:
        return max(STEPS_AHEAD, -(-self._workers // self._text.accumulation))

    def _begin(self, micros: Sequence[np.ndarray]) -> list[Future[ImageArrays]]:
        """The images of some micro-batches, in the workers."""
        shape, pool = self._shape(micros), self._collator.pool(self._workers)
        sizes = {name: shape[name] for name in self._names}
        begun = []
        for rows in micros:
            numbers = [int(number) for row in rows for number in self._documents.row(row)]
            lengths = [self._collator.known(number).length for number in numbers]
            documents = [self._collator.document(number) for number in numbers]
            begun.append(pool.arrays(documents, lengths, sizes))
        return begun

    def _collate(self, rows: np.ndarray, shape: Mapping[str, int], made: ImageArrays) -> VisionBatch:
        """One micro-batch: arrays [B, T], and its images."""
        batch: VisionBatch = self._text.collate(rows, self._text.batch_size, shape[LENGTH])
        batch["image_slots"] = image_slots(batch["input_ids"], self._family.image_token_id)
        batch["image_slots"][batch["segment_ids"] == 0] = -1  # padding with a token that stands for an image
        if self._rotates:
            batch["rope_positions"] = self._rope_positions(batch, rows, made)
        return batch | {"images": made.arrays}

    def _rope_positions(self, batch: VisionBatch, rows: np.ndarray, made: ImageArrays) -> np.ndarray:
        """int32 [B, T, 3]: those of each document, one after another; padding counts as `positions` does."""
        found = np.repeat(batch["positions"][..., None], 3, -1)
        documents = iter(made.rope_positions)
        for place, row in enumerate(rows):
            own: list[Any] = [next(documents) for _ in self._documents.row(row)]
            filled = np.concatenate(own)
            found[place, : len(filled)] = filled
        return found


def _stacked(parts: Sequence[VisionBatch]) -> VisionBatch:
    """Micro-batches as one step's arrays [G, …]."""
    first = parts[0]
    whole: VisionBatch = {
        name: np.stack([part[name] for part in parts]) for name in first if name != "images"
    }
    images = {name: np.stack([part["images"][name] for part in parts]) for name in first["images"]}
    return whole | {"images": images}
