import json
import random
from itertools import pairwise

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from jaxtune.formats.gguf_file import GgufFile
from jaxtune.formats.gguf_tokenizer import PRE_TOKENIZERS, load_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? WE'LL see: 3.14159!",
    "def f(x):\n\treturn x  +  1\r\n\r\n# Ünïcödé naïve café 东京 こんにちは 🙂 e\u0301",
    "a  b   c\n\n\n  d 2024-01-02 $1,000,000 <tag> \u00a0 HelloWorld camelCase",
]


def texts(count: int) -> list[str]:
    """Seeded strings of words, digits, spaces, punctuation, line ends and several scripts."""
    rng = random.Random(0)
    parts = [
        "hello",
        "World",
        "don't",
        "WE'LL",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "42",
        "123456",
        "é",
        "e\u0301",
    ]
    parts += [
        "东京",
        "こん",
        "🙂",
        "👩‍👩‍👧",
        "...",
        "!?",
        "<|im_start|>",
        "<|im_end|>",
        "x=1;",
        "’s",
        "_a",
        "ﬁ",
        "½",
        "٣",
        "\u00a0",
    ]
    return [
        (" " if rng.random() < 0.5 else "").join(rng.choices(parts, k=rng.randint(0, 12)))
        for _ in range(count)
    ]


def merges_of(core: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def metadata(core: Tokenizer, pre: str, control: tuple[str, ...], **extra) -> dict:
    """What llama.cpp's converter writes for a byte-level BPE."""
    vocab = core.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = [" ".join(pair) for pair in merges_of(core)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab[control[0]],
        "tokenizer.ggml.eos_token_id": vocab[control[1]],
        "tokenizer.chat_template": TEMPLATE,
    } | extra


def trained(steps) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    return core


CONTROL = ("<|im_start|>", "<|im_end|>")


def judge_of(pre: str) -> list:
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_ids_equal_the_tokenizer_that_the_file_was_made_from(tmp_path, pre):
    core = trained(judge_of(pre))
    ours = load_tokenizer(metadata(core, pre, CONTROL), tmp_path / "m.gguf")
    if pre == "qwen2":
        judge = transformers.Qwen2Tokenizer(vocab=core.get_vocab(), merges=merges_of(core))
        judge.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    else:
        judge = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    if PRE_TOKENIZERS[pre].ignore_merges:
        core.model.ignore_merges = True
    for text in texts(300):
        expected = judge(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == expected, text
    starts = ours("hello").input_ids[0] == ours.bos_token_id
    assert starts == PRE_TOKENIZERS[pre].bos


@pytest.mark.parametrize(
    ("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("smaug-bpe", False), ("qwen2", False)]
)
def test_a_token_without_merges(tmp_path, pre, whole):
    """Llama 3 takes a word that is a token whole, although no merges lead to it."""
    meta = metadata(trained(judge_of(pre)), pre, CONTROL)
    meta["tokenizer.ggml.tokens"].append("Ġxyzzy")
    meta["tokenizer.ggml.token_type"].append(1)
    ours = load_tokenizer(meta, tmp_path / "m.gguf")
    assert (len(ours(" xyzzy", add_special_tokens=False).input_ids) == 1) == whole


def test_splits_equal_transformers_table():
    """Every name both know is split by the same regex."""
    shared = [pre for pre in PRE_TOKENIZERS if pre in GGUF_PRE_TOKENIZER_SPLITS]
    assert len(shared) >= 10
    for pre in shared:
        assert PRE_TOKENIZERS[pre].splits == (GGUF_PRE_TOKENIZER_SPLITS[pre],), pre


def test_round_trip_through_save_pretrained(tmp_path):
    core = trained(judge_of("llama-bpe"))
    ours = load_tokenizer(metadata(core, "llama-bpe", CONTROL), tmp_path / "m.gguf")
    ours.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts(100):
        assert again(text).input_ids == ours(text).input_ids
        ids = ours(text, add_special_tokens=False).input_ids
        assert again.decode(ids) == text
    message = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(message, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert (again.bos_token, again.eos_token) == CONTROL


def test_bos_and_eos_follow_the_file(tmp_path):
    core = trained(judge_of("gpt-2"))
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ours = load_tokenizer(metadata(core, "gpt-2", CONTROL, **keys), tmp_path / "m.gguf")
    ids = ours("hello").input_ids
    assert (ids[0], ids[-1]) == (ours.bos_token_id, ours.eos_token_id)
    keys = {"tokenizer.ggml.add_bos_token": False}
    ours = load_tokenizer(metadata(core, "llama-bpe", CONTROL, **keys), tmp_path / "m.gguf")
    assert ours("hello").input_ids[0] != ours.bos_token_id


def sentencepiece_ids(text: str, vocab: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours whose piece scores best, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[vocab[a + b]], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in vocab]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [vocab[piece]] if piece in vocab else [vocab[f"<0x{b:02X}>"] for b in piece.encode()]
    return ids


def test_sentencepiece(tmp_path):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    learnt = sorted(core.get_vocab(), key=core.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learnt]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learnt))]
    vocab = {token: i for i, token in enumerate(tokens)}
    meta = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(learnt),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = load_tokenizer(meta, tmp_path / "m.gguf")
    for text in [t.replace("<|im_start|>", "").replace("<|im_end|>", "") for t in texts(200)]:
        expected = sentencepiece_ids(text, vocab, scores) if text else []
        assert ours(text, add_special_tokens=False).input_ids == expected, text
        assert ours.decode(expected) == text
    assert ours("a<s>b").input_ids.count(1) == 2  # the one in front and the one in the text


def test_unknown_pre_tokenizer_is_never_guessed(tmp_path):
    core = trained(judge_of("gpt-2"))
    meta = metadata(core, "brand-new", CONTROL)
    with pytest.raises(ValueError, match=r"\.pre = 'brand-new'.*Put the original tokenizer\.json"):
        load_tokenizer(meta, tmp_path / "m.gguf")
    judge = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    judge.save_pretrained(tmp_path)
    assert load_tokenizer(meta, tmp_path / "m.gguf")("It's 12").input_ids == judge("It's 12").input_ids


def test_smollm2_equals_the_converted_folder(smollm2_gguf, smollm2_dir):
    """Many texts, among them digits after two spaces, which a plain byte-level split gets wrong."""
    ours = load_tokenizer(GgufFile(smollm2_gguf).metadata, smollm2_gguf)
    judge = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    for text in [*texts(1500), *CORPUS, "  3 apples", "a  12  b"]:
        assert ours(text).input_ids == judge(text).input_ids, text
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for prompt in (True, False):
        arguments = {"tokenize": False, "add_generation_prompt": prompt}
        assert ours.apply_chat_template(messages, **arguments) == judge.apply_chat_template(
            messages, **arguments
        )
    assert ours.special_tokens_map == judge.special_tokens_map
