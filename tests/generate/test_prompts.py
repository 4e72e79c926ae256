"""Prompts with images as notebooks write them, on a tiny Qwen2.5-VL: greedy answers are those of transformers."""

import numpy as np
import pytest
import tiny_vision
import torch

from jaxtune import FastVisionModel, SamplingParams, TextStreamer

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = [(130, 60), (40, 150), (90, 90)]
PICTURES = [tiny_vision.picture(*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' model, jaxtune's and its processor."""
    config = tiny_vision.make_config(
        "qwen2_5_vl",
        text_config={"num_hidden_layers": 2},
        vision_config={"depth": 2, "fullatt_block_indexes": [1]},
    )
    theirs = tiny_vision.make_model(config)
    folder = tiny_vision.save(theirs, tmp_path_factory.mktemp("qwen2_5_vl"))
    model, processor = FastVisionModel.from_pretrained(
        str(folder), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    return theirs, FastVisionModel.for_inference(model), processor


def chat(pictures, text="what is this?"):
    parts = [{"type": "image", "image": one} for one in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def judged(both, chats, count=16, **options):
    """transformers' greedy answers, by its own processor."""
    theirs, _, processor = both
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    pictures = [[part["image"] for part in one[0]["content"] if part["type"] == "image"] for one in chats]
    inputs = processor(
        images=pictures,
        text=texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.no_grad():
        made = theirs.generate(
            **inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return made.numpy()


def test_the_cells_of_a_vision_notebook(both, capsys):
    _, model, tokenizer = both
    image = PICTURES[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    input_text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    inputs = tokenizer(image, input_text, add_special_tokens=False, return_tensors="pt").to("cpu")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    made = model.generate(**inputs, streamer=streamer, max_new_tokens=16, use_cache=True, eos_token_id=[])
    want = judged(both, [chat([image])])
    np.testing.assert_array_equal(made, want)
    written = tokenizer.decode(want[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out == written + "\n"


def test_chats_with_images_of_several_sizes_in_them(both):
    model = both[1]
    chats = [chat(PICTURES), chat(PICTURES[1:2], "and this other one?"), chat([], "no image")]
    made = model.generate(chats, max_new_tokens=16, eos_token_id=[], pad_token_id=0)
    np.testing.assert_array_equal(made, judged(both, chats))


def test_texts_and_chats_with_images_beside_them(both):
    model, processor = both[1:]
    bare = [
        {"role": "user", "content": [*[{"type": "image"}] * 3, {"type": "text", "text": "what is this?"}]}
    ]
    text = processor.apply_chat_template(bare, add_generation_prompt=True)
    want = judged(both, [chat(PICTURES)], 6)
    for prompt in (text, bare, [{"role": "user", "content": "what is this?"}]):
        made = model.generate(prompt, images=PICTURES, max_new_tokens=6, eos_token_id=[])
        np.testing.assert_array_equal(made, want)


def test_answers_share_the_prefill_of_a_prompt(both):
    """vLLM's form of a prompt; three answers to each of two."""
    model, processor = both[1:]
    chats = [chat(PICTURES[:1]), chat(PICTURES[1:])]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    prompts = [
        {"prompt": texts[0], "multi_modal_data": {"image": PICTURES[0]}},
        {"prompt": texts[1], "multi_modal_data": {"image": PICTURES[1:]}},
    ]
    made = model.fast_generate(prompts, SamplingParams(temperature=0, max_tokens=16, n=3))
    want = judged(both, chats)[:, -16:].tolist()
    stops = set(model.stop_ids())
    for one, ids in zip(made, want, strict=True):
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), 16)
        assert [answer.token_ids for answer in one.outputs] == [ids[:end]] * 3


def test_what_does_not_go_together_is_refused(both):
    model = both[1]
    with pytest.raises(ValueError, match="2 image placeholders in its messages and 1 images beside them"):
        two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
        model.generate(two, images=PICTURES[:1])
    with pytest.raises(ValueError, match="images must be given for each prompt: 2 prompts, images for 3"):
        model.generate(["a", "b"], images=PICTURES)
    with pytest.raises(ValueError, match="with token ids give what the processor made of them"):
        model.generate(np.ones((1, 3), int), images=PICTURES)
    with pytest.raises(ValueError, match="multi_modal_data has video"):
        model.fast_generate({"prompt": "a", "multi_modal_data": {"video": []}})
