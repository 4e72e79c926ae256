"""Tokenizers and texts for the tests of GGUF vocabularies, and a way to put a vocabulary before llama.cpp."""

import json
import struct
import unicodedata
from pathlib import Path

import numpy as np
import transformers
from gguf.constants import GGMLQuantizationType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.formats import sentencepiece_model as spm

CORPUS = [
    "",
    " ",
    "  leading and trailing  ",
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? WE'LL see: 3.14159!",
    "I'm you're he'd she'll they've IT'S don'T 's 't x's",
    "a  b   c    d\t\te \t f\n\n\ng\r\nh \n i\u00a0j\u3000k\u2009l",
    "def f(x: int) -> str:\n\treturn {'a': x  +  1, \"b\": [x**2, x//3]}\r\n\r\n# done; 0xFF != 1e-5",
    "2024-01-02 $1,000,000.00 +49 (0)30 123456 1 22 333 4444 55555 ½ Ⅷ ٣٤٥ १२३",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Þórður æfði. Straße, naïve, œuvre, Ünïcödé.",
    "Съешь ещё этих мягких французских булок, да выпей же чаю. Щ ъ ы!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ελληνικά;",
    "敏捷的棕色狐狸跳过懒狗。你好，世界！『引用』、《书名》",
    "いろはにほへと ちりぬるを。カタカナ・ひらがな 漢字、東京タワー。ｶﾀｶﾅ",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. فارسی گچپژ",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה. שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा। বাংলা ভাষা தமிழ்",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า កាន់តែពិសេស ლამაზი հայերեն",
    "🙂🚀👩‍👩‍👧‍👦🏳️‍🌈✅ 😶‍🌫️ ☃ ♫♪ ∑∫√≈ → ⇒ ™ © …—–„“”‚‘’",
    "snake_case camelCase HTTPServer __init__ x_1 ½cup ﬁn a·b",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "one<|im_end|> two <|im_end|>three<|im_end|><|im_end|>",
    "<s>[INST] Hello [/INST] there</s>",
    "https://example.org/a?b=c&d=%20#e user@host.io C:\\dir\\x.txt ~/.bashrc",
    "\n", "\n\n", "\t", "x", "0", "'", "\r\n", " \n", "\n ",
]  # fmt: skip
# llama.cpp never normalises; the corpus is in NFC, so that Qwen's NFC changes nothing.
assert all(unicodedata.is_normalized("NFC", text) for text in CORPUS)


def write_vocabulary(path: Path, tokenizer_keys: dict) -> Path:
    """A model of one empty layer with the given tokenizer.* keys, for llama.cpp to load."""
    width, rows, zeros = 32, len(tokenizer_keys["tokenizer.ggml.tokens"]), {}
    for name in ("attn_norm", "ffn_norm"):
        zeros[f"blk.0.{name}.weight"] = (width,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        zeros[f"blk.0.{name}.weight"] = (width, width)
    zeros |= {"output_norm.weight": (width,), "token_embd.weight": (rows, width)}
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": width}
    sizes |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    keys = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in sizes.items()}
    keys |= {"llama.attention.layer_norm_rms_epsilon": 1e-5} | tokenizer_keys
    kind = GGMLQuantizationType.F32
    entries = [TensorEntry(name, shape, kind) for name, shape in zeros.items()]
    with GgufWriter(path, keys, entries) as writer:
        for entry in entries:
            writer.write(entry.name, np.zeros(entry.shape, np.float32))
    return path


def differing(loaded, tokenizer, texts=CORPUS) -> list[tuple[str, tuple[bool, bool], list[int], list[int]]]:
    """(text, mode, llama.cpp's ids, the tokenizer's) wherever the two disagree.

    A mode is whether BOS and EOS are added, and whether special tokens in the text are recognised.
    """
    found = []
    for text in texts:
        for add, parse in ((True, True), (False, True), (False, False)):
            ours = loaded.tokenise(text, add_special=add, parse_special=parse)
            theirs = tokenizer.encode(text, add_special_tokens=add, split_special_tokens=not parse)
            if ours != theirs:
                found.append((text, (add, parse), ours, theirs))
    return found


def byte_level(steps: list, *, vocab_size: int = 700, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE trained on the corpus behind the given pre-tokenizer steps."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 2, trainer)
    return core


def split_steps(*patterns: str, digits: bool = False, gpt2: bool = False) -> list:
    """Pre-tokenizer steps: regexes, digits one by one, and byte level with or without GPT-2's own split."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)]


def sentencepiece(prefix: str = "always", *, vocab_size: int = 900) -> Tokenizer:
    """A SentencePiece-like BPE with byte fallback; `prefix` as Metaspace's scheme, or "normalizer" (Llama 2)."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=pieces,
        show_progress=False,
        max_token_length=12,
    )
    words = [word for text in CORPUS if "<" not in text for word in text.split()]
    core.train_from_iterator(words * 2, trainer)
    vocab, merges = _parts(core)
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "normalizer":
        core.normalizer = llama_2_normalizer()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    return core


def llama_2_normalizer():
    """A bar in front and for every space."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _parts(core: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def fast(core: Tokenizer, **special) -> transformers.PreTrainedTokenizerFast:
    """transformers' tokenizer around `core`."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )


def write_model_file(core: Tokenizer, path: Path) -> Path:
    """The tokenizer.model that a SentencePiece tokenizer's tokenizer.json was converted from."""
    vocab, merges = _parts(core)
    order = {}
    for left, right in merges:
        order.setdefault(left + right, -float(len(order)))
    data = b""
    for text, i in sorted(vocab.items(), key=lambda item: item[1]):
        kind = {0: spm.UNKNOWN, 1: spm.CONTROL, 2: spm.CONTROL}.get(i, spm.BYTE if i < 259 else spm.NORMAL)
        raw = text.encode()
        piece = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", order.get(text, 0.0))
        piece += b"\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x18\x02\x98\x02\x01"  # TrainerSpec: model_type BPE, byte_fallback
    path.write_bytes(data + b"\x12" + bytes([len(trainer)]) + trainer)
    return path
