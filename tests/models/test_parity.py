"""Every family and RoPE type against transformers, float32: logits and greedy generation."""

import numpy as np
import pytest
import tiny_models
import torch
from tolerances import LOGITS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxtune import models
from jaxtune.fast import FastLanguageModel
from jaxtune.models.names import join

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILIES = list(tiny_models.FAMILIES)
ROPES = list(tiny_models.ROPES)


def load_both(folder):
    model, _ = FastLanguageModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    judge = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, judge


def relative_error(got, want) -> float:
    want = want.detach().numpy()
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def check_logits(model, judge, length: int):
    rng = np.random.default_rng(1)
    ids = rng.integers(3, judge.config.vocab_size, (2, length))
    mask = np.ones_like(ids)
    mask[1, : length // 3] = 0  # the second row is padded on the left
    with torch.no_grad():
        want = judge(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    got = np.asarray(model.logits(ids, mask))
    assert relative_error(got[0], want[0]) <= LOGITS
    assert relative_error(got[1][length // 3 :], want[1][length // 3 :]) <= LOGITS


def check_greedy(model, judge, prompt_length: int, new: int = 64, padding: int = 5):
    rng = np.random.default_rng(2)
    ids = rng.integers(3, judge.config.vocab_size, (2, prompt_length))
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    with torch.no_grad():
        want = judge.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    got = model.generate(ids, mask, max_new_tokens=new, eos_token_id=[], pad_token_id=0)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tiny_model_dir):
    model, judge = load_both(tiny_model_dir(family))
    check_logits(model, judge, 48)
    check_greedy(model, judge, 20)


@pytest.mark.parametrize("rope", ROPES[1:])
def test_rope(rope, tiny_model_dir):
    model, judge = load_both(tiny_model_dir("llama", rope))
    check_logits(model, judge, 120)
    check_greedy(model, judge, 20)


def test_dynamic_rope_beyond_the_context(tiny_model_dir):
    """Above max_position_embeddings the base grows with the sequence, also while generating.

    With rows of one length: in transformers all rows have the base of the longest, here each has its own.
    """
    model, judge = load_both(tiny_model_dir("llama", "dynamic", max_position_embeddings=64))
    check_logits(model, judge, 120)
    check_greedy(model, judge, 50, padding=0)


def test_layers_of_mixed_kinds_are_stacked_in_segments(tiny_model_dir):
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 3
    folder = tiny_model_dir(
        "qwen3", num_hidden_layers=7, layer_types=kinds, use_sliding_window=True, sliding_window=8
    )
    model, judge = load_both(folder)
    assert [(s.period, s.repeats) for s in model.module.plan] == [(2, 2), (1, 3)]
    check_logits(model, judge, 40)


def test_gemma_3_has_periods_of_six_layers_and_a_tail(tiny_model_dir):
    config = AutoConfig.for_model("gemma3_text")
    plan = models.build(config).plan
    assert [(s.period, s.repeats) for s in plan] == [(6, 4), (1, 2)] and len(config.layer_types) == 26


def test_gemmas_embedding_scale_is_rounded_to_16_bits(tiny_model_dir):
    folder = tiny_model_dir("gemma3")
    model, _ = FastLanguageModel.from_pretrained(folder, load_in_16bit=True, dtype="bfloat16")
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = np.arange(320)[None]
    want = judge.get_input_embeddings()(torch.tensor(ids)).float().detach().numpy()
    got = join(model.graphdef, model.trainable, model.base).embed(ids)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_longer_than_gemma_scales_the_rope_of_layers_that_see_all(tiny_model_dir):
    folder = tiny_model_dir("gemma3")
    with pytest.warns(UserWarning, match="scaled linearly by 2"):
        model, _ = FastLanguageModel.from_pretrained(
            folder, load_in_4bit=False, dtype="float32", max_seq_length=512
        )
    rope = model.config.rope_parameters
    assert rope["full_attention"]["factor"] == 2 and rope["sliding_attention"]["rope_type"] == "default"
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_parameters=rope).eval()
    check_logits(model, judge, 300)


def test_longer_than_the_model_scales_rope_linearly(tiny_model_dir):
    folder = tiny_model_dir("llama")
    with pytest.warns(UserWarning, match="scaled linearly by 2"):
        model, _ = FastLanguageModel.from_pretrained(
            folder, load_in_4bit=False, dtype="float32", max_seq_length=512
        )
    judge = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ).eval()
    check_logits(model, judge, 300)


def test_native_scaling_is_kept_when_longer(tiny_model_dir, recwarn):
    folder = tiny_model_dir("llama", "llama3")
    model, _ = FastLanguageModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=512
    )
    assert not [w for w in recwarn if "scaled" in str(w.message)]
    _, judge = load_both(folder)
    check_logits(model, judge, 300)


@pytest.mark.usefixtures("all_optimisations")
def test_smollm2(smollm2_dir):
    """The real weights."""
    model, judge = load_both(smollm2_dir)
    check_logits(model, judge, 64)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    chat = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        want = judge.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None)
    got = model.generate(inputs["input_ids"], max_new_tokens=64, eos_token_id=[])
    np.testing.assert_array_equal(got, want.numpy())


ROPE = {"rope_theta": 1e4}
LONG = {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16}
UNSUPPORTED = [
    ("llama", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("mistral", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary",
    ),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "longrope", **LONG}}, "rope_type='longrope'"),
    ("gemma2", {"sliding_window": None}, "sliding_window=None"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
]


@pytest.mark.parametrize("family, change, message", UNSUPPORTED)
def test_unsupported_config_fields_raise(family, change, message, tiny_model_dir, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny_model_dir(family), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.from_pretrained(folder, load_in_4bit=False)


def test_unknown_family_raises(tmp_path, tiny_model_dir):
    import json
    import shutil

    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2"}))
    with pytest.raises(
        ValueError, match=r"model_type='gpt2'.*llama, mistral, qwen2, qwen3, gemma2, gemma3_text"
    ):
        FastLanguageModel.from_pretrained(folder)
