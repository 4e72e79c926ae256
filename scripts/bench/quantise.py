"""Speed of each block type, one core, beside llama.cpp's in the same run, and on JAX's default device.

    PYTHONPATH=tests python scripts/bench/quantise.py [--weights MILLIONS] [--kinds Q4_K Q5_K …] [--jax]

Million weights a second of CPU time, the best of three rounds in turn. With --jax also the K-quants in JAX, in wall
time and with the array on the device already, and what part of the blocks is that of the NumPy path. llama.cpp's
libraries: JAXTUNE_LLAMA_CPP, or what scripts/test.sh has fetched; without them their columns stay empty.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from jaxtune.export.quantisers import KINDS, quantise

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 4096


def llama_cpp():
    """The judge, or None."""
    folder = Path(os.environ.get("JAXTUNE_LLAMA_CPP", ROOT / ".cache" / "llama_cpp"))
    if not (folder / "libggml-base.so").is_file():
        return None
    from llamacpp import LlamaCpp

    return LlamaCpp(folder)


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def in_jax(values: np.ndarray, kind: Kind, exact: np.ndarray) -> tuple[float, float]:
    """Million weights a second, and the part of the blocks that are the NumPy path's."""
    import jax

    from jaxtune.export import quantisers_jax

    on_device = jax.device_put(values).block_until_ready()
    blocks = quantisers_jax.quantise(on_device, kind)
    least = min(
        seconds(lambda: quantisers_jax.quantise(on_device, kind), time.perf_counter) for _ in range(3)
    )
    block = GGML_QUANT_SIZES[kind][1]
    same = (blocks.reshape(-1, block) == exact.reshape(-1, block)).all(1).mean()
    return values.size / least / 1e6, float(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", type=float, default=4, help="millions, in one tensor")
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in KINDS if kind != Kind.F32])
    parser.add_argument("--jax", action="store_true")
    arguments = parser.parse_args()
    judge = llama_cpp()
    rows = max(1, round(arguments.weights * 1e6 / WIDTH))
    values = (0.02 * np.random.default_rng(0).normal(size=(rows, WIDTH))).astype(np.float32)
    print(
        "| type | jaxtune | llama.cpp | ratio | same bytes | JAX | same blocks |\n|---|---|---|---|---|---|---|"
    )
    for kind in (Kind[name] for name in arguments.kinds):
        ours, theirs = [], []
        for _ in range(3):
            ours.append(seconds(lambda k=kind: quantise(values, k), time.process_time))
            if judge is not None:
                theirs.append(seconds(lambda k=kind: judge.quantise(values, k), time.process_time))
        exact, speed = quantise(values, kind), values.size / min(ours) / 1e6
        cells = [f"{speed:.1f}", "", "", "", "", ""]
        if judge is not None:
            cells[1], cells[2] = f"{values.size / min(theirs) / 1e6:.1f}", f"{min(theirs) / min(ours):.2f}"
            cells[3] = "yes" if np.array_equal(exact, judge.quantise(values, kind)) else "NO"
        if arguments.jax and kind.name.endswith("_K"):
            jax_speed, same = in_jax(values, kind, exact)
            cells[4], cells[5] = f"{jax_speed:.1f}", f"{same:.2%}"
        print(f"| {kind.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
