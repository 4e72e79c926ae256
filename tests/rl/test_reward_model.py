"""Reward models, with transformers' sequence classifiers as the judges."""

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tolerances import LOGITS

from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.reward_model import RewardModel
from jaxtune.rl.trainer import GRPOTrainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [[{"role": "user", "content": text}] for text in ("name a colour", "hi", "what is it?", "hi")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("blue", "hello", "x" * 60, "")]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`classifier(family, **fields of config.json)` -> (folder, transformers' model)."""

    def make(family, **changes):
        torch.manual_seed(0)
        config = tiny_models.make_config(family, num_labels=1, **changes)
        judge = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in judge.named_parameters():
                parameter.copy_(("norm" in name) + 0.08 * torch.randn(parameter.shape))
        return tiny_models.save(judge, tmp_path_factory.mktemp(family)), judge

    return make


def trls_rewards(judge, tokenizer, prompts, completions):
    """What GRPOTrainer._calculate_rewards does with a model."""
    if isinstance(prompts[0], str):
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    else:
        texts = [
            tokenizer.apply_chat_template(p + c, tokenize=False)
            for p, c in zip(prompts, completions, strict=True)
        ]
    inputs = tokenizer(
        text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    judge.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return (
            judge(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].numpy()
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equal_to_transformers(family, classifier):
    folder, judge = classifier(family)
    model = RewardModel(folder, batch_size=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = trls_rewards(judge, tokenizer, PROMPTS, COMPLETIONS)
    got = model(PROMPTS, COMPLETIONS, trainer_state=None, answer=[1, 2, 3, 4])
    assert np.std(want) > 0.01
    np.testing.assert_allclose(got, want, atol=LOGITS * np.abs(want).max())
    ends = "<|im_end|>"  # a padding token that texts end with
    model.tokenizer.pad_token = tokenizer.pad_token = ends
    texts = ["a" + ends, "b" + ends + ends, "cd"]
    want = trls_rewards(judge, tokenizer, ["say "] * 3, texts)
    np.testing.assert_allclose(model(["say "] * 3, texts), want, atol=LOGITS * np.abs(want).max())


def test_in_training(classifier, tiny_model_dir, tmp_path):
    """A name among the functions."""
    from jaxtune.fast import FastLanguageModel

    folder, judge = classifier("llama")
    policy, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama", num_hidden_layers=1)), max_seq_length=64, dtype="float32"
    )
    seen = []

    def length(prompts, completions, **_):
        seen.append((prompts, completions))
        return [float(len(text)) for text in completions]

    args = GRPOConfig(
        str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=4,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    policy = FastLanguageModel.get_peft_model(policy, r=4, target_modules=["q_proj"])
    trainer = GRPOTrainer(policy, [str(folder), length], args, [{"prompt": "ab"}, {"prompt": "cd"}])
    assert trainer.reward_func_names == [folder.name, "length"]
    trainer.train()
    record = next(r for r in trainer.state.log_history if "loss" in r)
    want = trls_rewards(judge, transformers.AutoTokenizer.from_pretrained(folder), *seen[0]).mean()
    assert record[f"rewards/{folder.name}/mean"] == pytest.approx(want, abs=1e-4)


def test_what_is_no_reward_model(classifier, tiny_model_dir):
    with pytest.raises(ValueError, match="is no reward model: it has no tensor score"):
        RewardModel(tiny_model_dir("llama", num_hidden_layers=1))
    model = RewardModel(classifier("llama")[0])
    with pytest.raises(ValueError, match="a conversation has 300 tokens, it takes 256"):
        model(["x" * 299], ["y"])
