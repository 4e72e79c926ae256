"""Small models whose every byte is known, and what of a .gguf file is compared with the converter's.

tests/golden/gguf_conversion.json holds the summaries of what llama.cpp's converter made of these folders;
tests/golden/make_gguf_conversion.py made it.
"""

import hashlib
import json
import zlib
from pathlib import Path

import gguf_tokenisers
import numpy as np
import tiny_models
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxtune.formats.gguf_file import GgufFile
from jaxtune.formats.gguf_tokenizer import PRE_TOKENIZERS

_LLAMA3 = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_GEMMA = {"query_pre_attn_scalar": 32}  # head_dim: what llama.cpp computes with
# name of the folder -> (family and RoPE of tiny_models, changed fields of the config, tokenizer)
CASES = {
    "Tiny-Llama-3-Instruct": ("llama", "llama3", {"rope_parameters": _LLAMA3}, "byte-level"),
    "llama-biases-v0.2": ("llama_bias", "default", {}, "byte-level"),
    "tied": ("llama_tied", "linear", {}, "sentencepiece"),
    "Mistral-x-chat-128k": ("mistral", "yarn", {}, "sentencepiece with a model file"),
    "qwen2": ("qwen2", "linear", {}, "qwen's byte-level"),
    "gemma-2": ("gemma2", "default", _GEMMA, "sentencepiece with a model file, without a space in front"),
    "Gemma-3-tiny": ("gemma3", "linear", _GEMMA, "sentencepiece with a model file, without a space in front"),
    "Qwen3-tied": ("qwen3_tied", "yarn", {}, "qwen's byte-level"),
}
SAMPLING = {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": 2}


def write_case(name: str, folder: Path) -> Path:
    """The Hugging Face folder of a case."""
    family, rope, changes, kind = CASES[name]
    config = tiny_models.make_config(family, rope, num_hidden_layers=1, **changes)
    model = tiny_models.make_model(config)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            count = np.arange(values.numel(), dtype=np.uint64)
            numbers = (count * 2654435761 + zlib.crc32(parameter.encode())) % 997
            values.copy_(torch.from_numpy((numbers / 997 - 0.5).astype(np.float32)).reshape(values.shape))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    core = _sentencepiece("without" in kind) if "sentencepiece" in kind else _byte_level("qwen" in kind)
    special = (
        ("<s>", "<|im_end|>", "<unk>") if "sentencepiece" in kind else ("<|endoftext|>", "<|im_end|>", None)
    )
    tokenizer = gguf_tokenisers.fast(core, **dict(zip(("bos_token", "eos_token", "unk_token"), special)))
    tokenizer.chat_template = tiny_models.CHATML
    tokenizer.save_pretrained(folder)
    if "model file" in kind:
        gguf_tokenisers.write_model_file(core, folder / "tokenizer.model")
        # transformers 4 wrote this, and the converter takes added tokens from nowhere else
        file = folder / "tokenizer_config.json"
        added = {str(i): vars_of(token) for i, token in tokenizer.added_tokens_decoder.items()}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": added}))
    return folder


def pre_tokenizer(name: str) -> str:
    """The pre-tokenizer of a case; the converter itself knows only the hashes of published vocabularies."""
    return "qwen2" if "qwen" in CASES[name][3] else "gpt-2"


def vars_of(token: AddedToken) -> dict:
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {field: getattr(token, field) for field in fields}


def _byte_level(qwen: bool) -> Tokenizer:
    """Bytes, a few merges, an added token with a hole before it; nothing is trained, so no version matters."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            gguf_tokenisers.split_steps(*PRE_TOKENIZERS["qwen2"].splits)
        )
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    core.add_tokens(
        [AddedToken("two words", normalized=False), AddedToken("<|looks_special|>", normalized=False)]
    )
    return core


def _sentencepiece(gemma: bool) -> Tokenizer:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a")]
    letters = ["▁", *"abcdefghijklmnop", "t"]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *map("".join, merges), *letters]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = gguf_tokenisers.llama_2_normalizer()
    if gemma:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    core.add_tokens([AddedToken("▁<tool>", normalized=False)])
    return core


def described(metadata: dict) -> list[list]:
    """Keys in order with type and value, long values as a hash."""
    return [[key, *_described(value)] for key, value in metadata.items()]


def summary(path: Path) -> dict:
    """What is compared: keys in order with type and value, tensors with shape and a hash of their float32."""
    file = GgufFile(path)
    keys = described(file.typed_metadata())
    tensors = {
        name: [list(file.tensors[name].shape), _hash(file.read(name).astype("<f4").tobytes())]
        for name in sorted(file.tensors)
    }
    return {"keys": keys, "tensors": tensors}


def _described(value) -> tuple[str, object]:
    if isinstance(value, (str, bool)):
        return type(value).__name__, value
    if isinstance(value, list):
        return f"str[{len(value)}]", _hash("\0".join(value).encode())
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{value.size}]", _hash(value.tobytes())
    return value.dtype.name, float(value) if value.dtype.kind == "f" else int(value)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
