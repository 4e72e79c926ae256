"""Tokenizers in GGUF: llama.cpp's ids against the tokenizer's own, and where llama.cpp stops."""

import json
import logging
import unicodedata

import numpy as np
import pytest
import transformers
from gguf_tokenisers import (
    CORPUS,
    byte_level,
    differing,
    fast,
    sentencepiece,
    split_steps,
    write_model_file,
    write_vocabulary,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.processors import TemplateProcessing

from jaxtune.export.gguf_vocabulary import harmless_name, vocabulary
from jaxtune.formats.gguf_tokenizer import PRE_TOKENIZERS, load_tokenizer
from jaxtune.formats.sentencepiece_model import read_pieces
from jaxtune.models import llama, qwen3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def keys_of(tokenizer, *, rows=None, family=llama.GGUF, generation=None, **ids):
    """The vocabulary's keys without their prefix."""
    ids = {"bos_token_id": None, "eos_token_id": 0} | ids
    config = transformers.PretrainedConfig(vocab_size=rows or len(tokenizer), **ids)
    keys = vocabulary(tokenizer, config, family, generation=generation or {})
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in keys.items()}


@pytest.fixture
def judge(llama_cpp, tmp_path):
    """`judge(tokenizer, **options)` -> the vocabulary loaded by llama.cpp, and its keys."""
    opened = []

    def load(tokenizer, **options):
        keys = keys_of(tokenizer, **options)
        prefixed = {
            f"tokenizer.{'' if 'chat' in key else 'ggml.'}{key}": value for key, value in keys.items()
        }
        path = write_vocabulary(tmp_path / f"{len(opened)}.gguf", prefixed)
        opened.append(llama_cpp.load(path, context=64))
        return opened[-1], keys

    yield load
    for model in opened:
        model.__exit__()


NAMES = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "stablelm2", "tekken", "deepseek-coder"]


@pytest.mark.parametrize("name", NAMES)
def test_byte_level_tokenizers_split_alike(judge, name):
    """Any vocabulary: the rules alone give the name."""
    pre = PRE_TOKENIZERS[name]
    core = byte_level(
        split_steps(*pre.splits, digits=pre.digits, gpt2=pre.gpt2), ignore_merges=pre.ignore_merges
    )
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    tokenizer = fast(core, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    model, keys = judge(tokenizer)
    assert keys["pre"] == name
    texts = CORPUS
    if name == "tekken":  # llama.cpp's form of this regex leaves combining marks out of words
        texts = [text for text in texts if not any(unicodedata.category(c) in ("Mn", "Mc") for c in text)]
    assert differing(model, tokenizer, texts) == []


def test_every_pre_tokenizer_in_the_table_is_tried():
    assert {PRE_TOKENIZERS[name] for name in NAMES} == set(PRE_TOKENIZERS.values())


def spm(prefix="normalizer"):
    return fast(sentencepiece(prefix), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", ["normalizer", "never", "bars"])
def test_sentencepiece_without_its_model_file(judge, prefix):
    tokenizer = spm("normalizer" if prefix == "bars" else prefix)
    if prefix == "bars":  # what transformers makes of a bare tokenizer.model of Mistral
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    model, keys = judge(tokenizer, rows=len(tokenizer) + 7)
    assert keys["model"] == "llama" and keys.get("add_space_prefix", True) == (prefix == "normalizer")
    assert differing(model, tokenizer) == []
    assert keys["tokens"][-1] == f"[PAD{len(tokenizer) + 6}]" and keys["token_type"][-1] == 5


def test_sentencepiece_whose_space_in_front_gguf_cannot_say(judge, caplog):
    """ "always" differs where a text begins with a space; "first" is written so that chats are right."""
    tokenizer = spm("always")
    different = differing(judge(tokenizer)[0], tokenizer)
    assert different and all(text[0] == " " for text, *_ in different)
    tokenizer = spm("first")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    with caplog.at_level(logging.WARNING):
        model, keys = judge(tokenizer)
    assert keys["add_space_prefix"] is False and "right for chats" in caplog.text
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in CORPUS] + ["<s>[INST] x [/INST] y</s>"]
    assert [found for found in differing(model, tokenizer, chats) if found[1] != (False, False)] == []


def with_added_tokens(tokenizer):
    """Special, plain and spaced tokens beyond the vocabulary, and two of the vocabulary that get another type."""
    core = tokenizer.backend_tokenizer
    ordinary = core.id_to_token(400)
    specials = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", core.id_to_token(401)]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    core.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "two words", ordinary)])
    return tokenizer, ["a<tool>b two words c", "  two words", f"x{ordinary}y", f"x {specials[-1]} y"]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_added_and_retyped_tokens(judge, kind):
    base = (
        spm() if kind == "sentencepiece" else fast(byte_level(split_steps(gpt2=True)), eos_token="<|im_end|>")
    )
    tokenizer, texts = with_added_tokens(base)
    model, keys = judge(tokenizer, rows=len(tokenizer) + 1)
    assert differing(model, tokenizer, CORPUS + texts) == []
    type_of = dict(zip(keys["tokens"], keys["token_type"].tolist()))
    assert (type_of["<|im_end|>"], type_of["<tool>"], type_of["two words"]) == (3, 4, 4)
    assert keys["token_type"][[400, 401]].tolist() == [4, 3]


def test_scores_of_the_model_file_are_used_where_they_agree(judge, tmp_path):
    """With tokenizer.model its scores are taken, unless the tokenizer joins pieces in another order."""
    core = sentencepiece("normalizer")
    file = write_model_file(core, tmp_path / "tokenizer.model")
    fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer, texts = with_added_tokens(tokenizer)
    model, keys = judge(tokenizer)
    pieces = read_pieces(file)
    same = [i for i in range(259, len(pieces)) if i not in (400, 401)]
    np.testing.assert_array_equal(keys["scores"][same], np.float32([pieces[i].score for i in same]))
    assert differing(model, tokenizer, CORPUS + texts) == []
    damaged = file.read_bytes().replace(np.float32(-1.0).tobytes(), np.float32(-1e4).tobytes())
    file.write_bytes(damaged)
    model, keys = judge(tokenizer)
    assert keys["scores"].min() > -1e4 or -1e4 not in keys["scores"]
    assert differing(model, tokenizer, CORPUS + texts) == []


def test_names_that_llama_cpp_takes_for_another_model(judge):
    tokenizer = chat_tokenizer()
    assert harmless_name("My-Phi3 mini", tokenizer) == "My-Phi 3 mini"
    assert harmless_name("A phi-3 rival", tokenizer) == "A phi 3 rival"
    assert harmless_name("Qwen3", tokenizer) == "Qwen3"
    core = sentencepiece("normalizer")
    core.add_special_tokens([AddedToken("<|endoftext|>", rstrip=True), AddedToken("<|end|>", rstrip=True)])
    assert harmless_name("Phi-3-mini", fast(core)) == "Phi-3-mini"


@pytest.mark.parametrize("ends", [(), ("bos",), ("eos",), ("bos", "eos")])
@pytest.mark.parametrize("kind", ["sentencepiece", "gpt-2", "llama-bpe"])
def test_bos_and_eos_are_added_as_the_tokenizer_adds_them(judge, kind, ends):
    """Whatever llama.cpp does by default for that kind of tokenizer."""
    if kind == "sentencepiece":
        tokenizer = spm()
    else:
        pre = PRE_TOKENIZERS[kind]
        core = byte_level(split_steps(*pre.splits, gpt2=pre.gpt2), ignore_merges=pre.ignore_merges)
        tokenizer = fast(core, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    single = f"{bos if 'bos' in ends else ''} $A {eos if 'eos' in ends else ''}".split()
    known = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=known)
    model, _ = judge(tokenizer)
    assert differing(model, tokenizer, ["Hello world", "", "x y"]) == []


def test_a_token_in_front_that_goes_by_no_name_is_bos(judge):
    core = byte_level(split_steps(gpt2=True))
    core.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer = fast(core, eos_token="<|im_end|>")
    model, _ = judge(tokenizer)
    assert model.bos == 1 and differing(model, tokenizer) == []


def test_a_setting_that_the_tokenizer_does_not_follow_is_not_written(judge):
    """tokenizer_config.json may say add_bos_token of a tokenizer.json whose rules add none."""
    tokenizer = spm()
    tokenizer.init_kwargs["add_bos_token"] = True
    model, keys = judge(tokenizer)
    assert keys["add_bos_token"] is False and differing(model, tokenizer) == []


def chat_tokenizer(template=CHATML, eos="<|endoftext|>", extra=("<|turn|>",)):
    core = byte_level(split_steps(gpt2=True), vocab_size=300)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in extra])
    tokenizer = fast(core, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def test_llama_cpp_stops_where_the_model_does(judge):
    """EOS, the end of a turn and all ends of generation_config.json; only those."""
    tokenizer = chat_tokenizer(CHATML.replace("im_end", "turn"), extra=("<|turn|>", "<|stop|>", "<|other|>"))
    ids = tokenizer.get_vocab()
    model, keys = judge(tokenizer, generation={"eos_token_id": [ids["<|endoftext|>"], ids["<|stop|>"]]})
    ends = {"<|endoftext|>", "<|stop|>", "<|turn|>", "<|im_end|>"}  # the last one by its name, as ever
    assert {text for text, i in ids.items() if model.is_end(i)} == ends
    assert {keys["eot_token_id"], keys["eom_token_id"]} == {ids["<|stop|>"], ids["<|turn|>"]}
    assert model.eos == ids["<|endoftext|>"] and model.chat_template == tokenizer.chat_template


def test_ends_that_llama_cpp_knows_need_no_key(judge):
    tokenizer = chat_tokenizer(eos="<|im_end|>")
    model, keys = judge(tokenizer, generation={"eos_token_id": [0, 2]})
    assert not {"eot_token_id", "eom_token_id"} & set(keys)
    assert model.is_end(0) and model.is_end(2) and not model.is_end(1)


def test_a_renamed_eos(judge):
    """What get_chat_template does where a vocabulary lacks the stop word."""
    state = json.loads(sentencepiece("normalizer").to_str())
    state["added_tokens"][2]["content"] = "<|stop|>"
    state["model"]["vocab"]["<|stop|>"] = state["model"]["vocab"].pop("</s>")
    tokenizer = fast(Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="<|stop|>")
    model, keys = judge(tokenizer)
    assert keys["tokens"][2] == "<|stop|>" and model.eos == 2 and model.is_end(2)


def test_ids_that_only_the_config_names(judge):
    tokenizer = fast(byte_level(split_steps(gpt2=True)))
    model, _ = judge(tokenizer, bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
    assert (model.bos, model.eos, model.pad) == (1, 2, 0)
    with pytest.raises(ValueError, match="nothing says which token ends a text"):
        keys_of(tokenizer, eos_token_id=None)


def test_several_chat_templates():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool use": "{{ tools }}"}
    keys = keys_of(tokenizer)
    assert (keys["chat_template"], keys["chat_template.tool_use"]) == (CHATML, "{{ tools }}")
    assert keys["chat_templates"] == ["tool_use"]


def refused_tokenizers():
    gpt2 = byte_level(split_steps(gpt2=True))
    unknown = byte_level(split_steps(r"\p{L}+|\p{N}{2}"))
    yield "has no name for this tokenizer's pre-tokenizer", fast(unknown)
    yield (
        "has no pre-tokenizer with the step",
        fast(byte_level([pre_tokenizers.Whitespace(), *split_steps()])),
    )
    lower = byte_level(split_steps(gpt2=True))
    lower.normalizer = normalizers.Lowercase()
    yield "cannot normalise text as this tokenizer does", fast(lower)
    yield "a WordLevel tokenizer cannot be exported", fast(Tokenizer(models.WordLevel({"a": 0}, "a")))
    spaced = sentencepiece("never")
    spaced.normalizer = normalizers.NFKC()
    yield "no counterpart to this one's rules", fast(spaced)
    two = byte_level(split_steps(gpt2=True))
    two.post_processor = processors.TemplateProcessing("<a> <b> $A", None, [("<a>", 1), ("<b>", 2)])
    yield "room for the BOS token only", fast(two)
    gpt2.add_tokens([AddedToken("a▁b"), AddedToken("a b")])
    yield "two tokens have the same text 'a b'", fast(gpt2)


@pytest.mark.parametrize("case", range(7))
def test_what_gguf_cannot_say_is_refused(case):
    message, tokenizer = list(refused_tokenizers())[case]
    with pytest.raises(ValueError, match=message):
        keys_of(tokenizer, rows=1000)


def test_more_tokens_than_rows_and_too_many_ends():
    tokenizer = chat_tokenizer(extra=("<|a|>", "<|b|>", "<|c|>"))
    with pytest.raises(
        ValueError, match=r"3 tokens beyond the 300 rows of the embedding .first: .<.a.>., id 300"
    ):
        keys_of(tokenizer, rows=300)
    with pytest.raises(ValueError, match="room for EOS and two more"):
        keys_of(tokenizer, generation={"eos_token_id": [300, 301, 302]})


def test_a_named_pre_tokenizer_is_taken():
    config = transformers.PretrainedConfig(vocab_size=700, bos_token_id=None, eos_token_id=0)
    tokenizer = fast(byte_level(split_steps(r"\p{L}+|\p{N}{2}")))
    keys = vocabulary(tokenizer, config, llama.GGUF, generation={}, pre_tokenizer="falcon")
    assert keys["tokenizer.ggml.pre"] == "falcon" and keys["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_reading_a_vocabulary_back(tmp_path, kind):
    """The tokenizer that jaxtune makes of the keys does what the exported one did."""
    if kind == "sentencepiece":
        tokenizer, _ = with_added_tokens(spm())
    else:
        pre = PRE_TOKENIZERS["llama-bpe"]
        core = byte_level(split_steps(*pre.splits), ignore_merges=True)
        tokenizer, _ = with_added_tokens(fast(core, eos_token="<|im_end|>"))
    keys = vocabulary(
        tokenizer, transformers.PretrainedConfig(vocab_size=len(tokenizer)), llama.GGUF, generation={}
    )
    metadata = {"general.architecture": "llama", "llama.context_length": 64} | keys
    again = load_tokenizer(
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()},
        tmp_path / "m.gguf",
    )
    assert again.unk_token == tokenizer.unk_token and again.eos_token == tokenizer.eos_token
    inside = [json.loads(t.backend_tokenizer.to_str())["model"]["unk_token"] for t in (again, tokenizer)]
    assert inside[0] == inside[1]
    for text in CORPUS:
        assert again.encode(text) == tokenizer.encode(text), text


def test_smollm2(judge, smollm2_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    model, keys = judge(tokenizer)
    assert keys["pre"] == "smollm" and differing(model, tokenizer) == []
    assert model.is_end(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert keys["add_bos_token"] is False  # said for this vocabulary size, as the converter does


def test_qwen3(judge, shared_data):
    """151,669 tokens and a padded embedding. An ordinary token "</s>" is taken for an end by llama.cpp."""
    folder = shared_data / "tokenizers" / "qwen"
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    core = Tokenizer(models.BPE(vocab, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(split_steps(*PRE_TOKENIZERS["qwen2"].splits))
    settings = json.loads((folder / "tokenizer_config_qwen3.json").read_text("utf-8"))
    added = [AddedToken(**token) for _, token in sorted(settings["added_tokens_decoder"].items())]
    for token in added:
        (core.add_special_tokens if token.special else core.add_tokens)([token])
    tokenizer = fast(core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = settings["chat_template"]
    model, keys = judge(tokenizer, rows=151936, family=qwen3.GGUF)
    assert keys["pre"] == "qwen2" and keys["tokens"][-1] == "[PAD151935]"
    texts = [text for text in CORPUS if "</s>" not in text] + ["<think>\nx\n</think>\n\n<tool_call>"]
    assert differing(model, tokenizer, texts) == []
    assert model.is_end(tokenizer.eos_token_id)


def test_mistral(judge, shared_data, tmp_path):
    """A published SentencePiece model, with and without tokenizer.model beside the tokenizer."""
    file = shared_data / "tokenizers" / "mistral_v3" / "tokenizer.model"
    pieces = read_pieces(file)
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.kind for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = load_tokenizer(metadata, tmp_path / "m.gguf")
    texts = [*CORPUS, "[INST] Hello [/INST] Hi</s>", "fiber.  How many"]
    for name in ("", str(file.parent)):
        tokenizer.name_or_path = name
        model, keys = judge(tokenizer)
        assert differing(model, tokenizer, texts) == []
        assert (keys["scores"][1100] == pieces[1100].score) == bool(name)
