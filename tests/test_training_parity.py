"""A LoRA run in jaxtune against transformers + PEFT + torch's AdamW: same batches, same first adapter, float32."""

import jax
import numpy as np
import peft
import pytest
import torch
from tolerances import LOSS, WEIGHTS
from transformers import AutoModelForCausalLM

from jaxtune import lora
from jaxtune.config import SFTConfig
from jaxtune.fast import FastLanguageModel
from jaxtune.optim import make_optimizer
from jaxtune.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, ROWS, TOKENS = 20, 4, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(vocab: int):
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        ids = rng.integers(3, vocab, (ROWS, TOKENS)).astype(np.int32)
        labels = np.where(rng.random(ids.shape) < 0.6, ids, -100).astype(np.int32)
        yield ids, labels


def judge_model(folder, **options):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # B = 0 would hide errors in A's gradient at the first steps
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def peft_tensors(judge):
    return {k: v.detach().numpy().copy() for k, v in peft.get_peft_model_state_dict(judge).items()}


def torch_run(judge, data, args):
    optimizer = torch.optim.AdamW(
        [p for p in judge.parameters() if p.requires_grad],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    rate = lambda n: min(1, n / 4) * max(0, 1 - max(0, n - 4) / (STEPS - 4))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, norms = [], []
    for ids, labels in data:
        logits = judge(torch.tensor(ids).long()).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[:, 1:]).long().flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(judge.parameters(), args.max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms


def jax_run(model, data, args, accumulation: int):
    optimizer = make_optimizer(args, STEPS, model.trainable)
    step = make_train_step(model, optimizer, max_grad_norm=args.max_grad_norm, loss_chunk=32)
    trainable, losses, norms = jax.tree.map(lambda x: x.copy(), model.trainable), [], []
    state = optimizer.init(trainable)
    for ids, labels in data:
        batch = {
            "input_ids": ids,
            "labels": labels,
            "positions": np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)),
            "segment_ids": np.ones_like(ids),
        }
        batch = {k: v.reshape(accumulation, ROWS // accumulation, TOKENS) for k, v in batch.items()}
        trainable, state, metrics = step(trainable, state, model.base, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    model.trainable = trainable
    assert step._cache_size() == 1
    return losses, norms


CASES = {
    "all projections": ({"target_modules": TARGETS}, "llama", 1),
    "accumulated": ({"target_modules": TARGETS}, "llama", 2),
    "qwen2, rslora": ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "qwen2", 1),
    "one layer": ({"target_modules": TARGETS, "layers_to_transform": [1]}, "qwen3", 1),
    "dora": ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, "llama", 1),
    "gemma2": ({"target_modules": TARGETS}, "gemma2", 1),
    "gemma3": ({"target_modules": TARGETS}, "gemma3", 1),
    "embedding and head": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "llama",
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(case, tiny_model_dir):
    options, family, accumulation = CASES[case]
    folder = tiny_model_dir(family)
    judge = judge_model(folder, **options)
    model, _ = FastLanguageModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, **options)
    model.trainable = lora.adapter_leaves(model, peft_tensors(judge))
    args = SFTConfig(learning_rate=2e-3, weight_decay=0.01, warmup_steps=4, max_grad_norm=0.5)
    data = list(batches(model.config.vocab_size))
    want, want_norms = torch_run(judge, data, args)
    got, got_norms = jax_run(model, data, args, accumulation)
    np.testing.assert_allclose(got, want, rtol=LOSS)
    np.testing.assert_allclose(got_norms, want_norms, rtol=1e2 * LOSS)
    ours, theirs = lora.adapter_tensors(model), peft_tensors(judge)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= WEIGHTS * np.abs(value).max(), name
