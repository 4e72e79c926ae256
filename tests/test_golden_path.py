"""The notebooks' golden path: only the import lines differ."""

import pytest
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from jaxtune import (
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    get_chat_template,
    standardize_sharegpt,
    train_on_responses_only,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_golden_path_of_the_notebooks(tiny_model_dir, tmp_path):
    """Unsloth's conversational notebook, cell by cell, after its import lines are changed."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(tiny_model_dir("llama", num_hidden_layers=1)),
        max_seq_length=128,
        dtype=None,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")

    def formatting_prompts_func(examples):
        convos = examples["conversations"]
        texts = [
            tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False) for c in convos
        ]
        return {"text": texts}

    turns = [("human", "Hi?"), ("gpt", "Yes.")]
    rows = [
        {"conversations": [{"from": who, "value": f"{text} {i}"} for who, text in turns]} for i in range(8)
    ]
    dataset = standardize_sharegpt(Dataset.from_list(rows))
    dataset = dataset.map(formatting_prompts_func, batched=True)
    with pytest.warns(UserWarning):  # of what has no meaning here: fp16, bf16, the collator
        trainer = SFTTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=dataset,
            dataset_text_field="text",
            max_seq_length=128,
            data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
            packing=False,
            args=SFTConfig(
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                warmup_steps=5,
                max_steps=3,
                learning_rate=2e-4,
                fp16=False,
                bf16=True,
                logging_steps=1,
                optim="adamw_8bit",
                weight_decay=0.01,
                lr_scheduler_type="linear",
                seed=3407,
                output_dir=str(tmp_path / "outputs"),
                report_to="none",
            ),
        )
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    row = trainer.train_dataset[5]
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\nHi? 5<|im_end|>")
    trained = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(trained).startswith("Yes. 5<|im_end|>")
    trainer_stats = trainer.train()
    assert trainer_stats.metrics["train_runtime"] > 0
    FastLanguageModel.for_inference(model)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], tokenize=True, add_generation_prompt=True, return_dict=True,
        return_tensors="np",
    )  # fmt: skip
    outputs = model.generate(
        **inputs, max_new_tokens=4, use_cache=True, do_sample=True, temperature=1.5, min_p=0.1
    )
    assert outputs.shape[1] <= inputs["input_ids"].shape[1] + 4
    model.save_pretrained(tmp_path / "lora_model")
    tokenizer.save_pretrained(tmp_path / "lora_model")
    assert (tmp_path / "lora_model" / "adapter_model.safetensors").is_file()
    model.save_pretrained_gguf(
        tmp_path / "model", tokenizer, quantization_method=["q4_k_m", "q8_0", "q5_k_m"]
    )
    assert len(list((tmp_path / "model").glob("*.gguf"))) == 3
