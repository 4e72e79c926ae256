"""GRPOTrainer end to end against TRL's own: the same rollouts through rollout_func, float32, five optimizer steps."""

import dataclasses
import types

import numpy as np
import peft
import pytest
import torch
import trl
from tolerances import LOSS, WEIGHTS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import grpo_trainer

from jaxtune import lora
from jaxtune.fast import FastLanguageModel
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import make_plan
from jaxtune.rl.trainer import GRPOTrainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS, EOS = 5, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS = [
    {"prompt": text, "bonus": float(i)} for i, text in enumerate(["ab", "c", "defghi", "jk l", "m", "no"])
]
CLOCK = {"step_time", "learning_rate", "tokens_per_second", "peak_memory_gib", "epoch", "step"}
COMMON = {
    "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 12, "max_steps": STEPS,
    "learning_rate": 2e-3, "max_grad_norm": 0.5, "logging_steps": 1, "shuffle_dataset": False, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "temperature": 0.9,
}  # fmt: skip

CASES = {
    "dapo": {},
    "accumulated": {"gradient_accumulation_steps": 2, "loss_type": "bnpo", "scale_rewards": "batch"},
    "old policy, adapter off": {"steps_per_generation": 2, "loss_type": "grpo", "beta": 0.04},
    "iterations, starting adapter": {"num_iterations": 2, "loss_type": "dr_grpo", "beta": 0.04, "delta": 1.1},
    "two generations a step": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 1, "loss_type": "cispo", "epsilon_high": 1.05,
        "mask_truncated_completions": True,
    },
    "generations across steps and a short epoch": {
        "gradient_accumulation_steps": 2, "steps_per_generation": 3, "loss_type": "grpo",
        "importance_sampling_level": "sequence", "entropy_coef": 0.01, "use_adaptive_entropy": True,
        "entropy_target": 5.75,
    },
    "sampler corrected": {
        "importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.2, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.2,
    },
}  # fmt: skip
FRESH = {"old policy, adapter off"}  # cases that start from a new adapter


class Rollouts:
    """rollout_func: the same completions in the same calls, whoever asks."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, prompts, trainer):
        rng = np.random.default_rng(self.calls)
        self.calls += 1
        completions, log_probs = [], []
        for _ in prompts:
            ids = rng.integers(3, 259, rng.integers(1, 12)).tolist()
            completions.append([*ids, EOS] if rng.random() < 0.6 else ids)
            log_probs.append((-5.5 + 0.3 * rng.standard_normal(len(completions[-1]))).tolist())
        prompt_ids = self.tokenizer(text=list(prompts))["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": log_probs}


def even(completion_ids, **_):
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]


def bonus(completions, bonus, log_metric, **_):
    log_metric("seen", float(len(completions)))
    return [
        None if i % 3 == 0 else value + len(text) for i, (text, value) in enumerate(zip(completions, bonus))
    ]


def judge_model(folder, fresh):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    if not fresh:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def tensors(judge):
    return {k: v.detach().numpy().copy() for k, v in peft.get_peft_model_state_dict(judge).items()}


def trl_run(judge, folder, settings, output_dir, monkeypatch):
    """TRL's trainer, its shuffles replaced by those of our plan, its vLLM by the rollouts' log-probabilities."""
    settings = dict(settings)
    corrected = settings.pop("importance_sampling_correction", False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = trl.GRPOConfig(str(output_dir), **settings, bf16=False, use_cpu=True, gradient_checkpointing=False)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = trl.GRPOTrainer(
        judge,
        [even, bonus],
        args,
        datasets_of(ROWS),
        processing_class=tokenizer,
        rollout_func=Rollouts(tokenizer),
    )
    plan, count = make_plan(GRPOConfig(**settings), len(ROWS)), iter(range(100))

    def shuffle(batch):
        order = torch.tensor(plan.row_order(next(count)))
        return {name: value[order] if getattr(value, "ndim", 0) else value for name, value in batch.items()}

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", shuffle)
    if corrected:
        trainer.use_vllm, trainer._last_loaded_step = True, 0
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
    trainer.train()
    return trainer.state.log_history


def datasets_of(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("case", CASES)
def test_five_steps(case, tiny_model_dir, tmp_path, monkeypatch):
    settings = COMMON | CASES[case]
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    judge = judge_model(folder, case in FRESH)
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=64
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=TARGETS)
    model.trainable = lora.adapter_leaves(model, tensors(judge))
    args = GRPOConfig(str(tmp_path / "ours"), **settings)
    trainer = GRPOTrainer(
        model, [even, bonus], args, ROWS, processing_class=tokenizer, rollout_func=Rollouts(tokenizer)
    )
    trainer.train()
    theirs = [r for r in trl_run(judge, folder, settings, tmp_path / "theirs", monkeypatch) if "loss" in r]
    ours = [r for r in trainer.state.log_history if "loss" in r]
    assert len(ours) == len(theirs) == STEPS
    for step, (got, want) in enumerate(zip(ours, theirs)):
        # num_tokens stands in each of our records, in theirs where completions were made since the last one
        assert got.keys() - CLOCK - {"num_tokens"} == want.keys() - CLOCK - {"num_tokens"}
        for name in sorted(want.keys() - CLOCK):
            assert got[name] == pytest.approx(want[name], rel=1e2 * LOSS, abs=1e-6, nan_ok=True), (step, name)
    for name, value in tensors(judge).items():
        got = lora.adapter_tensors(model)[name]
        assert np.abs(got - value).max() <= WEIGHTS * np.abs(value).max(), name


def test_a_reference_that_moves(tiny_model_dir, tmp_path, monkeypatch):
    """All weights trained, the reference mixed with them every second step; and resumed between two mixtures."""
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3, "beta": 0.2}
    settings = COMMON | moves
    folder = tiny_model_dir("llama", num_hidden_layers=1)
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def make(name, **more):
        model, tokenizer = FastLanguageModel.from_pretrained(
            folder, load_in_4bit=False, dtype="float32", max_seq_length=64, full_finetuning=True
        )
        args = GRPOConfig(str(tmp_path / name), **settings | more)
        return GRPOTrainer(
            model, [even, bonus], args, ROWS, processing_class=tokenizer, rollout_func=Rollouts(tokenizer)
        )

    trainer = make("ours", save_strategy="steps", save_steps=3)
    trainer.train()
    theirs = [r for r in trl_run(judge, folder, settings, tmp_path / "theirs", monkeypatch) if "loss" in r]
    ours = [r for r in trainer.state.log_history if "loss" in r]
    assert [got["kl"] for got in ours] == pytest.approx([want["kl"] for want in theirs], rel=1e-3, abs=1e-7)
    for got, want in zip(ours, theirs, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e2 * LOSS, abs=1e-6)

    resumed = make("ours", save_strategy="steps", save_steps=3)
    resumed._collector.rollout._function.calls = 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    again = [r for r in resumed.state.log_history if "loss" in r]
    assert [r["kl"] for r in again] == [r["kl"] for r in ours]


def test_cases_reach_what_they_are_for():
    configs = [GRPOConfig(**COMMON | case) for case in CASES.values()]
    assert {c.loss_type for c in configs} == {"dapo", "bnpo", "grpo", "dr_grpo", "cispo"}
    assert {c.needs_old_log_probs for c in configs} == {True, False}
    assert dataclasses.replace(configs[5]).generation_steps == 3
