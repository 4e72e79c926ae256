"""Step time with images decoded and processed while it trains, against the same batches from memory.

    python scripts/bench/image_loader.py [--model FOLDER] [--rows 4] [--size 672] [--steps 20] [--workers 1 2 4]
    python scripts/bench/image_loader.py --wide      # the shape of Qwen2.5-VL-7B, random weights

Images are JPEG files of size × size pixels. Without --model or --wide the step is that of the reading task's small
model, which is quick on any device; what matters is whether the two agree for a model of the size that you train.
Time: a minute or two; memory: the model's.
"""

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import vision_step
from PIL import Image

from jaxtune import FastVisionModel
from jaxtune.config import SFTConfig
from jaxtune.data import VisionBatches, VisionDataCollator
from jaxtune.optim import make_optimizer
from jaxtune.step import make_train_step
from jaxtune.tasks import reading


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face folder or hub id of a vision-language model")
    parser.add_argument(
        "--wide", action="store_true", help="the shape of Qwen2.5-VL-7B in NF4, random weights"
    )
    parser.add_argument("--layers", type=int, help="of each part of it, fewer than the model has")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, one image each")
    parser.add_argument("--size", type=int, default=672, help="pixels of an image's sides")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(given, Path(folder))


def measure(given: argparse.Namespace, folder: Path) -> None:
    name = given.model or str(reading.make_model(folder / "model"))
    model, processor = FastVisionModel.from_pretrained(name, load_in_4bit=given.model is not None)
    model = wide_model(model.config, given.layers) if given.wide else FastVisionModel.get_peft_model(model)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": given.size**2}
    rows = write_rows(folder, given.rows * given.steps, given.size)
    collator = VisionDataCollator(model, processor, resize="max")
    began = time.perf_counter()
    prepared = collator.prepare(rows, workers=max(given.workers), progress=False)
    print(f"{jax.devices()[0].device_kind}: {'the shape of Qwen2.5-VL-7B' if given.wide else repr(model)}")
    print(f"{len(rows)} images of {given.size} pixels checked in {time.perf_counter() - began:.1f} s")
    run = Runner(model)

    def batches(workers: int) -> VisionBatches:
        shape = {"batch_size": given.rows, "max_length": None, "packed": False, "shuffle": False}
        return VisionBatches(prepared, collator, workers=workers, **shape)

    held = [batches(0).step(n) for n in range(given.steps)]
    run.seconds(lambda n: held[n], 2)  # compiles
    best = run.seconds(lambda n: held[n], given.steps)
    print(f"batches from memory: {1e3 * best:.1f} ms a step")
    for workers in given.workers:
        loader = batches(workers)
        loader.step(0)  # the processes start
        alone = timed(loader, given.steps)
        again = batches(workers)
        again.step(0)
        step = run.seconds(again.step, given.steps)
        print(
            f"{workers} workers: {1e3 * step:.1f} ms a step ({step / best - 1:+.1%}); the loader alone "
            f"{1e3 * alone:.1f} ms, {given.rows / alone:.0f} images/s"
        )
        again.close()


def wide_model(small: Any, layers: int | None) -> Any:
    """What a step and a collator need of a Qwen2.5-VL-7B with the special tokens of another config."""
    hf = vision_step.config(layers)
    for name in vision_step.IDS:
        setattr(hf, name, getattr(small, name))
    bench = vision_step.VisionBench(hf)
    bench.fill()
    leaves = {"trainable": bench.trainable, "base": bench.base}
    return SimpleNamespace(config=hf, max_seq_length=4096, **vars(bench.model), **leaves)


def timed(loader: VisionBatches, steps: int) -> float:
    """Seconds a batch, with nothing else to do."""
    began = time.perf_counter()
    for n in range(steps):
        loader.step(n)
    return (time.perf_counter() - began) / steps


class Runner:
    """Steps as the trainer runs them: the next batch is asked for while the device computes."""

    def __init__(self, model):
        self.model = model
        optimizer = make_optimizer(SFTConfig(), 100, model.trainable)
        self.trainable, self.opt_state = model.trainable, jax.jit(optimizer.init)(model.trainable)
        self.step = make_train_step(model, optimizer)

    def seconds(self, batch, steps: int) -> float:
        """Seconds a step, over some steps that follow each other."""
        key, metrics, pending = jax.random.key(0), None, batch(0)
        began = time.perf_counter()
        for n in range(steps):
            self.trainable, self.opt_state, now = self.step(
                self.trainable, self.opt_state, self.model.base, pending, key
            )
            pending = batch((n + 1) % steps) if n + 1 < steps else None
            if metrics is not None:
                jax.device_get(metrics)
            metrics = now
        jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / steps


def write_rows(folder: Path, count: int, size: int) -> list[dict]:
    """Conversations about JPEG files of noise that was scaled up, about 100 kB each at 672 pixels."""
    rows = []
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(small).resize((size, size)).save(path, quality=90)
        asked = [{"type": "image", "image": str(path)}, {"type": "text", "text": "What is there? " * 8}]
        answer = "noise " * 20
        rows.append(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        )
    return rows


if __name__ == "__main__":
    main()
