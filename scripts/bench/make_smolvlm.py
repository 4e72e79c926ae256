"""A vision-language model that has yet to learn to see: SmolLM2's weights behind a small random tower, as SmolVLM.

    python scripts/bench/make_smolvlm.py SMOLLM2_FOLDER OUT [--side 128] [--patch 8] [--width 384] [--layers 6]

Writes a folder that transformers and FastVisionModel load: config, weights in bfloat16, tokenizer with SmolVLM's marks
of images, processor. An image is scaled to one square of `side` pixels (to several with --longest_edge), which makes
(side / patch / 4)² tokens. Needs no torch; 1 GB of memory and a few seconds for SmolLM2-135M.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, SmolVLMImageProcessorPil

FACTOR = 4  # patches of a side that become one token
MARKS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
MARKS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tower_weights(vision: dict, out: int, scale: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The random weights of tower and connector, float32; image features start at the size `scale` of embeddings."""
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, std: float) -> None:
        tensors[f"model.{name}"] = rng.normal(0, std, shape).astype(np.float32)

    def norm(name: str) -> None:
        tensors[f"model.{name}.weight"], tensors[f"model.{name}.bias"] = np.ones(width), np.zeros(width)

    def linear(name: str, rows: int, columns: int, std: float) -> None:
        add(f"{name}.weight", rows, columns, std=std)
        tensors[f"model.{name}.bias"] = np.zeros(rows)

    root = "vision_model.embeddings"
    add(f"{root}.patch_embedding.weight", width, 3, patch, patch, std=(3 * patch**2) ** -0.5)
    tensors[f"model.{root}.patch_embedding.bias"] = np.zeros(width)
    add(f"{root}.position_embedding.weight", (vision["image_size"] // patch) ** 2, width, std=0.2)
    for layer in range(vision["num_hidden_layers"]):
        root, depth = f"vision_model.encoder.layers.{layer}", (2 * vision["num_hidden_layers"]) ** 0.5
        norm(f"{root}.layer_norm1")
        norm(f"{root}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{root}.self_attn.{name}", width, width, width**-0.5)
        linear(f"{root}.self_attn.out_proj", width, width, width**-0.5 / depth)
        linear(f"{root}.mlp.fc1", inner, width, width**-0.5)
        linear(f"{root}.mlp.fc2", width, inner, inner**-0.5 / depth)
    norm("vision_model.post_layernorm")
    fan = width * FACTOR**2
    add("connector.modality_projection.proj.weight", out, fan, std=scale * fan**-0.5)
    return tensors


def make(text: Path, out: Path, *, side=128, patch=8, width=384, layers=6, longest_edge=None, seed=0) -> Path:
    """Writes the model of the Llama folder `text` with a new tower into `out`."""
    if side % (patch * FACTOR) or width % 64:
        raise ValueError(
            f"side={side}, patch={patch}, width={width}: expected a side of whole {FACTOR}-patches, width in 64s"
        )
    config, weights = json.loads((text / "config.json").read_text()), load_file(text / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": width // 64, "image_size": side, "patch_size": patch}
    rng, embedding = np.random.default_rng(seed), weights["model.embed_tokens.weight"].astype(np.float32)
    rows = -(-len(tokenizer) // 64) * 64
    new = rng.normal(0, embedding.std(), (rows - len(embedding), embedding.shape[1]))
    weights["model.embed_tokens.weight"] = np.concatenate([embedding, new])
    named = {
        name.replace("model.", "model.text_model.", 1): w
        for name, w in weights.items()
        if name != "lm_head.weight"
    }
    if "lm_head.weight" in weights:
        named["lm_head.weight"] = np.concatenate([weights["lm_head.weight"].astype(np.float32), new])
    named |= tower_weights(vision, embedding.shape[1], float(embedding.std()), rng)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    kind = np.dtype(ml_dtypes.bfloat16)
    save_file(
        {name: w.astype(kind) for name, w in named.items()}, out / "model.safetensors", {"format": "pt"}
    )
    fields = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "bfloat16",
        "text_config": config | {"vocab_size": rows},
        "vision_config": vision,
        "scale_factor": FACTOR,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": "lm_head.weight" not in named,
    }
    (out / "config.json").write_text(json.dumps(fields, indent=2))
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": longest_edge or side}, max_image_size={"longest_edge": side}
    )
    images.save_pretrained(out)
    tokens = (side // patch // FACTOR) ** 2
    (out / "processor_config.json").write_text(
        json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": tokens})
    )
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("side", 128), ("patch", 8), ("width", 384), ("layers", 6), ("longest_edge", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(make(**vars(parser.parse_args())))
