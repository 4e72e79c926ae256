"""A language model with a new tower: transformers and jaxtune load the same, and its text side is what it was."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny_vision
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from jaxtune import FastVisionModel

PATH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "make_vlm.py"
spec = importlib.util.spec_from_file_location("make_vlm", PATH)
make_vlm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_vlm)

SHAPES = {
    "smolvlm": (1, 1, 3, 64, 64),
    "qwen2_5_vl": (4 * 12, 3 * 2 * 8 * 8),
}  # pixels of an image of 90 x 30


@pytest.mark.parametrize("text", ["llama", "llama_tied"])
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_make(tiny_model_dir, tmp_path, family, text):
    text = tiny_model_dir(text)
    folder = make_vlm.make(family, text, tmp_path / "vlm", side=64, width=64, layers=2)
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    judge, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[tiny_vision.picture(90, 30)]], return_tensors="np")
    inputs = {name: np.asarray(value) for name, value in inputs.items()}
    assert inputs["pixel_values"].shape == SHAPES[family]
    with torch.no_grad():
        want = judge.eval()(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.numpy()
    assert np.abs(model.logits(**inputs) - want).max() <= LOGITS * np.abs(want).max()
    before = AutoModelForCausalLM.from_pretrained(text, dtype=torch.bfloat16).float().eval()
    ids = np.array([processor.tokenizer("Nothing to see.")["input_ids"]])
    with torch.no_grad():
        want = before(torch.tensor(ids)).logits.numpy()
    got = np.asarray(model.logits(ids))[..., :259]
    assert np.abs(got - want[..., :259]).max() <= LOGITS * np.abs(want).max()
