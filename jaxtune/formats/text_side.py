"""The text model in the checkpoint of a vision-language model, read as a checkpoint of its own."""

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxtune.formats import TensorReader
from jaxtune.formats.bnb_reader import BnbTensor
from jaxtune.formats.safetensors_reader import TensorInfo

_LAYER = re.compile(r"layers\.(\d+)\.(.*)")


class TextSide(NamedTuple):
    """Where a text model lies in a vision-language one.

    path: of the decoder there. layers: the numbers that the text model's layers have there. rows_behind: of the
    embedding there, for tokens that text has not.
    """

    path: str
    layers: tuple[int, ...]
    rows_behind: int = 0

    @property
    def embedding(self) -> str:
        """The embedding's name in the whole model."""
        return f"{self.path}.embed_tokens.weight"

    def own_name(self, name: str) -> str | None:
        """The text model's name of a weight or module of the whole model; None for what it has not."""
        if name.startswith("lm_head"):
            return name
        inside = name.removeprefix(f"{self.path}.")
        if inside == name:
            return None
        layer = _LAYER.fullmatch(inside)
        if layer is None:
            return f"model.{inside}"
        number = int(layer[1])
        return f"model.layers.{self.layers.index(number)}.{layer[2]}" if number in self.layers else None

    def whole_name(self, name: str) -> str:
        """The inverse of `own_name`."""
        if name.startswith("lm_head"):
            return name
        inside = name.removeprefix("model.")
        layer = _LAYER.fullmatch(inside)
        return f"{self.path}." + (f"layers.{self.layers[int(layer[1])]}.{layer[2]}" if layer else inside)


class TextReader:
    """The weights of the text model alone, under its own names."""

    def __init__(self, reader: TensorReader, side: TextSide):
        self._reader, self.side = reader, side

    def names(self) -> list[str]:
        """In the file's order."""
        return [own for name in self._reader.names() if (own := self.side.own_name(name)) is not None]

    def info(self, name: str) -> TensorInfo:
        """Of a weight by its own name."""
        whole = self.side.whole_name(name)
        info = self._reader.info(whole)
        if whole != self.side.embedding:
            return info
        return replace(info, shape=(info.shape[0] - self.side.rows_behind, *info.shape[1:]))

    def read(self, name: str) -> np.ndarray | BnbTensor:
        """A weight by its own name."""
        whole = self.side.whole_name(name)
        value = self._reader.read(whole)
        if whole != self.side.embedding or isinstance(value, BnbTensor):
            return value
        return value[: len(value) - self.side.rows_behind]

    def rows_behind(self) -> np.ndarray:
        """The rows of the whole model's embedding that the text model has not."""
        value = self._reader.read(self.side.embedding)
        assert isinstance(value, np.ndarray)
        return value[len(value) - self.side.rows_behind :]
