"""Warm start: fine-tune on a few rows that show the form of an answer, then reinforce what is right.

    python scripts/examples/warm_start_grpo.py [MODEL] [DATA] [OUTPUT_FOLDER] [SFT_STEPS] [GRPO_STEPS]

A model that never answers in the form that a reward looks for gets no reward, and learns nothing from it.
MODEL is a hub id or a folder. DATA is a file or hub name with GSM8K's columns, or "sums" (the default): no data needed.
With SmolLM2-135M and sums on 2 CPU cores: 4 GB; 12 steps of each took about 20 minutes on a busy machine.
"""

import random
import sys

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, train_on_responses_only
from jaxtune.data import load_dataset
from jaxtune.evaluate import EvaluateConfig, evaluate
from jaxtune.evaluate.checkers import strict_answer

DEFAULTS = ["HuggingFaceTB/SmolLM2-135M-Instruct", "sums", "outputs/warm_start", "12", "30"]
MODEL, DATA, OUTPUT, SFT_STEPS, GRPO_STEPS = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]
TOKENS = 24 if DATA == "sums" else 400  # of an answer
SHOWN, HELD_OUT = 64, 64  # rows to show the form with; rows to evaluate on


def sums(count):
    pairs = random.Random(3407).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], count)
    return [
        {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs
    ]


def ask(row):
    return [{"role": "user", "content": row["question"]}]


def correct(completions, answer, **_):
    """1 where the number after "#### " is the solution's."""
    return [float(strict_answer(c[0]["content"]) == strict_answer(a)) for c, a in zip(completions, answer)]


rows = sums(1000) if DATA == "sums" else load_dataset(DATA, subset=None if "." in DATA else "main").to_list()
held_out, shown, rest = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + SHOWN], rows[HELD_OUT + SHOWN :]

model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=3407)


def look(when):
    found = evaluate(model, held_out, EvaluateConfig(instruction="", max_new_tokens=TOKENS))
    print(f"{when}: {found.accuracy:.1%} right, {found.shares['answered']:.1%} with an answer in the form")


look("at first")

# 1. The form, from a few rows: the answers are trained, the questions are not.
chats = [{"messages": [*ask(row), {"role": "assistant", "content": row["answer"]}]} for row in shown]
sft = SFTConfig(
    output_dir=f"{OUTPUT}/sft", max_steps=int(SFT_STEPS), per_device_train_batch_size=4, learning_rate=5e-4,
    lr_scheduler_type="linear", warmup_steps=2, max_length=512, logging_steps=2, save_strategy="no",
)  # fmt: skip
train_on_responses_only(SFTTrainer(model=model, train_dataset=chats, args=sft)).train()
look("after SFT")

# 2. What is right, from the reward; the same adapter goes on.
grpo = GRPOConfig(
    output_dir=f"{OUTPUT}/grpo", max_steps=int(GRPO_STEPS), num_generations=8, per_device_train_batch_size=16,
    gradient_accumulation_steps=2, max_completion_length=TOKENS, learning_rate=1e-4, warmup_steps=4,
    lr_scheduler_type="constant_with_warmup", logging_steps=1, save_strategy="no", log_completions=True,
    num_completions_to_print=2,
)  # fmt: skip
prompts = [{"prompt": ask(row), "answer": row["answer"]} for row in rest]
GRPOTrainer(model=model, reward_funcs=[correct], train_dataset=prompts, args=grpo).train()
look("after GRPO")
model.save_pretrained(f"{OUTPUT}/adapter")
