"""Tokenizers of different kinds, small datasets in every format, and TRL's SFTTrainer as the judge of preparation."""

import copy
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "What is the capital of France?\n\nThe capital of France is Paris.\n",
    "Add two numbers: 12 + 30 = 42. Explain each step.\nFirst add the tens, then the ones.\n\n",
    "### Instruction:\nSay hello.\n\n### Response:\nHello there, how are you today?\n",
    "user assistant system tool You are a helpful assistant. weather city temperature degrees",
]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI_TOKENS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_sep|>"]
TEMPLATE_TOKENS = [*CHATML_TOKENS, *LLAMA3_TOKENS, *GEMMA_TOKENS, *PHI_TOKENS]

ARGUMENTS = {
    "max_length": 1024,
    "packing": False,
    "packing_strategy": "bfd",
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "dataset_text_field": "text",
    "eos_token": None,
    "shuffle_dataset": False,
    "seed": 42,
    "chat_template_path": None,
    "dataset_kwargs": None,
}


def make_byte_level(bos_added: bool = False) -> transformers.PreTrainedTokenizerBase:
    """Byte-level BPE with merged newlines (as Llama 3 and Qwen have them) and the field's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *["\n\n\n a\n\n b\n"] * 5] * 3, trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in TEMPLATE_TOKENS]
    tokenizer.add_special_tokens(special)
    if bos_added:
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>" if bos_added else "<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def make_sentencepiece_like() -> transformers.PreTrainedTokenizerBase:
    """Llama 2's kind: spaces as U+2581, one before the text, newlines as byte tokens, BOS added."""
    words = sorted({word for text in CORPUS for word in text.split()})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters = sorted({letter for word in words for letter in word})
    merges, vocab = [], {piece: index for index, piece in enumerate([*pieces, *letters])}
    for word in words:
        built = "\u2581"
        for letter in word:
            if built + letter not in vocab:
                vocab[built + letter] = len(vocab)
                merges.append((built, letter))
            built += letter
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def byte_level():
    return make_byte_level()


@pytest.fixture
def byte_level_bos():
    return make_byte_level(bos_added=True)


@pytest.fixture
def sentencepiece_like():
    return make_sentencepiece_like()


@pytest.fixture
def smollm2(smollm2_dir):
    return transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def trl_templates() -> Path:
    """The chat templates that the installed TRL knows."""
    import trl

    return Path(trl.__file__).parent / "chat_templates"


@pytest.fixture
def arguments():
    """SFTConfig's data fields with TRL's defaults; keywords replace some."""

    def make(**changes) -> SimpleNamespace:
        assert set(changes) <= set(ARGUMENTS)
        return SimpleNamespace(**ARGUMENTS | changes)

    return make


@pytest.fixture
def trl_trainer(tmp_path):
    """`trl_trainer(rows, tokenizer, formatting_func=None, **config)` -> a real TRL SFTTrainer around a tiny model."""

    def make(rows, tokenizer, formatting_func=None, **config):
        from transformers import LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig, SFTTrainer

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
        )
        return SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                **config,
            ),
            train_dataset=rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
            formatting_func=formatting_func,
        )

    return make
