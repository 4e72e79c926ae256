"""Direct preference optimisation: pairs of a better and a worse answer in, a model that prefers the better ones out.

    python scripts/examples/dpo.py [MODEL] [OUTPUT_FOLDER]

MODEL is a hub id, a folder or a .gguf file. With SmolLM2-135M on 2 CPU cores: about 4 minutes and 2.3 GB.
"""

import sys

from jaxtune import DPOConfig, DPOTrainer, FastLanguageModel
from jaxtune.tasks import orders

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "outputs/dpo"

# 1. The base in 4 bits, and an adapter. The reference is the model as it is now: the same one without the adapter.
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=512, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=3407)


# 2. Preferences: columns prompt, chosen, rejected, as texts or messages. Here the bare JSON is the better answer.
def preferences(num_rows: int, held_out: bool = False) -> list[dict]:
    rows = []
    for row in orders.make_rows(num_rows, held_out=held_out):
        answer = row["completion"][0]["content"]
        chatty = f"Sure, here is the order that you asked for: {answer} Let me know if I can help with anything else!"
        rejected = [{"role": "assistant", "content": chatty}]
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return rows


trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=preferences(200),
    eval_dataset=preferences(16, held_out=True),
    args=DPOConfig(
        output_dir=OUTPUT,
        loss_type=["sigmoid", "sft"],  # the second keeps the better answers likely (as MPO and RPO do)
        loss_weights=[1.0, 0.2],
        beta=0.1,
        max_length=192,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=2e-4,
        warmup_steps=2,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=20,
        logging_steps=5,
        seed=3407,
    ),
)

# 3. Train. rewards/accuracies is the share of pairs whose better answer gained more than the worse one.
result = trainer.train()
print(f"mean loss {result.training_loss:.3f} over {result.global_step} steps")
for record in trainer.state.log_history:
    if "eval_loss" in record:
        margin, accuracy = record["eval_rewards/margins"], record["eval_rewards/accuracies"]
        print(f"step {record['step']}: held-out margin {margin:+.2f}, accuracy {accuracy:.0%}")

# 4. Look at it, and save the adapter for PEFT.
FastLanguageModel.for_inference(model)
prompt = orders.make_rows(1, held_out=True)[0]["prompt"]
inputs = tokenizer.apply_chat_template(
    prompt, add_generation_prompt=True, return_dict=True, return_tensors="np"
)
written = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
model.save_pretrained(f"{OUTPUT}/adapter")
