"""Random tiny vision-language models, made by transformers, with a processor: the judges of jaxtune's own.

Images go through transformers' image processors of the backend "pil": torchvision is not there.
"""

import json
from pathlib import Path

import numpy as np
import tiny_models
import torch
import transformers
from PIL import Image

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 64, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 96}


def make_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """`tiny_models`' byte tokenizer with Qwen's marks of images."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(family: str, **changes) -> transformers.PretrainedConfig:
    """The tiny config of "qwen2_5_vl" or "qwen3_vl"; `changes` are fields of the outer config, text and vision fields
    given as dicts."""
    ids = dict(
        zip(("vision_start", "vision_end", "image", "video"), make_tokenizer().convert_tokens_to_ids(MARKS))
    )
    fields = {f"{name}_token_id": number for name, number in ids.items()}
    rope = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3]}
    text, vision = TEXT | {"rope_parameters": rope}, dict(VISION)
    if family == "qwen2_5_vl":
        kind = transformers.Qwen2_5_VLConfig
        vision |= {"depth": 4, "fullatt_block_indexes": [1, 3], "window_size": 56, "patch_size": 14}
    else:
        kind = transformers.Qwen3VLConfig
        rope |= {"mrope_interleaved": True}
        text |= {"head_dim": 16, "num_hidden_layers": 4}
        vision |= {
            "depth": 4,
            "deepstack_visual_indexes": [0, 2],
            "num_position_embeddings": 36,
            "patch_size": 16,
        }
    text |= changes.pop("text_config", {})
    vision |= changes.pop("vision_config", {})
    return kind(text_config=text, vision_config=vision, **fields, **changes)


def make_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of `config`, float32, eval mode, every parameter random."""
    torch.manual_seed(seed)
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name or "ln_q" in name else 0.0
            parameter.copy_(mean * (parameter.ndim == 1) + 0.1 * torch.randn(parameter.shape))
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Model, tokenizer and image processor as a Hugging Face folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    patch = model.config.vision_config.patch_size
    unit = (2 * patch) ** 2
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 2 * unit, "longest_edge": 24 * unit}
    )
    images.save_pretrained(folder)
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    assert fields["image_processor_type"] == "Qwen2VLImageProcessor"
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels, smooth enough that scaling leaves something of them."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


def rows(processor) -> dict[str, np.ndarray]:
    """The processor's output for two rows, padded on the left: three images of other sizes in a row, and one."""
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [f"look {mark} and{mark} or {mark}?", f"{mark} what is this, a row with other text in it?"]
    shapes = [(130, 60), (40, 150), (90, 90), (200, 130)]
    pictures = [[picture(*shape, seed) for seed, shape in enumerate(shapes[:3])], [picture(*shapes[3], 3)]]
    made = processor(text=texts, images=pictures, padding=True, return_tensors="np")
    return {name: np.asarray(value) for name, value in made.items()}
