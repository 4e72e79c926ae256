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
    All lengths are those of one of `shapes`. Each device has rows and their images to itself: the images of the first
    come first, padded to the same lengths as those of the next, and slots count from each device's first.

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
        rows_per_step: int | None = None,
        devices: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        """
        Args:
            dataset, packed: columns input_ids, labels and documents, of `pack` if packed.
            batch_size, accumulation, max_length, seed, shuffle, together, numbers: as of `Batches`.
            rows_per_step, part: as of `Batches`.
            devices: of all parts, among which the rows of a micro-batch are divided; those that stay together lie on
                one, so batch_size / devices is a multiple of `together`.
            workers: processes that work ahead; 0: images are processed when a step is asked for.

        Raises:
            ValueError: as `Batches`.
        """
        self._text = Batches(
            dataset,
            batch_size=batch_size // devices,
            accumulation=accumulation * devices,
            max_length=max_length,
            packed=packed,
            seed=seed,
            shuffle=shuffle,
            pad_token_id=collator.tokenizer.pad_token_id,
            together=together,
            numbers=numbers,
            rows_per_step=rows_per_step,
        )  # of each device's share of a micro-batch, one after another
        self.batch_size, self.accumulation = batch_size, accumulation
        first, stop = (devices * (part[0] + i) // part[1] for i in (0, 1))
        self._own = [micro * devices + i for micro in range(accumulation) for i in range(first, stop)]
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

    def own_rows(self, number: int) -> np.ndarray:
        """`rows`, of this process's part."""
        shares = self._shares(number)
        return np.concatenate([shares[i] for i in self._own])

    def step(self, number: int) -> VisionBatch:
        """The batch of optimiser step `number`, counted from 0, this process's part; the steps after it are begun."""
        shares = self._shares(number)
        shape = self._shape(shares)
        self._begun = {step: begun for step, begun in self._begun.items() if step >= number}
        for step in range(number, number + 1 + (self._ahead() if self._workers else 0)):
            if step not in self._begun:
                self._begun[step] = self._begin(self._shares(step), self._own)
        images = [begun.result() for begun in self._begun.pop(number)]
        parts = [self._collate(shares[i], shape, made) for i, made in zip(self._own, images, strict=True)]
        return _stacked(parts, self.accumulation)

    def eval_batches(self) -> Iterator[VisionBatch]:
        """All rows once, in the dataset's order, as arrays [B, T]; the last batch is filled with empty rows."""
        size, devices = self._text.batch_size, self._text.accumulation // self.accumulation
        order, own = np.arange(len(self._row_sizes)), self._own[: len(self._own) // self.accumulation]
        batches = [
            [order[first + i * size : first + (i + 1) * size] for i in range(devices)]
            for first in range(0, len(order), size * devices)
        ]
        begun: list[list[Future[ImageArrays]]] = []
        for place, shares in enumerate(batches):
            while len(begun) < min(len(batches), place + 1 + self._workers):
                begun.append(self._begin(batches[len(begun)], own))
            shape, images = self._shape(shares), [one.result() for one in begun[place]]
            parts = [self._collate(shares[i], shape, made) for i, made in zip(own, images, strict=True)]
            yield _joined(parts)
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
        epoch = [self._needs(self._shares(step)) for step in range(self.steps_per_epoch)]
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

    def _shares(self, number: int) -> list[np.ndarray]:
        """The rows of each device in each micro-batch of a step; a short last step has fewer, and empty ones."""
        rows, size = self._text.rows(number), self._text.batch_size
        return [rows[i * size : (i + 1) * size] for i in range(self._text.accumulation)]

    def _ahead(self) -> int:
        return max(STEPS_AHEAD, -(-self._workers // len(self._own)))

    def _begin(self, shares: Sequence[np.ndarray], own: Sequence[int]) -> list[Future[ImageArrays]]:
        """The images of some of these shares, in the workers, padded as all need it."""
        shape, pool = self._shape(shares), self._collator.pool(self._workers)
        sizes = {name: shape[name] for name in self._names}
        begun = []
        for rows in (shares[i] for i in own):
            numbers = [int(number) for row in rows for number in self._documents.row(row)]
            known = [self._collator.known(number) for number in numbers]
            documents = [self._collator.document(number) for number in numbers]
            lengths, digests = [one.length for one in known], [one.digest for one in known]
            begun.append(pool.arrays(documents, lengths, digests, sizes))
        return begun

    def _collate(self, rows: np.ndarray, shape: Mapping[str, int], made: ImageArrays) -> VisionBatch:
        """One device's share of a micro-batch: arrays [B, T], and its images."""
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


def _joined(shares: Sequence[VisionBatch]) -> VisionBatch:
    """What each device has of a micro-batch, one after another."""
    names = shares[0].keys() - {"images"}
    images = {
        name: np.concatenate([share["images"][name] for share in shares]) for name in shares[0]["images"]
    }
    return {name: np.concatenate([share[name] for share in shares]) for name in names} | {"images": images}


def _stacked(shares: Sequence[VisionBatch], count: int) -> VisionBatch:
    """The shares of `count` micro-batches, one after another, as one step's arrays [G, …]."""
    each = len(shares) // count
    parts = [_joined(shares[first : first + each]) for first in range(0, len(shares), each)]
    first = parts[0]
    whole: VisionBatch = {
        name: np.stack([part[name] for part in parts]) for name in first if name != "images"
    }
    images = {name: np.stack([part["images"][name] for part in parts]) for name in first["images"]}
    return whole | {"images": images}
