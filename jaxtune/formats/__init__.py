"""Checkpoint file formats: readers that give one tensor at a time under its Hugging Face name; a writer."""

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
