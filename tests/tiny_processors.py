"""A tiny Qwen2.5-VL processor: a tokenizer of bytes beside transformers' Qwen2VLImageProcessorPil.

The image processor is the PIL one: the only one of transformers that needs no torchvision, and what jaxtune uses.
"""

from types import SimpleNamespace

import transformers

from jaxtune.processors import without_video

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Qwen2.5-VL's template for text and images.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with marks around what the assistant says.
MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ content['text'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] != 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 14


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and Qwen's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[2],
        pad_token=SPECIALS[0],
        chat_template=TEMPLATE,
    )


def make_processor(most_patches: int = 64, template: str = TEMPLATE) -> transformers.ProcessorMixin:
    """Images of 4 to `most_patches` patches."""
    images = transformers.Qwen2VLImageProcessorPil(
        min_pixels=4 * PATCH**2, max_pixels=most_patches * PATCH**2
    )
    return without_video(transformers.Qwen2_5_VLProcessor)(images, make_tokenizer(), chat_template=template)


def make_config(**text) -> transformers.Qwen2_5_VLConfig:
    """A tiny Qwen2.5-VL, its ids those of the tokenizer."""
    vocab = make_tokenizer().get_vocab()
    return transformers.Qwen2_5_VLConfig(
        text_config={"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        | text,
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
        },
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
    )


def stand_in(**changes) -> SimpleNamespace:
    """What a collator asks of a model: config and dtype."""
    return SimpleNamespace(**{"config": make_config(), "dtype": "float32"} | changes)
