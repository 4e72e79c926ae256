"""Token columns of a dataset as flat arrays."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa

TOKEN_COLUMNS = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
)

IGNORE = -100
DOCUMENTS = (
    "documents"  # of rows with images, a column of lists: the numbers by which their collator knows them
)


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: row i is values[starts[i] : starts[i] + lengths[i]].

    Attributes:
        values: int32 [tokens].
        starts, lengths: int64 [rows].
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> np.ndarray:
        """int32 [T], a view."""
        return self.values[self.starts[index] : self.starts[index] + self.lengths[index]]


def ragged_column(dataset: datasets.Dataset, column: str) -> Ragged:
    """A list-of-int column as flat arrays, without a Python object per token.

    Raises:
        ValueError: the dataset has no such column.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"expected a prepared dataset with the column {column}; it has {', '.join(dataset.column_names)}. "
            "Call prepare_dataset first"
        )
    chunks = dataset.select_columns([column]).with_format("arrow")[:][column].chunks
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks]).astype(np.int64)
    flat = np.concatenate(values).astype(np.int32, copy=False)
    return Ragged(flat, np.cumsum(lengths) - lengths, lengths)


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[starts[0] : starts[0] + lengths[0]], then the next piece, and so on, as one array."""
    inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return values[np.repeat(starts, lengths) + inside]


def list_dataset(columns: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> datasets.Dataset:
    """A dataset of int32 list columns, each given as (values [tokens], length of each row [rows])."""
    arrays = {}
    for name, (values, lengths) in columns.items():
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"{offsets[-1]} tokens are more than one dataset holds (2^31 - 1); split the data"
            )
        arrays[name] = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(values.astype(np.int32, copy=False))
        )
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in arrays})
    return datasets.Dataset(pa.table(arrays).cast(features.arrow_schema))


def with_documents(dataset: datasets.Dataset, documents: Ragged) -> datasets.Dataset:
    """Token columns with the documents of each row beside them."""
    columns = {name: ragged_column(dataset, name) for name in ("input_ids", "labels")} | {
        DOCUMENTS: documents
    }
    return list_dataset({name: (column.values, column.lengths) for name, column in columns.items()})


def content_digest(dataset: datasets.Dataset, columns: Sequence[str] = ("input_ids", "labels")) -> str:
    """64 hex digits that change with any number or row boundary of these columns, and with nothing else."""
    digest = hashlib.blake2b(digest_size=32)
    for column in columns:
        ragged = ragged_column(dataset, column)
        digest.update(ragged.lengths.tobytes())
        digest.update(np.ascontiguousarray(ragged.values).data)
    return digest.hexdigest()
