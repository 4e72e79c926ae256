"""The cells of a GRPO notebook written for Unsloth and vLLM, with its import lines changed."""

import re

import numpy as np
import pytest

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer, SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")
LETTERS = re.compile(r"[a-z]")


def test_the_cells_run(tiny_model_dir, tmp_path):
    max_seq_length = 128
    with pytest.warns(UserWarning, match="fast_inference"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=str(tiny_model_dir("llama", num_hidden_layers=1)),
            max_seq_length=max_seq_length,
            load_in_4bit=True,
            fast_inference=True,  # Enable vLLM fast inference
            max_lora_rank=8,
            gpu_memory_utilization=0.9,
            dtype="float32",
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    system = {"role": "system", "content": "Be brief."}
    dataset = [
        {"prompt": [system, {"role": "user", "content": f"What is {n}?"}], "answer": str(n)} for n in range(8)
    ]

    def letters_reward(prompts, completions, answer, **kwargs):
        responses = [completion[0]["content"] for completion in completions]
        return [len(LETTERS.findall(response)) / 10 for response in responses]

    vllm_sampling_params = SamplingParams(
        min_p=0.01,
        top_p=1.0,
        top_k=-1,
        seed=3407,
        stop=[tokenizer.eos_token],
        include_stop_str_in_output=True,
    )
    max_prompt_length = 64
    with pytest.warns(UserWarning, match="raised from 1 to num_generations=4"):
        training_args = GRPOConfig(
            vllm_sampling_params=vllm_sampling_params,
            temperature=1.0,
            learning_rate=1e-2,
            weight_decay=0.001,
            warmup_ratio=0.1,
            lr_scheduler_type="linear",
            optim="adamw_8bit",
            logging_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            num_generations=4,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_seq_length - max_prompt_length,
            max_steps=3,
            save_steps=100,
            report_to="none",
            output_dir=str(tmp_path / "outputs"),
        )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[letters_reward],
        args=training_args,
        train_dataset=dataset,
    )
    trainer.train()
    assert trainer.state.global_step == 3

    text = tokenizer.apply_chat_template(dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=12)
    model.save_lora(str(tmp_path / "grpo_saved_lora"))
    request = model.load_lora(str(tmp_path / "grpo_saved_lora"))
    plain = model.fast_generate([text], sampling_params=sampling_params, lora_request=None)[0].outputs[0]
    tuned = model.fast_generate(text, sampling_params=sampling_params, lora_request=request)[0].outputs[0]
    assert isinstance(tuned.text, str) and 0 < len(tuned.token_ids) <= 12 and tuned.cumulative_logprob < 0
    assert plain.token_ids != tuned.token_ids or plain.cumulative_logprob != tuned.cumulative_logprob
    greedy = SamplingParams(temperature=0, max_tokens=6, n=2)
    same = model.fast_generate(text, greedy, request)[0].outputs
    ids = tokenizer(text, return_tensors="np")
    want = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert same[0].token_ids == same[1].token_ids == np.asarray(want)[: len(same[0].token_ids)].tolist()
