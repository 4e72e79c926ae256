"""GRPO on GSM8K: school mathematics with a checked answer.

    python scripts/examples/grpo_gsm8k.py [MODEL] [DATA] [OUTPUT_FOLDER] [STEPS]

MODEL is a hub id or a folder. DATA is a .jsonl file with the columns question and answer, or a hub name; GSM8K from the
hub by default. Made for one GPU of 24 GB or more; the memory that a step takes is printed before the first.
"""

import re
import sys

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer
from jaxtune.data import load_dataset

MODEL = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct"
DATA = sys.argv[2] if len(sys.argv) > 2 else "openai/gsm8k"
OUTPUT = sys.argv[3] if len(sys.argv) > 3 else "outputs/grpo_gsm8k"
STEPS = int(sys.argv[4]) if len(sys.argv) > 4 else 200
SYSTEM = "Think step by step, then give the final answer as a number after ####."
ANSWER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def number(text):
    """The number after ####, or None."""
    found = ANSWER.search(text)
    return found and float(found[1].replace(",", ""))


def correct(completions, answer, **_):
    """1 where the number is the solution's."""
    return [float(number(one[0]["content"]) == number(right)) for one, right in zip(completions, answer)]


def shows_answer(completions, **_):
    """0.1 where there is an answer at all."""
    return [0.1 * (number(one[0]["content"]) is not None) for one in completions]


model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32, random_state=3407)

rows = load_dataset(DATA, subset=None if DATA.endswith(".jsonl") else "main")
rows = rows.map(
    lambda row: {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    }
)

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[correct, shows_answer],
    train_dataset=rows,
    args=GRPOConfig(
        output_dir=OUTPUT,
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=8,
        max_completion_length=512,
        max_steps=STEPS,
        learning_rate=3e-5,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        beta=0.001,
        optim="adamw_8bit",
        logging_steps=1,
        save_steps=50,
        log_completions=True,
        num_completions_to_print=2,
    ),
)
trainer.train()  # resume_from_checkpoint=True goes on bit for bit, also in the middle of a generation
model.save_pretrained(f"{OUTPUT}/adapter")
