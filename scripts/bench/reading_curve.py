"""A model that has never seen an image learns to read: SmolLM2 behind a random tower (make_vlm.py).

    python scripts/bench/reading_curve.py SMOLLM2_FOLDER --out reading --ocr FOLDER --workers 9
    python scripts/bench/reading_curve.py SMOLLM2_FOLDER --out digits --digits digits.npz --steps 600 --every 50
    python scripts/bench/draw_formulas.py FOLDER DRAWN
    python scripts/bench/reading_curve.py SMOLLM2_FOLDER --out formulas --formulas FOLDER --drawn DRAWN --batch 12 \
        --learning_rate 3e-4 --every 1000 --workers 15
    python scripts/bench/reading_curve.py SMOLLM2_FOLDER --steps 4 --batch 4 --rows 40 --limit 4 --side 64     # a CPU

All weights are trained on lines that Pillow renders (words, sums, invoices, letters at random). Read are the images of
--ocr, with metadata.jsonl (image, text); none of their texts is trained on. With --digits it trains on written digits
(scikit-learn's: images uint8 [N, 8, 8] and labels) and reads of the last 400. With --formulas it trains on all that
draw_formulas.py made, in its order, easy ones first, and among the last fifth on the folder's real pictures, packed
into rows of 512 tokens. It reads the real pictures that the folder holds out, and the last that were drawn; an answer
has a space between any two symbols, and is compared with the label in the normal form of formulas.py.
Lines and digits are squares of SmolVLM, formulas keep their shape in Qwen2.5-VL. Writes curve.json and curve.png: the
character error rate and the share of exact readings along the way; and readings.json, the last ones.
Lines on one H200: six minutes.
"""

import argparse
import io
import json
import multiprocessing
import random
import string
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from datasets import Image as ImageFeature
from datasets import load_dataset
from draw_formulas import CELL, LONGEST
from formula_images import cut
from formulas import apart, labelled, normal
from make_vlm import make
from PIL import Image, ImageDraw, ImageFont

from jaxtune import FastVisionModel, SFTConfig, SFTTrainer, VisionDataCollator
from jaxtune.evaluate.reading import error_rates, examples, read_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIGITS, LETTERS = string.digits, string.ascii_letters
QUESTION = "Write out the text."
HELD_OUT_DIGITS = 400
ALIKE = 60  # of the formulas drawn are read
DARK = [(0, 0, 0), (30, 40, 90), (110, 20, 20), (20, 80, 40), (60, 60, 60)]
LIGHT = [(255, 255, 255), (255, 248, 225), (232, 240, 255), (238, 238, 238)]


class Task(NamedTuple):
    """Rows to train on, to read, and like those trained on to read too; tokens of a row, and of an answer, at most;
    the form to compare readings in; how it is trained otherwise than others."""

    rows: list[dict]
    held_out: list[dict]
    alike: Sequence[dict] = ()
    max_length: int = 160
    max_new_tokens: int = 24
    form: Callable[[str], str] = str
    options: Mapping[str, Any] = MappingProxyType({})


def render(text: str, chance: random.Random) -> Image.Image:
    """The text in dark on light, with a margin."""
    font = ImageFont.load_default(size=chance.randint(12, 26))
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    left, top, right, bottom = (chance.randint(4, 24) for _ in range(4))
    size = int(box[2]) + left + right, int(box[3]) + top + bottom
    picture = Image.new("RGB", size, chance.choice(LIGHT))
    ImageDraw.Draw(picture).multiline_text((left, top), text, fill=chance.choice(DARK), font=font)
    return picture


def line(words: list[str], chance: random.Random) -> str:
    """A text to render."""
    kind = chance.random()
    if kind < 0.35:
        return " ".join(chance.choices(words, k=chance.randint(1, 3)))
    if kind < 0.55:
        return f"{chance.randrange(100)} {chance.choice('+-*')} {chance.randrange(100)} = ?"
    if kind < 0.75:
        cents = chance.randrange(100000)
        return f"Invoice {chance.randrange(1000, 10000)}\nTotal: ${cents // 100}.{cents % 100:02d}"
    return "".join(chance.choices(LETTERS + DIGITS + ".,:$=+-?()", k=chance.randint(1, 10)))


def conversation(image: Any, text: str) -> dict[str, Any]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def png(picture: Image.Image) -> dict[str, bytes]:
    """As `datasets` stores an image."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue()}


def rendered_row(job: tuple[int, list[str], set[str]]) -> dict[str, Any]:
    """The row of a number."""
    number, words, kept_out = job
    chance = random.Random(number)
    text = line(words, chance)
    while text in kept_out:
        text = line(words, chance)
    return conversation(png(render(text, chance)), text)


def rendered_rows(tokenizer: Any, count: int, kept_out: set[str], workers: int) -> list[dict[str, Any]]:
    vocabulary = (tokenizer.convert_tokens_to_string([token]).strip() for token in sorted(tokenizer.vocab))
    words = sorted(
        {word for word in vocabulary if word.isascii() and word.isalpha() and 3 <= len(word) <= 10}
    )
    words = [word for word in words if word.lower() not in kept_out]
    jobs = ((number, words, kept_out) for number in range(count))
    with ProcessPoolExecutor(max(workers, 1), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(rendered_row, jobs, chunksize=500))


def folder_rows(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metadata.jsonl").read_text("utf-8").splitlines())
    return [conversation(str(folder / row["image"]), row["text"]) for row in rows]


def digit_rows(file: Path) -> list[dict[str, Any]]:
    """Dark on light, 32 pixels wide."""
    rows = []
    with np.load(file) as arrays:
        for pixels, label in zip(arrays["images"], arrays["labels"], strict=True):
            picture = Image.fromarray(255 - 15 * pixels).resize((32, 32)).convert("RGB")
            rows.append(conversation(picture, str(label)))
    return rows


class Curve:
    """Reads the images every so many steps, as a callback of the trainer, and writes the curve so far."""

    def __init__(self, model: Any, processor: Any, task: Task, every: int, out: Path):
        self.model, self.processor, self.task, self.out, self.every = model, processor, task, out, every
        self.asked, self.alike = examples(task.held_out), examples(task.alike)
        self.points: list[dict[str, float]] = []
        self.said: list[str] = []
        self.began = time.perf_counter()
        self.read(0, None)

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        step = trainer.state.global_step
        if step % self.every == 0 or step == trainer.state.max_steps:
            self.read(step, float(metrics["loss"]))

    def read(self, step: int, loss: float | None) -> None:
        FastVisionModel.for_inference(self.model)
        options = {
            "max_new_tokens": self.task.max_new_tokens,
            "batch_size": 100,
            "resize": "max",
            "progress": False,
        }
        both = [*self.asked, *self.alike]
        self.said = [*map(self.task.form, read_images(self.model, self.processor, both, **options))]
        point = {"step": step, "seconds": time.perf_counter() - self.began, "loss": loss}
        print(f"step {step:5d}, {point['seconds']:4.0f} s: loss {loss}", end="")
        count = len(self.asked)
        for name, asked, said in (
            ("", self.asked, self.said[:count]),
            ("alike_", self.alike, self.said[count:]),
        ):
            if asked:
                rates = error_rates([self.task.form(one.reference) for one in asked], said)
                point |= {f"{name}cer": rates.cer, f"{name}exact": rates.exact}
                print(f", {name}CER {rates.cer:.1%}, {name}exact {rates.exact:.1%}", end="")
        print(flush=True)
        self.points.append(point)
        (self.out / "curve.json").write_text(json.dumps(self.points, indent=1))
        pairs = [[self.task.form(one.reference), said] for one, said in zip(both, self.said, strict=True)]
        (self.out / "readings.json").write_text(json.dumps(pairs, indent=1))
        draw(self.points, self.out / "curve.png")
        FastVisionModel.for_training(self.model)

    def show(self, count: int = 5) -> None:
        for one, said in list(zip(self.asked, self.said))[:count]:
            print(f"  {one.reference!r}\n  read as {said!r}")


def train(model: Any, processor: Any, task: Task, curve: Curve, given: argparse.Namespace) -> None:
    collator = VisionDataCollator(
        model, processor, resize="max", train_on_responses_only=True, num_proc=given.workers
    )
    options = {"max_steps": given.steps, "train_sampling_strategy": "random", **task.options}
    args = SFTConfig(
        output_dir=str(given.out / "run"),
        max_length=task.max_length,
        per_device_train_batch_size=given.batch,
        learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.05,
        gradient_checkpointing=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=given.seed,
        **options,
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=processor,
        data_collator=collator,
        train_dataset=task.rows,
        args=args,
        callbacks=[curve],
    )
    trainer.train()
    curve.show()


def draw(points: list[dict[str, float]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.2))
    steps = [point["step"] for point in points]
    errors = [100 * min(point["cer"], 1.5) for point in points]
    axis.plot(steps, errors, "o-", ms=3, label="character errors")
    axis.plot(steps, [100 * point["exact"] for point in points], "s-", ms=3, label="read exactly")
    if "alike_cer" in points[0]:
        alike = [100 * min(point["alike_cer"], 1.5) for point in points]
        axis.plot(steps, alike, "^:", ms=3, label="character errors, drawn ones")
    axis.set(xlabel="step", ylabel="%", ylim=(0, 155))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def digits(given: argparse.Namespace) -> Task:
    rows = digit_rows(given.digits)
    return Task(rows[:-HELD_OUT_DIGITS], rows[-HELD_OUT_DIGITS:][: given.limit])


def lines(given: argparse.Namespace, tokenizer: Any) -> Task:
    held_out = folder_rows(given.ocr) if given.ocr else []
    kept_out = {row["messages"][1]["content"][0]["text"] for row in held_out}
    count = given.rows + (0 if held_out else given.limit)
    rows = rendered_rows(tokenizer, count, kept_out, given.workers)
    held_out, rows = (held_out, rows) if held_out else (rows[given.rows :], rows[: given.rows])
    return Task(rows, held_out[: given.limit])


def formulas(given: argparse.Namespace) -> Task:
    real, held_out, left_out = labelled(given.formulas, LONGEST)
    drawn = load_dataset("parquet", data_files=str(given.drawn / "*.parquet"), split="train")
    drawn = drawn.cast_column("image", ImageFeature(decode=False))
    print(
        f"{len(drawn) - ALIKE} rows drawn; {len(real)} real, {len(held_out)} held out; left out: {dict(left_out)}",
        flush=True,
    )
    rows = [conversation(row["image"], row["text"]) for row in drawn]
    trained, alike, chance = rows[:-ALIKE], rows[-ALIKE:], random.Random(given.seed)
    early = len(trained) * 4 // 5
    late = trained[early:]
    late += [read_row(path, apart(text), chance) for path, text in real for _ in range(given.real)]
    chance.shuffle(late)
    asked = [read_row(*pair) for pair in held_out[: given.limit]]
    options = {"num_train_epochs": given.epochs, "max_steps": -1, "packing": True}
    options |= {"train_sampling_strategy": "sequential"}
    return Task(trained[:early] + late, asked, alike, 512, 160, normal, options)


def read_row(path: Path, text: str, chance: random.Random | None = None) -> dict[str, Any]:
    """With `chance` its margins vary, as those of drawn ones."""
    with Image.open(path) as picture:
        return conversation(png(cut(picture, CELL, chance)), text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("--ocr", type=Path, help="what is read; without it more rendered lines")
    parser.add_argument("--digits", type=Path, help="digits.npz, to train on and to read")
    parser.add_argument("--formulas", type=Path, help="metadata.jsonl (image, text, split) and its images")
    parser.add_argument("--drawn", type=Path, help="with --formulas: what draw_formulas.py made, to train on")
    parser.add_argument("--out", type=Path, default=Path("reading"))
    parser.add_argument("--steps", type=int, default=3500, help="without --formulas")
    parser.add_argument("--epochs", type=int, default=1, help="with --formulas")
    parser.add_argument(
        "--real", type=int, default=10, help="with --formulas: times that a real picture comes"
    )
    parser.add_argument("--batch", type=int, default=64, help="rows of a step; with --formulas packed ones")
    parser.add_argument("--rows", type=int, default=120000, help="rendered lines to train on")
    parser.add_argument("--limit", type=int, default=200, help="images that are read for a point")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--every", type=int, default=250, help="steps between points")
    parser.add_argument("--side", type=int, default=256, help="pixels of an image, without --formulas")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare images")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.formulas is None) != (given.drawn is None):
        parser.error("--formulas and --drawn go together")
    family = "qwen2_5_vl" if given.formulas else "smolvlm"
    folder = make(family, given.smollm2, given.out / "random", side=given.side, seed=given.seed)
    model, processor = FastVisionModel.from_pretrained(
        str(folder), max_seq_length=512, load_in_4bit=False, full_finetuning=True
    )
    if given.formulas:
        task = formulas(given)
    else:
        task = digits(given) if given.digits else lines(given, processor.tokenizer)
    train(model, processor, task, Curve(model, processor, task, given.every, given.out), given)


if __name__ == "__main__":
    main()
