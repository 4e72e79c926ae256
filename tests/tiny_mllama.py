"""A random tiny Llama 3.2 Vision, made by transformers, with its processor.

Images go through transformers' image processor of the backend "pil": torchvision is not there.
"""

import json
from pathlib import Path

import numpy as np
import tiny_models
import tiny_siglip
import tiny_vision
import torch
import transformers

SIDE, IMAGE = 24, "<|image|>"
TEXT = tiny_vision.TEXT | {
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "intermediate_layers_indices": [0, 1],
    "vision_output_dim": 96,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}


def make_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """`tiny_models`' byte tokenizer, and the image token behind the vocabulary of the model."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|unused{i}|>" for i in range(320 - 259)]})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = tiny_siglip.TEMPLATE.replace("MARK", IMAGE)
    return tokenizer


def make_config(family: str = "mllama", **changes) -> transformers.MllamaConfig:
    """The tiny config; `changes` are fields of the outer config, text and vision fields given as dicts."""
    text, vision = TEXT | changes.pop("text_config", {}), VISION | changes.pop("vision_config", {})
    image = make_tokenizer().convert_tokens_to_ids(IMAGE)
    return transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=image, **changes
    )


def make_model(config: transformers.MllamaConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of `config`, float32, eval mode, every parameter random, the gates well open."""
    torch.manual_seed(seed)
    kind = transformers.MllamaForConditionalGeneration
    model = kind._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            open_ = "gate" in name.rsplit(".", 1)[-1] or ("norm" in name and name.endswith("weight"))
            parameter.copy_(float(open_) + 0.1 * torch.randn(parameter.shape))
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Model, tokenizer and processor as a Hugging Face folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    transformers.MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "MllamaProcessor"}))
    return folder


def rows(processor) -> list[dict[str, np.ndarray]]:
    """The processor's output for each of four rows, not padded: an image and two side by side, one at the start, one
    behind text, none."""
    texts = [
        f"see {IMAGE} and {IMAGE}{IMAGE} here",
        f"{IMAGE}what is this?",
        f"then {IMAGE}",
        "no image at all",
    ]
    shapes = [[(60, 20), (20, 70), (30, 30)], [(50, 50)], [(20, 90)], []]
    made = []
    for number, (text, sizes) in enumerate(zip(texts, shapes, strict=True)):
        pictures = [tiny_vision.picture(*size, 10 * number + i) for i, size in enumerate(sizes)]
        row = processor(text=[text], images=[pictures] if pictures else None, return_tensors="np")
        made.append({name: np.asarray(value) for name, value in row.items()})
    return made
