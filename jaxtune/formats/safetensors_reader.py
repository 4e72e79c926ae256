"""Read .safetensors files without loading them: one memory-mapped view per tensor.

The format: an unsigned 64-bit little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [start, end]}}, then the raw little-endian bytes.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit that the reference implementation sets


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype, shape, and its byte range in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One .safetensors file. Raises ValueError with the file's name when it is truncated or malformed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{self.path} is not a whole safetensors file: its header says {length:,} bytes and "
                    f"the file has {size:,}. Download or copy it again."
                )
            header = self._parse(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {name: self._info(name, entry, 8 + length, size) for name, entry in header.items()}

    def _parse(self, raw: bytes) -> dict:
        try:
            header = json.loads(raw)
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a safetensors file: its header is not JSON ({error})"
            ) from error
        if not isinstance(header, dict):
            raise ValueError(f"{self.path} is not a safetensors file: its header is not a JSON object")
        return header

    def _info(self, name: str, entry: dict, offset: int, size: int) -> TensorInfo:
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"tensor {name!r} of {self.path} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = (offset + at for at in entry["data_offsets"])
        if end - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize or start < offset:
            raise ValueError(
                f"tensor {name!r} of {self.path}: {end - start} bytes do not hold {dtype} {shape}"
            )
        if end > size:
            raise ValueError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {end:,} and the file has {size:,}. "
                "Download or copy it again."
            )
        return TensorInfo(dtype, shape, start, end)

    def read(self, name: str) -> np.ndarray:
        """Return a read-only memory-mapped view; its pages are dropped when the next tensor is read.

        The view stays valid after that (the pages come back from the file); dropping them keeps the
        resident memory of a pass over the file near its largest tensor.
        """
        info = self.tensors[name]
        self._map.madvise(mmap.MADV_DONTNEED)
        count = int(np.prod(info.shape, dtype=np.int64))
        if not count:
            return np.zeros(info.shape, info.dtype)
        return np.frombuffer(self._map, info.dtype, count, info.start).reshape(info.shape)


class SafetensorsFolder:
    """A folder with model.safetensors, or with an index and its shards; tensors by name.

    Args:
        folder: the checkpoint folder.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is absent (it is named).
        ValueError: a file is damaged, or the index places a tensor where it is not.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX_NAME
        if (self.folder / SINGLE_NAME).exists():  # before an index, as transformers does
            file = SafetensorsFile(self.folder / SINGLE_NAME)
            self._files = dict.fromkeys(file.tensors, file)
        elif index.exists():
            self._files = self._open_shards(json.loads(index.read_text("utf-8"))["weight_map"])
        else:
            raise FileNotFoundError(
                f"{self.folder} has no {SINGLE_NAME} and no {INDEX_NAME}; {_what_is_there(self.folder)}"
            )

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (self.folder / shard).exists()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX_NAME} names: "
                f"{', '.join(missing)}. Download or copy them again."
            )
        opened = {shard: SafetensorsFile(self.folder / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in opened[shard].tensors:
                raise ValueError(f"{INDEX_NAME} places tensor {name!r} in {shard}, which does not hold it")
        return {name: file for file in opened.values() for name in file.tensors if name in weight_map}

    def names(self) -> list[str]:
        """Tensor names, shard by shard in file order, so that a pass over them reads sequentially."""
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, from the header."""
        return self._files[name].tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Memory-mapped read-only view of a tensor."""
        return self._files[name].read(name)


def _what_is_there(folder: Path) -> str:
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    if not others:
        return "it holds no weights that jaxtune knows"
    return (
        f"it holds {', '.join(others[:5])}, which jaxtune does not read. "
        "Save the model again with safe_serialization=True (transformers' default)."
    )
