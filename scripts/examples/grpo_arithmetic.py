"""Reinforcement learning without data: a small model learns to answer sums with the number alone.

    python scripts/examples/grpo_arithmetic.py [MODEL] [OUTPUT_FOLDER] [STEPS]

MODEL is a hub id, a folder or a .gguf file. The reward of a completion is 1 for the right number and 0.5 for saying
nothing else. With SmolLM2-135M on 2 CPU cores: about 10 minutes and 4 GB.
"""

import re
import sys

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer
from jaxtune.tasks import arithmetic

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "outputs/grpo_sums"
STEPS = int(sys.argv[3]) if len(sys.argv) > 3 else 30

# 1. The base in 4 bits, and an adapter to train.
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=3407)

# 2. Rows with a prompt; every other column ("answer") is an argument of the reward functions.
rows = arithmetic.make_rows(512)
print(rows[0])


# 3. A reward function gets all completions of a generation and returns a number for each (None: does not apply).
def correct(completions, answer, **_):
    said = [re.findall(r"-?\d+", one[0]["content"]) or [""] for one in completions]
    return [float(numbers[-1] == right) for numbers, right in zip(said, answer)]


def short(completions, **_):
    return [0.5 if re.fullmatch(r"\s*-?\d+\s*", one[0]["content"]) else 0.0 for one in completions]


# 4. Eight completions of each of four prompts a step; a completion is better or worse than the others of its prompt.
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[correct, short],
    train_dataset=rows,
    args=GRPOConfig(
        output_dir=OUTPUT,
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_completion_length=16,
        max_steps=STEPS,
        learning_rate=2e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        logging_steps=1,
        save_strategy="no",
        log_completions=True,  # also OUTPUT/completions/index.html, for a browser
        num_completions_to_print=3,
    ),
)
trainer.train()

# 5. Look at it, on sums that it was not trained on.
rows = arithmetic.make_rows(5, held_out=True)
for row in rows:
    inputs = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="np"
    )
    tokens = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    print(row["prompt"][0]["content"], "->", tokenizer.decode(tokens, skip_special_tokens=True))
model.save_pretrained(f"{OUTPUT}/adapter")
