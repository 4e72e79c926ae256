"""QLoRA on the same batches and first adapter: jaxtune beside transformers + PEFT + bitsandbytes.

    python scripts/bench/peft_comparison.py prepare --model DIR --gsm8k DIR --out DIR
    python scripts/bench/peft_comparison.py jaxtune --model DIR --out DIR
    python scripts/bench/peft_comparison.py peft    --model DIR --out DIR
    python scripts/bench/peft_comparison.py report  --out DIR

`prepare` writes the batches of both tasks (the shipped orders, GSM8K) and the first adapter; the two runs train 200
steps each and write losses, evaluation losses and step times; `report` draws the curves and prints the table. The
runs are two processes, so that neither library holds the other's memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

TASKS = {"orders": {"length": 128, "rows": 8}, "gsm8k": {"length": 512, "rows": 8}}
LEARNING_RATE, WARMUP = 2e-4, 5


def task_rows(task: str, gsm8k: Path, tokenizer, steps: int, held_out: int):
    from jaxtune.tasks import orders

    if task == "orders":
        return orders.make_rows(1000), orders.make_rows(held_out, held_out=True)

    def read(name, count):
        rows = [json.loads(line) for line in (gsm8k / name).read_text().splitlines()[:count]]
        roles = ("user", "question"), ("assistant", "answer")
        return [{"messages": [{"role": r, "content": row[c]} for r, c in roles]} for row in rows]

    return read("train.jsonl", steps * TASKS[task]["rows"]), read("test.jsonl", held_out)


def prepare(args) -> None:
    from types import SimpleNamespace

    import datasets

    from jaxtune import FastLanguageModel, SFTConfig
    from jaxtune.data.batches import Batches
    from jaxtune.data.prepare import prepare_dataset
    from jaxtune.data.responses import train_on_responses_only

    model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=512)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    model.save_pretrained(args.out / "first_adapter")
    for task, shape in TASKS.items():
        arrays = {}
        for name, rows in zip(
            ("train", "eval"), task_rows(task, args.gsm8k, tokenizer, args.steps, args.held_out)
        ):
            config = SFTConfig(max_length=shape["length"])
            dataset = prepare_dataset(datasets.Dataset.from_list(rows), tokenizer, config)
            if "messages" in rows[0]:
                holder = SimpleNamespace(
                    train_dataset=dataset, eval_dataset=None, processing_class=tokenizer, args=config
                )
                dataset = train_on_responses_only(holder, tokenizer=tokenizer).train_dataset
            batches = Batches(
                dataset, batch_size=shape["rows"], max_length=shape["length"], packed=False, seed=0,
                pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=shape["length"],
            )  # fmt: skip
            chosen = (
                [batches.step(n) for n in range(args.steps)]
                if name == "train"
                else list(batches.eval_batches())
            )
            for key in chosen[0]:
                arrays[f"{name}/{key}"] = np.stack(
                    [b[key].reshape(-1, b[key].shape[-1])[-shape["rows"] :] for b in chosen]
                )
        np.savez(args.out / f"{task}.npz", **arrays)


def batches_of(args, task: str, split: str):
    data = np.load(args.out / f"{task}.npz")
    columns = {key.split("/")[1]: data[key] for key in data.files if key.startswith(split + "/")}
    for i in range(min(args.steps, len(columns["labels"])) if split == "train" else len(columns["labels"])):
        yield {key: value[i] for key, value in columns.items()}


def save(args, library: str, task: str, loss, seconds, eval_before, eval_after, peak_bytes) -> None:
    figures = {"eval_before": eval_before, "eval_after": eval_after, "peak_gb": peak_bytes / 1e9}
    print(library, task, figures, flush=True)
    (args.out / f"{library}-{task}.json").write_text(json.dumps(figures | {"loss": loss, "seconds": seconds}))


def run_jaxtune(args, task: str) -> None:
    import jax

    from jaxtune import FastLanguageModel, SFTConfig
    from jaxtune.models.remat import Remat
    from jaxtune.optim import make_optimizer
    from jaxtune.step import make_eval_step, make_train_step

    config = SFTConfig(learning_rate=LEARNING_RATE, warmup_steps=WARMUP)
    model, _ = FastLanguageModel.from_pretrained(args.out / "first_adapter", max_seq_length=512)
    optimizer = make_optimizer(config, args.steps, model.trainable)
    step = make_train_step(model, optimizer, remat=Remat.parse("none"))
    evaluate = make_eval_step(model)

    def held_out() -> float:
        sums = [evaluate(trainable, model.base, batch) for batch in batches_of(args, task, "eval")]
        return float(sum(s["loss_sum"] for s in sums) / sum(s["num_items"] for s in sums))

    trainable, state = model.trainable, optimizer.init(model.trainable)
    before, losses, seconds = held_out(), [], []
    for batch in batches_of(args, task, "train"):
        start = time.perf_counter()
        batch = {key: value[None] for key, value in batch.items()}
        trainable, state, metrics = step(trainable, state, model.base, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats() or {}
    save(args, "jaxtune", task, losses, seconds, before, held_out(), stats.get("peak_bytes_in_use", 0))


def run_peft(args, task: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    model = PeftModel.from_pretrained(base, args.out / "first_adapter", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    rate = lambda n: n / WARMUP if n < WARMUP else (args.steps - n) / (args.steps - WARMUP)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss_of(batch):
        columns = (batch[name] for name in ("input_ids", "labels", "segment_ids"))
        ids, labels, mask = (torch.tensor(column, device=device).long() for column in columns)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1).float()
        labels = labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()

    @torch.no_grad()
    def held_out() -> float:
        model.eval()
        sums = [loss_of(batch) for batch in batches_of(args, task, "eval")]
        model.train()
        return float(sum(s[0] for s in sums) / sum(s[1] for s in sums))

    before, losses, seconds = held_out(), [], []
    for batch in batches_of(args, task, "train"):
        start = time.perf_counter()
        total, items = loss_of(batch)
        (total / items).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total / items))
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    save(args, "peft", task, losses, seconds, before, held_out(), peak)


def report(args) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(11, 4))
    print("| task | library | eval loss before | after | step, median ms (p10–p90) | peak memory GB |")
    print("|---|---|---|---|---|---|")
    for axis, task in zip(axes, TASKS):
        for library, style in (("jaxtune", "-"), ("peft", "--")):
            run = json.loads((args.out / f"{library}-{task}.json").read_text())
            axis.plot(run["loss"], style, label=f"{library}, held-out {run['eval_after']:.4f}", linewidth=1.2)
            times = sorted(1e3 * s for s in run["seconds"][5:])
            low, high = times[len(times) // 10], times[9 * len(times) // 10]
            print(
                f"| {task} | {library} | {run['eval_before']:.4f} | {run['eval_after']:.4f} | "
                f"{statistics.median(times):.1f} ({low:.1f}–{high:.1f}) | {run['peak_gb']:.2f} |"
            )
        axis.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(args.out / "peft_comparison.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["prepare", "jaxtune", "peft", "report"])
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=200, help="rows of evaluation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command in ("prepare", "report"):
        {"prepare": prepare, "report": report}[args.command](args)
    for task in TASKS if args.command in ("jaxtune", "peft") else ():
        {"jaxtune": run_jaxtune, "peft": run_peft}[args.command](args, task)


if __name__ == "__main__":
    sys.path.pop(0)  # kernels.py is there, which transformers would take for Hugging Face's package
    main()
