"""The shipped reading task: numbers drawn with Pillow, and a vision-language model that has yet to learn everything.

A held-out number is none of those that are trained on. The model has the shape of Qwen2.5-VL and random weights, so
what it reads afterwards it has learnt here; it is small enough for two CPU cores and a few minutes.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import save_file

from jaxtune.load import leaf_shapes_of
from jaxtune.models import build
from jaxtune.models.names import expected_names, module_at

QUESTION = "Read."
CELL = 28  # pixels: a digit has so many in width and height, which is one token of the model
MOST_DIGITS = 4
HELD_OUT_EVERY = 5  # of the numbers of most digits one in so many is held out
NUM_TRAIN, NUM_HELD_OUT = 4000, 100

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
# Qwen2.5-VL's, without its default system message.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw(text: str, seed: int) -> Image.Image:
    """Digits in black on white, each a little off its place and larger or smaller than the others, with noise."""
    chance = random.Random(seed)
    picture = Image.new("L", (CELL * len(text), CELL), 255)
    pen = ImageDraw.Draw(picture)
    for place, digit in enumerate(text):
        font = ImageFont.load_default(size=chance.choice((20, 22, 24)))
        pen.text((CELL * place + chance.randint(5, 9), chance.randint(-3, 1)), digit, fill=0, font=font)
    noise = np.random.default_rng(seed).integers(0, 20, (CELL, CELL * len(text)))
    return Image.fromarray((np.asarray(picture, int) * (255 - 20) // 255 + noise).astype(np.uint8))


def make_rows(count: int, *, held_out: bool = False, seed: int = 3407) -> list[dict[str, Any]]:
    """Conversations: an image and the question, and the number that stands there.

    Numbers to train on have 1 to MOST_DIGITS digits, those held out have MOST_DIGITS.
    """
    chance = random.Random(f"{seed} {held_out}")
    rows = []
    while len(rows) < count:
        digits = MOST_DIGITS if held_out else chance.randint(1, MOST_DIGITS)
        text = f"{chance.randrange(10**digits):0{digits}d}"
        if (digits == MOST_DIGITS and int(text) * 7919 % 10_007 % HELD_OUT_EVERY == 0) == held_out:
            rows.append(_row(text, chance.randrange(2**31)))
    return rows


def _row(text: str, seed: int) -> dict[str, Any]:
    asked = [{"type": "image", "image": draw(text, seed)}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def make_tokenizer() -> Any:
    """A token for every byte, and those that Qwen2.5-VL's conversations are marked with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_model(folder: str | Path, seed: int = 0) -> Path:
    """A Hugging Face folder of a Qwen2.5-VL with 1.5 million random weights, its tokenizer and its image processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    text = {
        **{"vocab_size": 320, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512},
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 6, 6]},
    }
    vision = {
        **{"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128},
        **{"window_size": 112, "fullatt_block_indexes": [1]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **{
            f"{name}_token_id": ids[i]
            for i, name in enumerate(("image", "video", "vision_start", "vision_end"))
        },
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"shortest_edge": CELL**2, "longest_edge": 64 * CELL**2}
    # White paper is 0: what is written is all that the random tower sees at first.
    Qwen2VLImageProcessorPil(size=sizes, image_mean=[0.95] * 3, image_std=[0.3] * 3).save_pretrained(folder)
    _write_weights(config, folder, seed)
    return folder


def _write_weights(config: Any, folder: Path, seed: int) -> None:
    """Norms one, biases zero, all else normal with the deviation 1/√(inputs)."""
    model, rng = build(config, np.float32), np.random.default_rng(seed)
    weights = {
        name: _weight(name, leaf_shapes_of(getattr(module_at(model, slot.path), leaf)), rng)
        for name, (slot, leaf) in expected_names(model).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith("bias") or len(shape) == 1:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    scale = 0.5 if "embed_tokens" in name else np.prod(shape[1:]) ** -0.5
    return (scale * rng.standard_normal(shape)).astype(np.float32)
