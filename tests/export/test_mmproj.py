"""Vision-language models as GGUF: against llama.cpp's converter, the language part run by llama.cpp itself."""

import json
from pathlib import Path

import gguf_cases
import gguf_vision_cases
import numpy as np
import pytest
import tiny_vision
from export_judges import relative_error, write
from tolerances import LLAMA_CPP_LOGITS

from jaxtune.export.gguf_conversion import convert
from jaxtune.export.mmproj import save_mmproj
from jaxtune.fast import FastVisionModel
from jaxtune.formats.gguf_file import GgufFile

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_vision.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=gguf_vision_cases.CASES)
def case(request, tmp_path_factory):
    """(model, what the converter made of its folder)."""
    folder = gguf_vision_cases.write_case(request.param, tmp_path_factory.mktemp("case") / request.param)
    model, _ = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    return model, GOLDEN[request.param]


def test_the_language_part_is_the_converters(case, tmp_path):
    model, golden = case
    path = write(convert(model, pre_tokenizer="gpt-2"), tmp_path / "text.gguf")
    theirs = golden["text"]
    ours = gguf_cases.summary(path)
    assert ours["tensors"] == theirs["tensors"]
    mine = [key for key in ours["keys"] if not key[0].startswith("tokenizer.")]
    assert mine == [key for key in theirs["keys"] if not key[0].startswith("tokenizer.")]


def test_tower_and_projector_are_the_converters(case, tmp_path):
    """Key by key in the same order, every tensor to the bit; and the same types in 16 bits."""
    model, golden = case
    save_mmproj(model, tmp_path / "mmproj.gguf", dtype="f32")
    assert gguf_cases.summary(tmp_path / "mmproj.gguf") == golden["mmproj"]
    for dtype in ("f16", "bf16"):
        save_mmproj(model, tmp_path / "mmproj.gguf", dtype=dtype)
        assert gguf_vision_cases.kinds(tmp_path / "mmproj.gguf") == golden[dtype]


# llama.cpp's qwen2vl takes no notice of the norms' epsilon, and its qwen3vl turns what no section covers by nothing: of
# 64 pairs with sections of 24, 20 and 20 those are two, the slowest ones.
COMPUTED = {
    "qwen2_5_vl": {"rms_norm_eps": 1e-12},
    "qwen3_vl": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]}},
}


@pytest.mark.parametrize("family", COMPUTED)
def test_llama_cpp_computes_the_language_part(family, tmp_path, llama_cpp):
    """Of text, where all three positions of M-RoPE are the same. Images are for its mtmd, which is not there."""
    config = tiny_vision.make_config(family, text_config=COMPUTED[family])
    folder = tiny_vision.save(tiny_vision.make_model(config), tmp_path / "model")
    model, _ = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    ids = np.random.default_rng(0).integers(3, 259, 60)
    path = write(convert(model, pre_tokenizer="gpt-2"), tmp_path / "text.gguf")
    with llama_cpp.load(path) as judge:
        assert relative_error(judge.logits(ids.tolist()), model.logits(ids[None])[0]) < LLAMA_CPP_LOGITS


def test_an_adapter_on_the_tower_is_merged_in(case, tmp_path):
    model, _ = case
    adapted = FastVisionModel.get_peft_model(model, r=2, init_lora_weights=False)
    made = adapted.save_pretrained_gguf(
        tmp_path, quantization_method="f16", pre_tokenizer="gpt-2", progress=False
    )
    assert made["is_vlm"] and [Path(file).name for file in made["gguf_files"]] == [
        f"{Path(model.name_or_path).name}.F16.gguf",
        f"{Path(model.name_or_path).name}.F16-mmproj.gguf",
    ]
    save_mmproj(model, tmp_path / "plain.gguf")
    plain, merged = GgufFile(tmp_path / "plain.gguf"), GgufFile(made["gguf_files"][1])
    changed = {name for name in plain.tensors if (plain.read(name) != merged.read(name)).any()}
    assert {name.split(".", 3)[3] for name in changed} >= {
        "attn_out.weight",
        "ffn_down.weight",
        "ffn_up.weight",
    }
    assert not [name for name in changed if not name.startswith("v.blk.") or name.endswith("bias")]


def test_a_tower_that_llama_cpp_cannot_compute_is_refused(tmp_path):
    config = tiny_vision.make_config("qwen2_5_vl", vision_config={"fullatt_block_indexes": [0, 3]})
    folder = tiny_vision.save(tiny_vision.make_model(config), tmp_path / "model")
    model, _ = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=None
    )
    with pytest.raises(ValueError, match=r"fullatt_block_indexes=\[0, 3\]"):
        model.save_pretrained_gguf(tmp_path / "out", pre_tokenizer="gpt-2")
    assert not (tmp_path / "out").exists()
