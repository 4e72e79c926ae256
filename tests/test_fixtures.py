"""The tiny models and the converted SmolLM2 load in transformers and say something sensible."""

import pytest
import tiny_models
import torch
import transformers


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_tiny_families(family, tiny_model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    logits = model(torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, tiny_models.VOCAB) and logits.isfinite().all() and logits.std() > 0.1


@pytest.mark.parametrize("rope", tiny_models.ROPES)
def test_tiny_ropes(rope, tiny_model_dir):
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir("llama", rope))
    assert config.rope_parameters["rope_type"] == rope


def test_smollm2_converted(smollm2_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = tokenizer("The opposite of hot is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " cold"
