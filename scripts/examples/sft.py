"""Supervised fine-tuning, notebook style: chats in, adapter and merged model out.

    python scripts/examples/sft.py [MODEL] [OUTPUT_FOLDER]

MODEL is a hub id, a folder or a .gguf file. With SmolLM2-135M on 2 CPU cores: about 2 minutes and 3 GB.
"""

import sys

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, TextStreamer, train_on_responses_only
from jaxtune.tasks import orders

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
OUTPUT = sys.argv[2] if len(sys.argv) > 2 else "outputs/example"

# 1. The base in 4 bits, and an adapter to train.
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    random_state=3407,
)
model.print_trainable_parameters()

# 2. Rows of chat messages. Any list of dicts, `datasets` object, JSONL/CSV/Parquet file or hub name will do.
chats = [{"messages": row["prompt"] + row["completion"]} for row in orders.make_rows(200)]

# 3. The trainer tokenises here; what is masked afterwards is not trained.
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=chats,
    args=SFTConfig(
        output_dir=OUTPUT,
        max_length=256,
        packing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        optim="adamw_8bit",
        logging_steps=1,
        seed=3407,
    ),
)
trainer = train_on_responses_only(trainer)  # the answers only; markers are read off the chat template

# 4. Train. A killed run goes on with resume_from_checkpoint=True.
result = trainer.train()
print(f"mean loss {result.training_loss:.3f} over {result.global_step} steps")

# 5. Look at it: tokens appear as they are generated.
FastLanguageModel.for_inference(model)
prompt = orders.make_rows(1, held_out=True)[0]["prompt"]
inputs = tokenizer.apply_chat_template(
    prompt, add_generation_prompt=True, return_dict=True, return_tensors="np"
)
model.generate(**inputs, max_new_tokens=40, streamer=TextStreamer(tokenizer, skip_prompt=True))

# 6. Save: the adapter for PEFT, the merged model for transformers.
model.save_pretrained(f"{OUTPUT}/adapter")
model.save_pretrained_merged(f"{OUTPUT}/merged", tokenizer, save_method="merged_16bit")
