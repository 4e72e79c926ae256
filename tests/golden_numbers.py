"""Named arrays of numbers in a small file: one vector of all numbers, one text of all names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "golden"


def write(name: str, results: Mapping[str, np.ndarray]) -> None:
    """Writes golden/<name>.npz."""
    names = "\n".join(f"{key} {x.size}" for key, x in results.items())
    values = np.concatenate([x.reshape(-1) for x in results.values()]).astype(np.float32)
    np.savez_compressed(FOLDER / f"{name}.npz", names=names, values=values)


def read(name: str) -> dict[str, np.ndarray]:
    """Name -> float32 vector, as `write` was given, flattened."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        names = [line.rsplit(" ", 1) for line in str(stored["names"]).splitlines()]
        parts = np.split(stored["values"], np.cumsum([int(size) for _, size in names])[:-1])
    return {key: part for (key, _), part in zip(names, parts)}
