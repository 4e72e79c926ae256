import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from export_judges import in_float32, load, logits_of, plain_logits, random_adapter, relative_error
from tolerances import LOGITS

from jaxtune.export.adapter import save_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "all-linear": {},
    "two targets": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [1], "target_modules": ["v_proj", "up_proj"]},
    "one layer": {"layers_to_transform": 0},
    "regex": {"target_modules": r".*\.self_attn\.(q|o)_proj"},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "dropout": {"lora_dropout": 0.5},
}


def peft_logits(base, adapter, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits_of(peft.PeftModel.from_pretrained(model, adapter).eval(), ids)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_computes_the_same_logits(tiny_model_dir, tmp_path, ids, name):
    base = tiny_model_dir("llama")
    model = random_adapter(load(base, load_in_16bit=True), **VARIANTS[name])
    save_adapter(model, tmp_path / "adapter")
    ours = np.asarray(model.logits(ids))
    assert relative_error(plain_logits(base, ids.tobytes(), ids.shape), ours) > 1e-2, (
        "the adapter must change the logits for this test to mean anything"
    )
    assert relative_error(peft_logits(base, tmp_path / "adapter", ids), ours) <= LOGITS


@pytest.mark.parametrize("family", ["llama_bias", "mistral_window", "qwen2", "qwen3_tied"])
def test_families(tiny_model_dir, tmp_path, ids, family):
    base = tiny_model_dir(family)
    model = random_adapter(load(base, load_in_16bit=True))
    save_adapter(model, tmp_path / "adapter")
    assert relative_error(peft_logits(base, tmp_path / "adapter", ids), model.logits(ids)) <= LOGITS


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_saved_modules_of_a_tied_model(tiny_model_dir, tmp_path, ids, saved):
    base = tiny_model_dir("llama_tied")
    model = random_adapter(load(base, load_in_16bit=True), modules_to_save=saved)
    save_adapter(model, tmp_path / "adapter")
    assert relative_error(peft_logits(base, tmp_path / "adapter", ids), model.logits(ids)) <= LOGITS


def test_reading_an_adapter_that_trains_the_embedding_of_a_tied_model(tiny_model_dir, tmp_path, ids):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model_dir("llama_tied"), dtype=torch.float32
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    judge = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in judge.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    judge.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter", load_in_16bit=True)
    assert relative_error(logits_of(judge, ids), model.logits(ids)) <= LOGITS


def test_on_a_4bit_base_peft_with_bitsandbytes_computes_the_same_logits(tiny_model_dir, tmp_path, ids):
    base = tiny_model_dir("llama")
    model = random_adapter(load(base, load_in_4bit=True))
    save_adapter(model, tmp_path / "adapter")
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    )
    judge = in_float32(peft.PeftModel.from_pretrained(judge, tmp_path / "adapter").eval())
    assert relative_error(logits_of(judge, ids), model.logits(ids)) <= LOGITS


def test_loading_it_again_continues_training(tiny_model_dir, tmp_path, ids):
    model = random_adapter(load(tiny_model_dir("llama"), load_in_4bit=True), use_dora=True)
    save_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", load_in_4bit=True)
    assert again.lora is not None and again.trainable.keys() == model.trainable.keys()
    for path, value in model.trainable.items():
        np.testing.assert_array_equal(again.trainable[path], value)
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))


def test_tokenizer_and_config_lie_beside_it(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    model = random_adapter(load(base, load_in_16bit=True))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.chat_template == model.tokenizer.chat_template
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 16, str(base))
    tensors = (tmp_path / "adapter" / "adapter_model.safetensors").stat()
    assert tensors.st_mode & 0o044, "others may read it"


def test_non_finite_is_named_and_nothing_is_written(tiny_model_dir, tmp_path):
    model = random_adapter(load(tiny_model_dir("llama"), load_in_16bit=True))
    path = next(p for p in model.trainable if p.endswith("q_proj.lora_A"))
    model.trainable[path] = model.trainable[path].at[1, 3, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: 1 of 512 values"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_without_an_adapter(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(load(tiny_model_dir("llama"), load_in_16bit=True), tmp_path / "adapter")


def test_into_a_folder_in_use(tiny_model_dir, tmp_path):
    """Other files stay; an older adapter is replaced."""
    model = random_adapter(load(tiny_model_dir("llama"), load_in_16bit=True))
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "adapter_config.json").write_text("{}")
    save_adapter(model, target)
    assert (target / "notes.txt").read_text() == "mine"
    assert json.loads((target / "adapter_config.json").read_text())["r"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
