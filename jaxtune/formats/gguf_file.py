"""Parse a .gguf file: metadata, tensor table, and tensors dequantised one at a time.

The format (GGUF version 2 and 3, little-endian): "GGUF", uint32 version, uint64 tensor count, uint64 key
count; the keys (string, uint32 type, value); per tensor (string, uint32 n_dims, uint64 dims fastest first,
uint32 type, uint64 offset); padding to general.alignment; the data. The block arithmetic of the quantised
types is the gguf package's; its own file reader is not used because it needs seconds and hundreds of MB for
a large vocabulary.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: shape [out, in] (slowest first), GGML type, first byte and byte count in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """One .gguf file: `.metadata` (key -> Python value) and `.tensors` (name -> GgufTensor).

    Raises:
        ValueError: not GGUF, truncated, big-endian, or a tensor type that the gguf package does not know.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ValueError(f"{self.path} is not a GGUF file: it has {size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map[:4] != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it begins with {self._map[:4]!r}, not b'GGUF'")
        self._at = 4
        try:
            self._parse()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} is truncated or damaged near byte {self._at:,}: {error}"
            ) from error
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.size > size:
                raise ValueError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {tensor.start + tensor.size:,} "
                    f"and the file has {size:,}. Download or copy it again."
                )

    def _parse(self) -> None:
        version, n_tensors, n_keys = self._take("<IQQ")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path}: GGUF version {version} (big-endian or too old); expected little-endian 2 or 3"
            )
        self.metadata: dict[str, Any] = {}
        self._kinds: dict[str, int] = {}  # type of a key's number, or of an array's numbers
        for _ in range(n_keys):
            key = self._string()
            (kind,) = struct.unpack_from("<I", self._map, self._at)
            if kind == _ARRAY:
                (kind,) = struct.unpack_from("<I", self._map, self._at + 4)
            self._kinds[key] = kind
            self.metadata[key] = self._value()
        table = [self._tensor() for _ in range(n_tensors)]
        align = self.metadata.get("general.alignment", 32)
        base = self._at + -self._at % align
        self.tensors = {
            name: GgufTensor(shape, kind, base + at, size) for name, shape, kind, at, size in table
        }

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        raw = self._map[self._at : self._at + length]
        if len(raw) != length:
            raise IndexError(f"a string of {length:,} bytes passes the end of the file")
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int | None = None) -> Any:
        if kind is None:
            (kind,) = self._take("<I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._take("<IQ")
            if kind in _SCALARS:
                return list(self._take(f"<{count}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(f"unknown metadata type {kind}")
        return self._take("<" + _SCALARS[kind])[0]

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        name = self._string()
        (n_dims,) = self._take("<I")
        shape = tuple(reversed(self._take(f"<{n_dims}Q")))
        number, offset = self._take("<IQ")
        if number not in set(GGMLQuantizationType):
            raise ValueError(
                f"{self.path}: tensor {name!r} has GGML type {number}, which the installed gguf package "
                "does not know; upgrade gguf"
            )
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        return name, shape, kind, offset, int(np.prod(shape, dtype=np.int64)) // block * block_bytes

    def typed_metadata(self) -> dict[str, Any]:
        """`metadata` with the file's own types: NumPy scalars and arrays for numbers, so that it can be written."""
        return {key: self._typed(value, self._kinds[key]) for key, value in self.metadata.items()}

    @staticmethod
    def _typed(value: Any, kind: int) -> Any:
        if kind not in _SCALARS or isinstance(value, bool):
            return value
        code = np.dtype(_SCALARS[kind])
        dtype = np.dtype(f"{code.kind}{code.itemsize}")  # int64, not long long
        return np.array(value, dtype) if isinstance(value, list) else dtype.type(value)

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32 [out, in] (a view of the file when it is stored as F32).

        Raises:
            ValueError: the gguf package cannot dequantise the tensor's type.
        """
        tensor = self.tensors[name]
        self._map.madvise(mmap.MADV_DONTNEED)
        raw = np.frombuffer(self._map, np.uint8, tensor.size, tensor.start)
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        rows = tensor.shape[:-1]
        if tensor.kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(tensor.shape)
        if tensor.kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(tensor.shape).astype(np.float32)
        try:
            values = dequantize(raw.reshape(*rows, tensor.shape[-1] // block * block_bytes), tensor.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} has type {tensor.kind.name}, "
                "which the gguf package cannot dequantise"
            ) from error
        return np.asarray(values, np.float32).reshape(tensor.shape)


def open_parts(path: str | Path) -> list[GgufFile]:
    """Open a .gguf file and, when it is one part of a split model, all its siblings in order.

    Raises:
        FileNotFoundError: a part is absent; its name is given.
    """
    path = Path(path)
    match = _SHARD.match(path.name)
    if not match:
        return [GgufFile(path)]
    total = int(match["total"])
    parts = [path.with_name(f"{match['stem']}-{i:05d}-of-{total:05d}.gguf") for i in range(1, total + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        raise FileNotFoundError(f"{path} is one of {total} parts; missing beside it: {', '.join(missing)}")
    return [GgufFile(part) for part in parts]
