"""Write a .gguf file (version 3, little-endian): the metadata, the table of tensors, then their data as it comes.

Layout, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: "GGUF", uint32 version, uint64 tensor count, uint64
key count; the keys (string, uint32 type, value); per tensor (string, uint32 n_dims, uint64 dims fastest first,
uint32 type, uint64 offset); zeros to a multiple of 32; the data, each tensor followed by zeros to a multiple of 32.
"""

import math
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

Value = bool | int | float | str | np.generic | np.ndarray | list[str]
ALIGNMENT = 32
_VERSION = 3
_DTYPES = {
    np.dtype(np.bool_): GGUFValueType.BOOL,
    np.dtype(np.uint8): GGUFValueType.UINT8,
    np.dtype(np.int8): GGUFValueType.INT8,
    np.dtype(np.uint16): GGUFValueType.UINT16,
    np.dtype(np.int16): GGUFValueType.INT16,
    np.dtype(np.uint32): GGUFValueType.UINT32,
    np.dtype(np.int32): GGUFValueType.INT32,
    np.dtype(np.float32): GGUFValueType.FLOAT32,
    np.dtype(np.uint64): GGUFValueType.UINT64,
    np.dtype(np.int64): GGUFValueType.INT64,
    np.dtype(np.float64): GGUFValueType.FLOAT64,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to come: shape slowest first (as Hugging Face has it; a row is the last axis), and its GGML type."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % block:
            raise ValueError(
                f"{self.name}: rows of {self.shape[-1]} weights cannot be {self.kind.name}, which has blocks of {block}"
            )
        return math.prod(self.shape) // block * block_bytes


class GgufWriter:
    """Write one file: `with GgufWriter(path, metadata, entries) as writer: writer.write(name, data) …`

    The file has a temporary name until it is complete; when the `with` block fails, nothing is left.

    Args:
        path: the file to make; one that is there is replaced at the end.
        metadata: keys in the order of the file. A str, bool, NumPy scalar or array has that type; a plain int is
            written as uint32 and a plain float as float32; a list is one of str.
        entries: all tensors, in the order in which `write` will be called.

    Raises:
        ValueError: a value GGUF cannot hold, or tensors of one name. OSError: the disk is too full. In both cases
            no file is made.
    """

    def __init__(self, path: str | Path, metadata: dict[str, Value], entries: Sequence[TensorEntry]):
        self._path = Path(path)
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("two tensors have the same name; a .gguf file could hold only one of them")
        self._entries, self._written = list(entries), 0
        head = _head(metadata, self._entries)
        #: Size of the whole file in bytes.
        self.nbytes = len(head) + sum(_padded(entry.nbytes) for entry in self._entries)
        free = shutil.disk_usage(self._path.parent).free
        if free < self.nbytes:
            raise OSError(
                f"{self._path} needs {self.nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; nothing was "
                "written. Free some space or choose another disk."
            )
        handle, name = tempfile.mkstemp(".part", f".{self._path.name}.", self._path.parent)
        self._part, self._file = Path(name), os.fdopen(handle, "wb")
        self._file.write(head)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, name: str, data) -> None:
        """Append the data (bytes or a contiguous array) of the next tensor.

        Raises:
            ValueError: it is not the next one's turn, or the data has another size than its entry.
        """
        due = self._entries[self._written] if self._written < len(self._entries) else None
        if due is None or due.name != name:
            raise ValueError(
                f"tensor {name!r} is out of order; expected {due.name if due else 'no more tensors'!r}"
            )
        data = memoryview(data).cast("B")
        if data.nbytes != due.nbytes:
            raise ValueError(f"tensor {name!r} has {data.nbytes:,} bytes; its entry says {due.nbytes:,}")
        self._file.write(data)
        self._file.write(bytes(_padded(due.nbytes) - due.nbytes))
        self._written += 1

    def close(self) -> None:
        """Give the complete file its name.

        Raises:
            ValueError: tensors are missing; the file is removed.
        """
        if self._written < len(self._entries):
            self.discard()
            raise ValueError(f"{self._path}: tensor {self._entries[self._written].name!r} was never written")
        self._file.close()
        self._part.chmod(0o644)  # mkstemp lets only the owner read
        self._part.replace(self._path)

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def _head(metadata: dict[str, Value], entries: list[TensorEntry]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_string(key), _value(value)]
        except (ValueError, struct.error) as error:
            raise ValueError(f"metadata key {key!r}: {error}") from error
    offset = 0
    for entry in entries:
        dims = entry.shape[::-1]
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, offset)
        parts += [_string(entry.name), place]
        offset += _padded(entry.nbytes)
    head = b"".join(parts)
    return head.ljust(_padded(len(head)), b"\0")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """The type and the value."""
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise ValueError(
                f"a list of {type(value[0]).__name__}: only strings; make it a NumPy array with a dtype"
            )
        kind, data = GGUFValueType.STRING, b"".join(map(_string, value))
        return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + data
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", GGUFValueType.ARRAY, _kind(value.dtype), value.size) + value.tobytes()
    if not isinstance(value, (bool, np.generic)):
        value = _number(value)
    scalar = np.asarray(value)
    return struct.pack("<I", _kind(scalar.dtype)) + scalar.tobytes()


def _kind(dtype: np.dtype) -> GGUFValueType:
    if dtype not in _DTYPES:
        raise ValueError(f"NumPy type {dtype} has no counterpart in GGUF")
    return _DTYPES[dtype]


def _number(value: int | float) -> np.generic:
    if isinstance(value, float):
        return np.float32(value)
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{value!r} is no string, number or array that GGUF holds; wrap it in a NumPy type")
    return np.uint32(value)
