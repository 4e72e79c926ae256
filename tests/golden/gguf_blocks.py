"""Weights that are hard to quantise, and the blocks llama.cpp makes of them (gguf_blocks.npz).

Make the file again, from llama.cpp's libraries (x86-64) in FOLDER:

    PYTHONPATH=tests python tests/golden/gguf_blocks.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

FILE = Path(__file__).with_suffix(".npz")
KINDS = ("Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS").split()


def hard_rows(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> float32 [width]; width a multiple of 512."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(12, width)).astype(np.float32)
    zero = np.zeros(width, np.float32)
    rows = {
        "zeros": zero,
        "negative zeros": zero.copy(),
        "constant": np.full(width, 0.3),
        "negative constant": np.full(width, -0.3),
        "all negative": -np.abs(normal[0]),
        "all positive": np.abs(normal[1]),
        "tiny": 1e-7 * normal[2],
        "below the smallest": 1e-16 * normal[3],
        "subnormal": 1e-39 * normal[4],
        "outlier": 0.02 * normal[5],
        "outliers": 0.02 * normal[6],
        "single weights": zero.copy(),
        "lattice": rng.integers(-8, 8, width) * 0.05,
        "heavy tails": rng.standard_t(2, width),
        "scales far apart": normal[7] * np.repeat(10.0 ** -rng.integers(0, 12, width // 16), 16),
        "zero and tiny runs": normal[8].copy(),
        "normal": 0.02 * normal[9],
    }
    rows["negative zeros"][::3] = -0.0
    rows["outlier"][5] = 30
    rows["outliers"][::40] = -3
    rows["single weights"][7::64] = 1
    rows["single weights"][300::512] = -1
    rows["zero and tiny runs"][:32] *= 1e-6
    rows["zero and tiny runs"][64:128] *= 1e-8
    rows["zero and tiny runs"][128:192] = 0
    rows["zero and tiny runs"][256:512] *= 1e-30
    return {name: row.astype(np.float32) for name, row in rows.items()}


def importances(width: int, seed: int = 1) -> dict[str, np.ndarray | None]:
    """Name -> float32 [width], or None."""
    rng = np.random.default_rng(seed)
    made = {
        "squares": rng.normal(size=width) ** 2,
        "ones": np.ones(width),
        "zeros": np.zeros(width),
        "some zeros": np.where(rng.random(width) < 0.3, 0, rng.random(width)),
        "far apart": 10 ** rng.uniform(-8, 4, width),
    }
    return {"none": None, **{name: values.astype(np.float32) for name, values in made.items()}}


def main(folder: str) -> None:
    from llamacpp import LlamaCpp

    judge = LlamaCpp(folder)
    rows = hard_rows(512)
    names = ["normal", "heavy tails", "scales far apart", "outlier", "negative zeros"]
    values, importance = np.stack([rows[name] for name in names]), importances(512)["squares"]
    blocks = {"values": values, "importance": importance}
    for name in KINDS:
        blocks[name] = judge.quantise(values, Kind[name])
        blocks[f"{name} importance"] = judge.quantise(values, Kind[name], importance)
    np.savez_compressed(FILE, **blocks)


if __name__ == "__main__":
    main(sys.argv[1])
