"""Random tiny models with SigLIP's tower (Gemma 3, Idefics3, SmolVLM), made by transformers, with their processors.

Images go through transformers' image processors of the backend "pil": torchvision is not there.
"""

import json
from pathlib import Path

import numpy as np
import tiny_models
import tiny_vision
import torch
import transformers

SIDE, PATCH, TOKENS = 48, 8, 9  # of an image: pixels and patches' pixels of a side, tokens of the decoder
GEMMA = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
# What a text has in the place of an image before the processor.
MARK = {"gemma3": GEMMA["boi_token"], "idefics3": "<image>", "smolvlm": "<image>"}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = tiny_vision.TEXT | {"head_dim": 16}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(family: str) -> transformers.PreTrainedTokenizerBase:
    """`tiny_models`' byte tokenizer with the family's marks of images."""
    core = tiny_models.make_tokenizer()
    special = {} if family != "gemma3" else {"extra_special_tokens": GEMMA}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core.backend_tokenizer,
        bos_token=core.bos_token,
        eos_token=core.eos_token,
        pad_token=core.pad_token,
        chat_template=TEMPLATE.replace("MARK", MARK[family]),
        padding_side="left",
        **special,
    )
    if family != "gemma3":
        places = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
        tokenizer.add_special_tokens({"additional_special_tokens": [*IDEFICS, "<global-img>", *places]})
    return tokenizer


def make_config(family: str, **changes) -> transformers.PretrainedConfig:
    """The tiny config of a family; `changes` are fields of the outer config, text and vision fields given as dicts."""
    tokenizer = make_tokenizer(family)
    text, given = dict(TEXT), changes.pop("text_config", {})
    vision = VISION | changes.pop("vision_config", {})
    if family == "gemma3":
        rope = {"rope_type": "default", "rope_theta": 1e4}
        text |= {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 500.0}},
        } | given
        boi, image, eoi = tokenizer.convert_tokens_to_ids(list(GEMMA.values()))
        ids = {"image_token_index": image, "boi_token_index": boi, "eoi_token_index": eoi}
        vision |= {"vision_use_head": False}
        return transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=TOKENS, **ids, **changes
        )
    kind = transformers.Idefics3Config if family == "idefics3" else transformers.SmolVLMConfig
    text |= {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | given
    fields = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2}
    return kind(text_config=text, vision_config=vision, **fields, **changes)


def make_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of `config`, float32, eval mode, every parameter random."""
    torch.manual_seed(seed)
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation="eager").float().eval()
    plus_one = "gemma" in config.model_type  # its norms have 1 + weight, but for those of the tower
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            mean = is_norm and not (plus_one and "layer_norm" not in name and "post_layernorm" not in name)
            parameter.copy_(float(mean) + 0.1 * torch.randn(parameter.shape))
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Model, tokenizer and processor as a Hugging Face folder."""
    model.save_pretrained(folder)
    family = model.config.model_type
    make_tokenizer(family).save_pretrained(folder)
    if family == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        fields = {"processor_class": "Gemma3Processor", "image_seq_length": TOKENS}
    else:
        name = "Idefics3" if family == "idefics3" else "SmolVLM"
        kind = getattr(transformers, f"{name}ImageProcessorPil")
        images = kind(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        fields = {"processor_class": f"{name}Processor", "image_seq_len": TOKENS}
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(fields))
    return folder


def rows(processor, family: str) -> dict[str, np.ndarray]:
    """The processor's output for two rows, padded on the left: three images of other sizes in a row, and one."""
    mark = MARK[family]
    texts = [f"look {mark} and{mark} or {mark}?", f"{mark} what is this, a row with other text in it?"]
    shapes = [(130, 60), (40, 150), (90, 90), (200, 130)]
    pictures = [
        [tiny_vision.picture(*shape, seed) for seed, shape in enumerate(shapes[:3])],
        [tiny_vision.picture(*shapes[3], 3)],
    ]
    made = processor(text=texts, images=pictures, padding=True, return_tensors="np")
    return {name: np.asarray(value) for name, value in made.items()}
