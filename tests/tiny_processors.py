"""A tiny Qwen2.5-VL processor without a model: for tests of what happens to rows before there is one.

Images go through transformers' Qwen2VLImageProcessorPil: the image processor that needs no torchvision, and the one
that jaxtune uses.
"""

from types import SimpleNamespace

import tiny_vision
import transformers

from jaxtune.processor import load_processor

PATCH = 14
# Qwen's template with marks around what the assistant says.
MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ content['text'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] != 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor(folder, template: str = tiny_vision.TEMPLATE, most_patches: int = 64):
    """Images of 4 to `most_patches` patches; what it is saved from is in `folder`."""
    sizes = {"shortest_edge": 4 * PATCH**2, "longest_edge": most_patches * PATCH**2}
    transformers.Qwen2VLImageProcessorPil(size=sizes).save_pretrained(folder)
    tokenizer = tiny_vision.make_tokenizer()
    tokenizer.chat_template = template
    return load_processor(folder, tokenizer, "qwen2_5_vl")


def stand_in(**changes) -> SimpleNamespace:
    """What a collator asks of a model: config and dtype."""
    return SimpleNamespace(**{"config": tiny_vision.make_config("qwen2_5_vl"), "dtype": "float32"} | changes)
