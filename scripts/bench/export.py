"""An 8B model to q4_k_m on a GPU: what the compute costs alone, and what the whole export takes.

    python scripts/bench/export.py --folder /tmp/llama-3.1-8b --out /tmp/gguf
    python scripts/bench/export.py --folder /tmp/smollm2 --model smollm2-135m --out /tmp/gguf       # on a CPU

Makes a random checkpoint as load.py does where there is none, loads it into NF4 with an adapter, writes the file twice
(the first run compiles), and then takes the parts alone, one tensor after another: weights merged on the device,
blocks made of them, blocks brought to the host. 8B, one H200: about 2 minutes, 16 + 5 GB of disk.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import load
import measuring
import numpy as np

from jaxtune import FastLanguageModel
from jaxtune.export import quantisers_jax
from jaxtune.export.gguf_conversion import convert
from jaxtune.export.save_gguf import _kinds


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and it."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def parts_alone(model, method: str) -> dict[str, float]:
    """Seconds of each part, and of compiling, over all tensors that the device quantises."""
    conversion = convert(model)
    kinds = _kinds(method, conversion, None)
    seconds = {"merge": 0.0, "quantise": 0.0, "to_host": 0.0}
    seen = set()
    for name in conversion.shapes:
        if kinds[name] not in quantisers_jax.KINDS:
            continue
        program = (conversion.shapes[name], kinds[name], name.split(".")[-2])
        if program not in seen:  # compiled before it counts
            quantisers_jax.quantise(conversion.read_on_device(name), kinds[name])
            seen.add(program)
        took, values = timed(lambda name=name: conversion.read_on_device(name))
        seconds["merge"] += took
        took, blocks = timed(lambda v=values, k=kinds[name]: quantisers_jax.blocks_on_device(v, k))
        seconds["quantise"] += took
        seconds["to_host"] += timed(lambda b=blocks: [np.asarray(part) for part, *_ in b])[0]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint; made where it is not")
    parser.add_argument("--model", choices=load.MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--method", default="q4_k_m")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        load.make_checkpoint(args)
    model, _ = FastLanguageModel.from_pretrained(str(args.folder), load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}, {args.method}", flush=True)
    for run in ("first", "second"):
        took, made = timed(
            lambda: model.save_pretrained_gguf(
                args.out, quantization_method=args.method, overwrite=True, progress=False
            )
        )
        size = Path(made["gguf_files"][0]).stat().st_size
        print(
            f"export, {run} run: {took:.1f} s, {size / 1e9:.2f} GB, {size / took / 1e9:.2f} GB/s", flush=True
        )
    seconds = parts_alone(model, args.method)
    print("alone:", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True)
    print(f"device memory: model {model.memory_bytes() / 1e9:.2f} GB, peak {measuring.peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
