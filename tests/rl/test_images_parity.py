"""GRPOTrainer and DPOTrainer on images end to end against TRL's own: the same data, float32, three optimizer steps.

The rows are conversations with none, one or two images of several sizes, and GRPO's rollouts are the same. Images go
through transformers' image processors of the backend "pil".
"""

import datasets
import numpy as np
import peft
import pytest
import tiny_siglip
import tiny_vision
import torch
import trl
from tolerances import LOSS, WEIGHTS
from transformers import AutoModelForImageTextToText
from trl.trainer import grpo_trainer

from jaxtune import lora
from jaxtune.fast import FastVisionModel
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import make_plan
from jaxtune.rl.dpo import DPOTrainer
from jaxtune.rl.dpo_config import DPOConfig
from jaxtune.rl.trainer import GRPOTrainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS, EOS = 3, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
CLOCK = {"step_time", "learning_rate", "tokens_per_second", "peak_memory_gib", "epoch", "step", "num_tokens"}
COMMON = {
    "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 12, "max_steps": STEPS,
    "learning_rate": 2e-3, "max_grad_norm": 0.5, "logging_steps": 1, "shuffle_dataset": False, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "temperature": 0.9,
    "adam_epsilon": 1e-4,  # with a smaller one, gradients that are nothing but rounding make whole steps
}  # fmt: skip
CASES = {
    "qwen2_5_vl": {"steps_per_generation": 2, "loss_type": "grpo", "beta": 0.04},
    "gemma3": {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"},
    "smolvlm": {"gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.04},
}
SHAPES = [(60, 60), (90, 60), (60, 120), (120, 40)]


def make_rows(family):
    """TRL's collation of SmolVLM wants as many images in each row."""

    def row(i):
        count = 1 if family == "smolvlm" else [1, 2, 1, 0, 1, 2][i]
        pictures = [tiny_vision.picture(*SHAPES[(i + k) % 4], 10 * i + k) for k in range(count)]
        return {
            "prompt": [{"role": "user", "content": "what" + "?" * i}],
            "images": pictures,
            "bonus": float(i),
        }

    return [row(i) for i in range(6)]


class Rollouts:
    """rollout_func: the same completions in the same calls, whoever asks."""

    def __init__(self, processor):
        self.processor, self.calls = processor, 0

    def __call__(self, prompts, trainer):
        rng = np.random.default_rng(self.calls)
        self.calls += 1
        completions = []
        for _ in prompts:
            ids = rng.integers(3, 259, rng.integers(1, 12)).tolist()
            completions.append([*ids, EOS] if rng.random() < 0.6 else ids)
        found = [
            self.processor.apply_chat_template(
                one, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            for one in prompts
        ]
        prompt_ids = [np.asarray(one["input_ids"]).reshape(-1).tolist() for one in found]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def width(prompts, images, bonus, **_):
    """Of the images, as the columns have them and as the prompts have them."""
    for prompt, pictures in zip(prompts, images, strict=True):
        held = [part["image"] for part in prompt[0]["content"] if part["type"] == "image"]
        assert [one.size for one in held] == [one.size for one in pictures or []]
    return [sum(one.width for one in pictures or []) / 100 + more for pictures, more in zip(images, bonus)]


def odd(completion_ids, **_):
    return [float(sum(ids) % 3) for ids in completion_ids]


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """(name, folder of the tiny model)."""
    name, tiny = request.param, tiny_vision if request.param == "qwen2_5_vl" else tiny_siglip
    changes = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 1}}
    if name == "qwen2_5_vl":
        changes["vision_config"] = {"depth": 2, "fullatt_block_indexes": [1]}
    if name == "gemma3":
        changes["text_config"]["layer_types"] = ["sliding_attention", "full_attention"]
    model = tiny.make_model(tiny.make_config(name, **changes))
    return name, tiny.save(model, tmp_path_factory.mktemp(name))


def judge_model(folder, fresh):
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    if not fresh:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def tensors(judge):
    return {k: v.detach().numpy().copy() for k, v in peft.get_peft_model_state_dict(judge).items()}


def trl_run(judge, processor, rows, settings, output_dir, monkeypatch):
    """TRL's trainer, its shuffles replaced by those of our plan."""
    args = trl.GRPOConfig(str(output_dir), **settings, bf16=False, use_cpu=True, gradient_checkpointing=False)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    processor.tokenizer.padding_side = "left"
    data = datasets.Dataset.from_list(rows)
    trainer = trl.GRPOTrainer(
        judge, [width, odd], args, data, processing_class=processor, rollout_func=Rollouts(processor)
    )
    plan, count = make_plan(GRPOConfig(**settings), len(rows)), iter(range(100))

    def shuffle(batch):
        order = plan.row_order(next(count))
        return {name: shuffled(value, order) for name, value in batch.items()}

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", shuffle)
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def shuffled(value, order):
    if isinstance(value, torch.Tensor):
        return value[torch.tensor(order)] if value.ndim else value
    return None if value is None else [value[i] for i in order]


def test_three_steps_of_grpo(family, tmp_path, monkeypatch):
    name, folder = family
    settings, rows = COMMON | CASES[name], make_rows(name)
    judge = judge_model(folder, fresh=name == "qwen2_5_vl")
    model, processor = own_model(folder, judge)
    args = GRPOConfig(str(tmp_path / "ours"), **settings)
    trainer = GRPOTrainer(
        model, [width, odd], args, rows, processing_class=processor, rollout_func=Rollouts(processor)
    )
    trainer.train()
    theirs = trl_run(judge, processor, rows, settings, tmp_path / "theirs", monkeypatch)
    ours = [r for r in trainer.state.log_history if "loss" in r]
    compare(ours, theirs, 1e2 * LOSS)
    compare_weights(model, judge)


def own_model(folder, judge):
    """Ours with the judge's adapter, and its processor."""
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=256
    )
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=TARGETS)
    model.trainable = lora.adapter_leaves(model, tensors(judge))
    return model, processor


def compare(ours, theirs, relative):
    """Records of the same steps."""
    assert len(ours) == len(theirs) == STEPS
    for step, (got, want) in enumerate(zip(ours, theirs)):
        assert got.keys() - CLOCK == want.keys() - CLOCK
        for key in sorted(want.keys() - CLOCK):
            assert got[key] == pytest.approx(want[key], rel=relative, abs=3e-6, nan_ok=True), (step, key)


def compare_weights(model, judge):
    for key, value in tensors(judge).items():
        got = lora.adapter_tensors(model)[key]
        assert np.abs(got - value).max() <= WEIGHTS * np.abs(value).max(), key


PAIRS = {key: value for key, value in COMMON.items() if key not in ("num_generations", "max_completion_length",
         "shuffle_dataset", "temperature", "per_device_train_batch_size")} | {
    "per_device_train_batch_size": 3, "train_sampling_strategy": "sequential", "max_length": 256,
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"], indirect=True)
def test_three_steps_of_dpo(family, tmp_path):
    """SmolVLM's reference is computed before training, which TRL does not do with images."""
    name, folder = family
    settings, rows = PAIRS, []
    for i, row in enumerate(make_rows(name)):
        chosen, rejected = "abcdefgh"[: 1 + i] * (1 + i % 2), "no " * (1 + (3 * i) % 5)
        said = {"chosen": chosen, "rejected": rejected}
        answers = {side: [{"role": "assistant", "content": text}] for side, text in said.items()}
        rows.append({"prompt": row["prompt"], "images": row["images"], **answers})
    judge = judge_model(folder, fresh=name == "qwen2_5_vl")
    model, processor = own_model(folder, judge)
    args = DPOConfig(
        str(tmp_path / "ours"),
        **settings,
        dataloader_num_workers=1,
        precompute_ref_log_probs=name == "smolvlm",
    )
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=processor)
    trainer.train()
    args = trl.DPOConfig(
        str(tmp_path / "theirs"), **settings, bf16=False, use_cpu=True, gradient_checkpointing=False
    )
    data = datasets.Dataset.from_list(rows)
    theirs = trl.DPOTrainer(judge, args=args, train_dataset=data, processing_class=processor)
    theirs.train()
    histories = [[r for r in one.state.log_history if "loss" in r] for one in (trainer, theirs)]
    for (
        history
    ) in histories:  # at first the policy is its reference: which reward is larger is rounding alone
        del history[0]["rewards/accuracies"]
    compare(*histories, 3 * LOSS)
    compare_weights(model, judge)
