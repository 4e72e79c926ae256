"""What notebooks do with a processor where scripts use a tokenizer: templates, exports, prompts, rows without images.

Images go through transformers' image processors of the backend "pil".
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_siglip
import tiny_vision

from jaxtune import (
    FastModel,
    FastVisionModel,
    SFTConfig,
    SFTTrainer,
    VisionDataCollator,
    get_chat_template,
    is_bf16_supported,
    is_bfloat16_supported,
)
from jaxtune.data.image_rows import read_row
from jaxtune.formats.gguf_file import GgufFile
from jaxtune.hub import HubError
from jaxtune.trainer import UnslothVisionDataCollator

MARKS = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": tiny_siglip.MARK["gemma3"],
    "smolvlm": tiny_siglip.MARK["smolvlm"],
}


@pytest.fixture(scope="module", params=MARKS)
def loaded(request, tmp_path_factory):
    tiny = tiny_vision if request.param == "qwen2_5_vl" else tiny_siglip
    folder = tiny.save(
        tiny.make_model(tiny.make_config(request.param)), tmp_path_factory.mktemp(request.param)
    )
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=False, dtype="float32", max_seq_length=256
    )
    return request.param, model, processor, folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tiny_vision.save(
        tiny_vision.make_model(tiny_vision.make_config("qwen2_5_vl")), tmp_path_factory.mktemp("qwen")
    )
    return FastVisionModel.from_pretrained(folder, load_in_4bit=False, dtype="float32", max_seq_length=256)


def row(*pictures, said="yes"):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}
    return {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": said}]}]}


@pytest.mark.parametrize("name", ["gemma-3", "qwen2.5", "chatml"])
def test_a_named_template_of_a_processor_shows_images(loaded, name):
    family, model, _, folder = loaded
    _, processor = FastVisionModel.from_pretrained(folder, load_in_4bit=False, dtype="float32")
    processor = get_chat_template(processor, name)
    said = processor.apply_chat_template(row("x")["messages"], tokenize=False)
    assert f"{MARKS[family]}What is it?" in said and said.count("What is it?") == 1
    assert processor.tokenizer.eos_token == ("<end_of_turn>" if name == "gemma-3" else "<|im_end|>")
    plain = [{"role": "user", "content": "What is it?"}]
    text = processor.tokenizer.apply_chat_template(plain, tokenize=False)
    assert said.replace(MARKS[family], "").startswith(text.rstrip())
    batch = VisionDataCollator(model, processor)([row(tiny_vision.picture(60, 60))])
    assert (batch["labels"] != -100).any()


def test_a_processor_goes_into_gguf(qwen, tmp_path):
    model, processor = qwen
    template, processor.tokenizer.chat_template = processor.chat_template, None
    made = model.save_pretrained_gguf(
        tmp_path, processor, quantization_method="f16", pre_tokenizer="gpt-2", progress=False
    )
    assert made["is_vlm"] and len(made["gguf_files"]) == 2
    assert GgufFile(Path(made["gguf_files"][0])).metadata["tokenizer.chat_template"] == template


def test_an_adapter_of_the_language_part_goes_into_gguf(qwen, tmp_path):
    model = FastVisionModel.get_peft_model(
        qwen[0], r=2, finetune_vision_layers=False, init_lora_weights=False
    )
    made = model.save_pretrained_gguf(tmp_path, save_method="lora", progress=False)
    names = set(GgufFile(Path(made["gguf_files"][0])).tensors)
    assert {"blk.0.attn_q.weight.lora_a", "blk.2.ffn_down.weight.lora_b"} <= names
    both = FastVisionModel.get_peft_model(qwen[0], r=2)
    with pytest.raises(ValueError, match="finetune_vision_layers=False"):
        both.save_pretrained_gguf(tmp_path / "both", save_method="lora")


def test_a_tokenizer_alone_leaves_the_image_processor(qwen, tmp_path):
    model, processor = qwen
    model.save_pretrained_merged(tmp_path / "merged", processor.tokenizer, progress=False)
    again, found = FastVisionModel.from_pretrained(tmp_path / "merged", load_in_4bit=False, dtype="float32")
    assert again.processor is not None and found.image_processor.patch_size == 14
    settings = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"


def trainer(qwen, rows, tmp_path, **more):
    args = SFTConfig(output_dir=str(tmp_path), max_length=128, max_steps=1, disable_tqdm=True)
    model = FastVisionModel.get_peft_model(qwen[0], r=2)
    return SFTTrainer(model=model, tokenizer=qwen[1], train_dataset=rows, args=args, **more)


def test_images_behind_a_row_without_any_are_seen(qwen, tmp_path):
    picture = tiny_vision.picture(60, 60)
    assert "documents" in trainer(qwen, [row(), row(picture)], tmp_path).train_dataset.column_names
    for part in ({"image": picture}, {"type": None, "image": picture}):
        untyped = {"messages": [{"role": "user", "content": [part]}, row()["messages"][1]]}
        assert "documents" in trainer(qwen, [untyped], tmp_path).train_dataset.column_names
    mark = MARKS["qwen2_5_vl"]
    with pytest.raises(ValueError, match=r"row 1 of the prepared rows .*VisionDataCollator"):
        trainer(qwen, [{"text": "nothing"}, {"text": f"{mark} what?"}], tmp_path)


def test_the_collator_called_directly_keeps_to_its_arguments(qwen):
    model, processor = qwen
    collator = UnslothVisionDataCollator(model, processor, pad_to_multiple_of=64)
    assert collator([row()])["input_ids"].shape[1] % 64 == 0
    short, long = row(), row(said="very " * 40)
    width = collator.encoder.encode(read_row(short, 0)).ids.size
    options = {"max_seq_length": width + 5}
    assert len(VisionDataCollator(model, processor, **options)([long, short])["input_ids"]) == 1
    with pytest.raises(ValueError, match=r"row 1 \(\d+ tokens\)"):
        VisionDataCollator(model, processor, **options, too_long="raise")([short, long])
    with pytest.raises(ValueError, match="num_proc=-1"):
        VisionDataCollator(model, processor, num_proc=-1)


def test_what_is_wrong_is_said(qwen):
    model, processor = qwen
    for given in ((model, processor.tokenizer), (processor, model)):
        with pytest.raises(TypeError, match="not its tokenizer"):
            VisionDataCollator(*given)
    with pytest.raises(
        ValueError, match=r"message 0 \(user\) has an image part without .* under image, bytes, url"
    ):
        VisionDataCollator(model, processor)([row(None)])
    captions = [{"image": tiny_vision.picture(60, 60), "text": "a dog"}]
    with pytest.raises(ValueError, match="--image_instruction"):
        VisionDataCollator(model, processor).prepare(captions, workers=0, progress=False)


def test_packing_that_cuts_is_refused_before_rows_are_read(qwen, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_length=128, packing=True, packing_strategy="wrapped")
    rows = [row(tiny_vision.picture(60, 60))]
    with pytest.raises(ValueError, match=r"packing_strategy='wrapped'.*'bfd'"):
        SFTTrainer(FastVisionModel.get_peft_model(qwen[0], r=2), args, train_dataset=rows, tokenizer=qwen[1])


def test_the_default_is_a_vision_model(tmp_path):
    for kind in (FastVisionModel, FastModel):
        with pytest.raises(HubError, match=r"unsloth/Llama-3\.2-11B-Vision-Instruct-bnb-4bit"):
            kind.from_pretrained(local_files_only=True, cache_dir=str(tmp_path))


def test_bfloat16():
    assert is_bfloat16_supported() and is_bf16_supported()


def test_a_prompt_whose_image_is_missing_is_refused(qwen):
    model, processor = qwen
    text = f"{MARKS['qwen2_5_vl']} what?"
    with pytest.raises(ValueError, match="prompt 0 has a token that stands for an image"):
        model.generate(text, max_new_tokens=2)
    ids = np.array([processor.tokenizer(text)["input_ids"]])
    with pytest.raises(ValueError, match="prompt 0"):
        model.generate(input_ids=ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1"):
        model.fast_generate(["what?", text])
