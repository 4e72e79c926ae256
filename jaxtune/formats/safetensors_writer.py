"""Write .safetensors files tensor by tensor, split into shards, without holding a shard in memory.

A header precedes the data and is known only after it, so room for it is reserved and filled in last, padded
with spaces as the format allows.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.formats.safetensors_reader import DTYPES, INDEX_NAME, SINGLE_NAME

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY_BYTES = 160  # dtype, shape, offsets and punctuation of one header entry, generously
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """ "5GB" -> 5,000,000,000 bytes; an int is bytes already."""
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit, factor in _UNITS.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise ValueError(f"size {size!r} is not understood; expected bytes or a number with {', '.join(_UNITS)}")


class _File:
    """One file being written: data first, header at `close`."""

    def __init__(self, path: Path, header_bytes: int):
        self.path, self.size = path, 0
        self._room = header_bytes + -header_bytes % 8
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = open(path, "wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, value: np.ndarray) -> None:
        span = [self.size, self.size + value.nbytes]
        self._header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": span}
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        self.size = span[1]

    def close(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        assert len(header) == self._room, "the room for the header is an upper bound"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header)
        self._file.close()


class ShardWriter:
    """Write tensors into `folder` as model.safetensors, or as numbered shards with an index.

    Args:
        folder: an existing folder.
        names: every tensor name that may be added (to reserve room for the headers).
        max_shard_size: bytes, or a string such as "5GB"; a larger group of tensors gets a shard of its own.
        single: name of the file when one is enough.
    """

    def __init__(
        self, folder: Path, names: list[str], max_shard_size: int | str = "5GB", single: str = SINGLE_NAME
    ):
        self._folder, self._limit, self._single = folder, parse_size(max_shard_size), single
        self._room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._files: list[_File] = []
        self._where: dict[str, _File] = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if self._files:
            self._files[-1].close()
        if kind is None:
            self._finish()

    def add(self, group: dict[str, np.ndarray]) -> None:
        """Append tensors that must lie in one file (a quantised weight with its scales)."""
        nbytes = sum(value.nbytes for value in group.values())
        if not self._files or (self._files[-1].size and self._files[-1].size + nbytes > self._limit):
            if self._files:
                self._files[-1].close()
            self._files.append(_File(self._folder / f"part-{len(self._files)}.tmp", self._room))
        for name, value in group.items():
            self._files[-1].add(name, value)
            self._where[name] = self._files[-1]

    def _finish(self) -> None:
        if len(self._files) == 1:
            self._files[0].path.rename(self._folder / self._single)
            return
        stem, total = self._single.removesuffix(".safetensors"), len(self._files)
        for i, file in enumerate(self._files):
            file.path = file.path.rename(self._folder / f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors")
        index = {
            "metadata": {"total_size": sum(file.size for file in self._files)},
            "weight_map": {name: file.path.name for name, file in sorted(self._where.items())},
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
