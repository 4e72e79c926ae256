"""Checkpoint file formats: readers that give one tensor at a time under its Hugging Face name; a writer."""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxtune.formats.bnb_reader import BnbTensor
from jaxtune.formats.safetensors_reader import TensorInfo


class TensorReader(Protocol):
    """What every reader gives: the weights of a checkpoint by Hugging Face name."""

    def names(self) -> list[str]:
        """Weight names, in an order that reads the files sequentially."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and stored dtype of a weight, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray | BnbTensor:
        """One weight, [out, in] for a linear layer."""
        ...


class Renamed:
    """A reader whose names are changed.

    Args:
      reader: the checkpoint's. rules: (pattern, replacement) pairs of `re.sub`, tried in turn on each name.
    """

    def __init__(self, reader: TensorReader, rules: Sequence[tuple[str, str]]):
        self._reader = reader
        self.stored = {self._rename(name, rules): name for name in reader.names()}

    @staticmethod
    def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    def names(self) -> list[str]:
        """New names, in the file's order."""
        return list(self.stored)

    def info(self, name: str) -> TensorInfo:
        """Of a weight by its new name."""
        return self._reader.info(self.stored[name])

    def read(self, name: str) -> np.ndarray | BnbTensor:
        """A weight by its new name."""
        return self._reader.read(self.stored[name])


class Without:
    """A reader that leaves one weight out."""

    def __init__(self, reader: TensorReader, name: str):
        self._reader, self._name = reader, name
        self.info, self.read = reader.info, reader.read

    def names(self) -> list[str]:
        return [name for name in self._reader.names() if name != self._name]
