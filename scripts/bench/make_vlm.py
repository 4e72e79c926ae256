"""A vision-language model that has yet to learn to see: SmolLM2's weights behind a small random tower.

    python scripts/bench/make_vlm.py smolvlm SMOLLM2_FOLDER OUT [--side 128] [--patch 8] [--width 384] [--layers 6]
    python scripts/bench/make_vlm.py qwen2_5_vl SMOLLM2_FOLDER OUT [--patch 8] [--width 384] [--layers 6]

Writes a folder that transformers and FastVisionModel load: config, weights in bfloat16, tokenizer with the family's
marks of images, processor. What the model says to text alone is what it said. As SmolVLM an image is scaled to one
square of `side` pixels, which makes (side / patch / 4)² tokens. As Qwen2.5-VL it keeps its shape, and each 2 x 2
patches are a token; all layers of the tower see the whole image, and the biases of q, k and v, which a Llama has not,
are zero. Needs no torch; 1 GB of memory and a few seconds for SmolLM2-135M.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, SmolVLMImageProcessorPil

FACTOR = 4  # SmolVLM: patches of a side that become one token
MERGE, FRAMES = 2, 2  # Qwen2.5-VL: the same, and frames of a patch, of which an image fills both
PIXELS = 640 * 96  # of an image of Qwen2.5-VL, at most
SMOLVLM_MARKS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SMOLVLM_MARKS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
QWEN_MARKS = {
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": "<|video_pad|>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Shape(NamedTuple):
    """Of a tower: pixels of a patch's side, width, layers, and pixels of an image's side where all are squares."""

    patch: int
    width: int
    layers: int
    side: int


class Random:
    """Random tensors by name, so large that what goes through a layer keeps its size; norms and biases do nothing."""

    def __init__(self, seed: int):
        self.tensors: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)

    def normal(self, name: str, *shape: int, std: float) -> None:
        self.tensors[name] = self.rng.normal(0, std, shape)

    def norm(self, name: str, width: int, *, bias: bool) -> None:
        self.tensors[f"{name}.weight"] = np.ones(width)
        if bias:
            self.tensors[f"{name}.bias"] = np.zeros(width)

    def linear(self, name: str, out: int, width: int, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", out, width, std=gain * width**-0.5)
        self.tensors[f"{name}.bias"] = np.zeros(out)


def smolvlm(new: Random, config: dict, scale: float, shape: Shape) -> dict:
    """The tower's weights into `new`, image features of the size `scale` of embeddings; what it adds to config.json."""
    patch, width, layers, side = shape
    if side % (patch * FACTOR):
        raise ValueError(f"side={side}, patch={patch}: expected a side of whole {FACTOR}-patches")
    root, depth = "model.vision_model.embeddings", (2 * layers) ** -0.5
    new.normal(f"{root}.patch_embedding.weight", width, 3, patch, patch, std=(3 * patch**2) ** -0.5)
    new.tensors[f"{root}.patch_embedding.bias"] = np.zeros(width)
    new.normal(f"{root}.position_embedding.weight", (side // patch) ** 2, width, std=0.2)
    for layer in range(layers):
        root = f"model.vision_model.encoder.layers.{layer}"
        new.norm(f"{root}.layer_norm1", width, bias=True)
        new.norm(f"{root}.layer_norm2", width, bias=True)
        for name in ("q_proj", "k_proj", "v_proj"):
            new.linear(f"{root}.self_attn.{name}", width, width)
        new.linear(f"{root}.self_attn.out_proj", width, width, depth)
        new.linear(f"{root}.mlp.fc1", 4 * width, width)
        new.linear(f"{root}.mlp.fc2", width, 4 * width, depth)
    new.norm("model.vision_model.post_layernorm", width, bias=True)
    fan = width * FACTOR**2
    new.normal(
        "model.connector.modality_projection.proj.weight", config["hidden_size"], fan, std=scale * fan**-0.5
    )
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": width // 64, "image_size": side, "patch_size": patch}
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "text_config": config,
        "vision_config": vision,
        "scale_factor": FACTOR,
    }


def qwen2_5_vl(new: Random, config: dict, scale: float, shape: Shape) -> dict:
    """As `smolvlm`."""
    patch, width, layers, _ = shape
    fan, root, depth = 3 * FRAMES * patch**2, "model.visual", (2 * layers) ** -0.5
    new.normal(f"{root}.patch_embed.proj.weight", width, 3, FRAMES, patch, patch, std=fan**-0.5)
    for layer in range(layers):
        block = f"{root}.blocks.{layer}"
        new.norm(f"{block}.norm1", width, bias=False)
        new.norm(f"{block}.norm2", width, bias=False)
        new.linear(f"{block}.attn.qkv", 3 * width, width)
        new.linear(f"{block}.attn.proj", width, width, depth)
        new.linear(f"{block}.mlp.gate_proj", 4 * width, width)
        new.linear(f"{block}.mlp.up_proj", 4 * width, width)
        new.linear(f"{block}.mlp.down_proj", width, 4 * width, depth)
    fan = width * MERGE**2
    new.norm(f"{root}.merger.ln_q", width, bias=False)
    new.linear(f"{root}.merger.mlp.0", fan, fan)
    new.linear(f"{root}.merger.mlp.2", config["hidden_size"], fan, scale)
    heads, kv, half = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"] // 2
    for layer in range(config["num_hidden_layers"]):
        for name, count in (("q", heads), ("k", kv), ("v", kv)):
            bias = f"model.language_model.layers.{layer}.self_attn.{name}_proj.bias"
            new.tensors[bias] = np.zeros(2 * half * count)
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config["rope_theta"]}
    text = {name: value for name, value in config.items() if name not in ("rope_theta", "head_dim")}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "depth": layers, "num_heads": width // 64}
    vision |= {"patch_size": patch, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES}
    vision |= {"out_hidden_size": config["hidden_size"], "fullatt_block_indexes": list(range(layers))}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": text | {"rope_parameters": rope | {"mrope_section": sections}},
        "vision_config": vision | {"window_size": 8 * MERGE * patch},
    }


def smolvlm_images(shape: Shape) -> tuple[Any, dict]:
    """The image processor, and what processor_config.json says."""
    size = {"longest_edge": shape.side}
    images = SmolVLMImageProcessorPil(size=size, max_image_size=size)
    tokens = (shape.side // shape.patch // FACTOR) ** 2
    return images, {"processor_class": "SmolVLMProcessor", "image_seq_len": tokens}


def qwen2_5_vl_images(shape: Shape) -> tuple[Any, dict]:
    """As `smolvlm_images`."""
    sizes = {"shortest_edge": (MERGE * shape.patch) ** 2, "longest_edge": PIXELS}
    patches = {"patch_size": shape.patch, "merge_size": MERGE, "temporal_patch_size": FRAMES}
    images = Qwen2VLImageProcessorPil(size=sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3, **patches)
    return images, {"processor_class": "Qwen2_5_VLProcessor"}


class Family(NamedTuple):
    """What differs between families.

    marks: tokens of images. image: what stands in a text for one. ids: config.json's names of marks. inside: where the
    text model lies. tower, images: see `smolvlm` and `smolvlm_images`.
    """

    marks: list[str]
    image: str
    ids: dict[str, str]
    inside: str
    tower: Callable[[Random, dict, float, Shape], dict]
    images: Callable[[Shape], tuple[Any, dict]]


FAMILIES = {
    "smolvlm": Family(
        SMOLVLM_MARKS, "<image>", {"image_token_id": "<image>"}, "model.text_model.", smolvlm, smolvlm_images
    ),
    "qwen2_5_vl": Family(
        list(QWEN_MARKS.values()),
        "<|vision_start|><|image_pad|><|vision_end|>",
        QWEN_MARKS,
        "model.language_model.",
        qwen2_5_vl,
        qwen2_5_vl_images,
    ),
}


def make(family: str, text: Path, out: Path, *, patch: int = 8, width: int = 384, layers: int = 6, side: int = 128,
         seed: int = 0) -> Path:  # fmt: skip
    """Writes the model of the Llama folder `text` with a new tower into `out`. family: of FAMILIES."""
    if width % 64:
        raise ValueError(f"width={width}: expected a multiple of 64, a head")
    kind, shape, new = FAMILIES[family], Shape(patch, width, layers, side), Random(seed)
    config, weights = json.loads((text / "config.json").read_text()), load_file(text / "model.safetensors")
    config["head_dim"] = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": kind.marks})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", kind.image)
    config["vocab_size"] = -(-len(tokenizer) // 64) * 64
    scale = take_text(new, weights, config["vocab_size"], kind.inside)
    fields = kind.tower(new, config, scale, shape) | {
        "model_type": family,
        "dtype": "bfloat16",
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    fields |= {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in kind.ids.items()}
    images, processor = kind.images(shape)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    images.save_pretrained(out)
    (out / "processor_config.json").write_text(json.dumps(processor))
    (out / "config.json").write_text(json.dumps(fields, indent=2))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {name: tensor.astype(bfloat16) for name, tensor in new.tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def take_text(new: Random, weights: dict[str, np.ndarray], rows: int, inside: str) -> float:
    """A Llama's weights into `new`, its embedding (and head) with random rows behind, as many as make `rows`; the size
    of embeddings."""
    embedding = weights["model.embed_tokens.weight"].astype(np.float32)
    scale = float(embedding.std())
    more = new.rng.normal(0, scale, (rows - len(embedding), embedding.shape[1]))
    for name, weight in weights.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = np.concatenate([weight.astype(np.float32), more])
        new.tensors[name.replace("model.", inside, 1)] = weight
    return scale


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=tuple(FAMILIES))
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("side", 128), ("patch", 8), ("width", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(make(**vars(parser.parse_args())))
