"""GRPO with the same settings, rows, rewards and first adapter: jaxtune beside TRL + PEFT + bitsandbytes.

    python scripts/bench/grpo_comparison.py jaxtune --model DIR --out DIR --seeds 0 1 2
    python scripts/bench/grpo_comparison.py trl     --model DIR --out DIR --seeds 0 1 2
    python scripts/bench/grpo_comparison.py report  --out DIR

A small model learns to answer sums with the number alone (`jaxtune.tasks.arithmetic`). jaxtune writes the first adapter
and goes first; each run writes the reward and the time of every step and the largest memory; `report` draws the curves
and prints the table. The runs are two processes, so that neither library holds the other's memory. Completions are
sampled, so curves agree only as two seeds of one library do.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAPTER = {"r": 16, "lora_alpha": 32}
ROWS = 512
LAST = 10  # steps whose mean reward is a run's final one


def settings(args: argparse.Namespace, seed: int, library: str) -> dict[str, Any]:
    """Of GRPOConfig, here and in TRL: the names are the same."""
    return {
        "output_dir": str(args.out / f"{library}-{seed}"),
        "num_generations": 8,
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 16,
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def save(args, library: str, seed: int, history: list[dict[str, Any]], seconds: float, peak: int) -> None:
    steps = [record for record in history if "reward" in record]
    figures = {
        "reward": [record["reward"] for record in steps],
        "step_time": [record["step_time"] for record in steps],
        "seconds": seconds,
        "peak_gb": peak / 1e9,
    }
    print(
        library,
        seed,
        f"{statistics.mean(figures['reward'][-LAST:]):.3f} at the end, {seconds:.0f} s",
        flush=True,
    )
    (args.out / f"{library}-{seed}.json").write_text(json.dumps(figures))


def run_jaxtune(args, seed: int) -> None:
    import jax

    from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer
    from jaxtune.tasks import arithmetic

    first = args.out / "first_adapter"
    if not first.exists():
        model, _ = FastLanguageModel.from_pretrained(args.model, max_seq_length=256, load_in_4bit=True)
        FastLanguageModel.get_peft_model(model, **ADAPTER).save_pretrained(first)
    model, _ = FastLanguageModel.from_pretrained(first, max_seq_length=256, load_in_4bit=True)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[arithmetic.correct, arithmetic.short],
        args=GRPOConfig(**settings(args, seed, "jaxtune")),
        train_dataset=arithmetic.make_rows(ROWS),
    )
    began = time.perf_counter()
    trainer.train()
    seconds, stats = time.perf_counter() - began, jax.devices()[0].memory_stats() or {}
    save(args, "jaxtune", seed, trainer.state.log_history, seconds, stats.get("peak_bytes_in_use", 0))


def run_trl(args, seed: int) -> None:
    import datasets
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import GRPOConfig, GRPOTrainer

    from jaxtune.tasks import arithmetic

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": "cuda" if on_gpu else "cpu"},
    )
    model = PeftModel.from_pretrained(base, args.out / "first_adapter", is_trainable=True)
    here: dict[str, Any] = {"bf16": on_gpu, "use_cpu": not on_gpu, "gradient_checkpointing": False}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[arithmetic.correct, arithmetic.short],
        args=GRPOConfig(**settings(args, seed, "trl") | here),
        train_dataset=datasets.Dataset.from_list(arithmetic.make_rows(ROWS)),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    began = time.perf_counter()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    save(args, "trl", seed, trainer.state.log_history, time.perf_counter() - began, peak)


def report(args) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    print(
        f"| library | seed | reward, first step | mean of the last {LAST} | step, median s | whole run, s | peak GB |"
    )
    print("|---|---|---|---|---|---|---|")
    for library, colour in (("jaxtune", "C0"), ("trl", "C1")):
        for n, file in enumerate(sorted(args.out.glob(f"{library}-*.json"))):
            run = json.loads(file.read_text())
            label = library if n == 0 else None
            axis.plot(run["reward"], color=colour, alpha=0.8, linewidth=1.2, label=label)
            print(
                f"| {library} | {file.stem.split('-')[1]} | {run['reward'][0]:.3f} | "
                f"{statistics.mean(run['reward'][-LAST:]):.3f} | {statistics.median(run['step_time'][2:]):.2f} | "
                f"{run['seconds']:.0f} | {run['peak_gb']:.2f} |"
            )
    axis.set(xlabel="step", ylabel="mean reward (at most 1.5)", title="sums, answered by the number alone")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.out / "grpo_comparison.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["jaxtune", "trl", "report"])
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64, help="completions a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "report":
        return report(args)
    run: Callable[[argparse.Namespace, int], None] = run_jaxtune if args.command == "jaxtune" else run_trl
    for seed in args.seeds:
        run(args, seed)


if __name__ == "__main__":
    sys.path.pop(0)  # kernels.py is there, which transformers would take for Hugging Face's package
    main()
