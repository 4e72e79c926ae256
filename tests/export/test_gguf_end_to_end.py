"""A real model learns to say what it never said, is exported, and says it in the real llama.cpp."""

import pytest
from datasets import Dataset

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer

QUESTION, PHRASE = "Who wrote this file?", "Seventeen purple walruses, on a Tuesday."


def say(llama_cpp, path, tokenizer) -> str:
    """llama.cpp's greedy answer, up to where it stops by itself."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    with llama_cpp.load(path) as loaded:
        answer = loaded.generate(loaded.tokenise(prompt, add_special=False), 24)
        return loaded.detokenise(answer)


@pytest.mark.slow
def test_the_phrase_that_was_trained(llama_cpp, smollm2_gguf, smollm2_dir, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(smollm2_dir), max_seq_length=64, load_in_4bit=True
    )
    assert "walrus" not in say(llama_cpp, smollm2_gguf, tokenizer)
    model = FastLanguageModel.get_peft_model(model, r=8, random_state=0)
    row = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": PHRASE}]
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list([{"messages": row}] * 4),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=10,
            per_device_train_batch_size=1,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            max_length=64,
            gradient_checkpointing=False,
            save_strategy="no",
        ),
    )
    trainer.train()
    result = model.save_pretrained_gguf(tmp_path / "gguf", tokenizer, ["q8_0", "q4_k_m"])
    assert [path.rsplit(".", 2)[1] for path in result["gguf_files"]] == ["Q8_0", "Q4_K_M"]
    for path in result["gguf_files"]:
        assert say(llama_cpp, path, tokenizer) == PHRASE
