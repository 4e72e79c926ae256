"""DPOTrainer end to end against TRL's own: the same pairs in the same order, float32, three optimizer steps."""

import datasets
import numpy as np
import peft
import pytest
import torch
import trl
from tolerances import LOSS, WEIGHTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtune import lora
from jaxtune.fast import FastLanguageModel
from jaxtune.rl.dpo import DPOTrainer
from jaxtune.rl.dpo_config import DPOConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 3
TARGETS = ["q_proj", "v_proj", "down_proj"]
CLOCK = {"learning_rate", "tokens_per_second", "peak_memory_gib", "epoch", "step", "eval_runtime"}
TEXTS = [
    {
        "prompt": f"row {i}: ",
        "chosen": "abcdefgh"[: 1 + i % 7] * (1 + i % 2),
        "rejected": "no " * (1 + (3 * i) % 5),
    }
    for i in range(7)
]
CHATS = [
    {
        "chosen": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["chosen"]},
        ],
        "rejected": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["rejected"]},
        ],
    }
    for row in TEXTS
]
COMMON = {
    "max_steps": STEPS, "learning_rate": 2e-3, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential", "max_length": 32,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 3,
    "adam_epsilon": 1e-4,  # with a smaller one, gradients that are nothing but rounding make whole steps
}  # fmt: skip
CASES = {
    "weighted, adapter off": (TEXTS, {"loss_type": ["sigmoid", "sigmoid_norm"], "use_weighting": True}),
    # The window after the first one is short, and its last micro-batch too: 7 pairs are 4 micro-batches.
    "accumulated, starting adapter": (
        CHATS,
        {"gradient_accumulation_steps": 3, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3]},
    ),
    "precomputed": (
        TEXTS,
        {
            "precompute_ref_log_probs": True,
            "loss_type": "robust",
            "label_smoothing": 0.1,
            "ld_alpha": 0.5,
            "precompute_ref_batch_size": 3,
            "logging_steps": 3,
        },
    ),
}
FRESH = {"weighted, adapter off", "precomputed"}  # cases that start from a new adapter


def judge_model(folder, fresh):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    if not fresh:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def tensors(judge):
    state = peft.get_peft_model_state_dict(judge)
    return {k: v.detach().numpy().copy() for k, v in state.items()}


def trl_run(judge, folder, rows, settings, output_dir):
    args = trl.DPOConfig(str(output_dir), **settings, bf16=False, use_cpu=True, gradient_checkpointing=False)
    data = datasets.Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trl.DPOTrainer(
        judge, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_three_steps(case, tiny_model_dir, tmp_path):
    rows, changes = CASES[case]
    settings = COMMON | changes
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    judge = judge_model(folder, case in FRESH)
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=64
    )
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS
    )
    model.trainable = lora.adapter_leaves(model, tensors(judge))
    args = DPOConfig(str(tmp_path / "ours"), **settings)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    reference = trl_run(judge, folder, rows, settings, tmp_path / "theirs")
    for kind in ("loss", "eval_loss"):
        theirs = [r for r in reference.state.log_history if kind in r]
        ours = [r for r in trainer.state.log_history if kind in r]
        assert len(ours) == len(theirs) > 0
        for got, want in zip(ours, theirs):
            names = {name for name in want if not name.endswith("per_second")} - CLOCK - {"eval_num_tokens"}
            assert got.keys() - CLOCK == names
            for name in sorted(names):
                assert got[name] == pytest.approx(want[name], rel=3 * LOSS, abs=3e-6), (case, name)
    for name, value in tensors(judge).items():
        got = lora.adapter_tensors(model)[name]
        assert np.abs(got - value).max() <= WEIGHTS * np.abs(value).max(), name
