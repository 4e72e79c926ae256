"""Unsloth's QLoRA step on the weights' shape of step.py, to stand beside it: tokens a second and memory.

    python scripts/bench/unsloth_step.py --batch 2x2048 4x2048 --checkpointing off
    python scripts/bench/unsloth_step.py --batch 4x2048 1x131072 --checkpointing unsloth --steps 2

Needs Unsloth, its PyTorch and a transformers that it works with, not jaxtune.
A checkpoint of random bfloat16 weights (16 GB) is written to --folder the first time. LoRA of rank 16 on all seven
projections, 8-bit AdamW, loss over every token; `unsloth` is its default (checkpointing with inputs offloaded to the
host), `off` keeps every activation.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", default=["4x2048"], help="rows x tokens")
    parser.add_argument("--checkpointing", choices=("unsloth", "off"), default="unsloth")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", default="llama-8b-random", help="where the checkpoint is, or is made")
    return parser.parse_args()


def check_transformers() -> None:
    """Unsloth 2026.10.9 beside a later transformers than it names loads and trains, and checkpoints nothing."""
    here = metadata.version("transformers")
    for wanted in map(Requirement, metadata.requires("unsloth") or []):
        if wanted.name == "transformers" and wanted.marker is None and here not in wanted.specifier:
            raise SystemExit(
                f"expected a transformers that Unsloth works with ({wanted.specifier}), found {here}: install one"
            )


def make_checkpoint(folder: Path) -> None:
    """A folder that from_pretrained reads: random weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, torch_dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()


def load(args: argparse.Namespace):
    import torch
    from unsloth import FastLanguageModel  # isort: skip
    from bitsandbytes.optim import AdamW8bit

    model, _ = FastLanguageModel.from_pretrained(
        args.folder, max_seq_length=131072, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth" if args.checkpointing == "unsloth" else False, random_state=3407,
    )  # fmt: skip
    model.train()
    return model, AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)


def measure(model, optimizer, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """Milliseconds of `steps` steps after warming up, and the largest memory allocated and reserved in GB."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(4, 128000, (rows, tokens), device="cuda")
    times = []
    for _ in range(steps + min(2, steps // 2 + 1)):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    timed = times[-steps:]
    median = statistics.median(timed)
    return {
        "tokens_per_second": rows * tokens / median * 1e3,
        "median_ms": median, "low_ms": min(timed), "high_ms": max(timed), "loss": loss.item(),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }  # fmt: skip


def main() -> None:
    args = arguments()
    check_transformers()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not (Path(args.folder) / "config.json").exists():
        # In a process of its own: Unsloth wants to be imported before transformers.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(Path(args.folder),)
        )
        maker.start()
        maker.join()
    model, optimizer = load(args)
    import torch

    for name in args.batch:
        rows, tokens = map(int, name.split("x"))
        try:
            result = measure(model, optimizer, rows, tokens, args.steps)
        except torch.OutOfMemoryError as error:
            print(
                f"{name:>9s} {args.checkpointing:8s} does not fit: {str(error).splitlines()[0][:100]}",
                flush=True,
            )
            model.zero_grad(set_to_none=True)
            continue
        print(
            f"{name:>9s} {args.checkpointing:8s} {json.dumps({k: round(v, 3) for k, v in result.items()})}",
            flush=True,
        )


if __name__ == "__main__":
    sys.path.pop(0)  # kernels.py is there, which transformers would take for Hugging Face's package
    main()
