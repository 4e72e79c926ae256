"""Chat templates by name, and the marked variants that tell `assistant_only_loss` what the assistant said."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxtune.data import template_text as text

MARKS = re.compile(r"\s*\{%-?\s*(?:end)?generation\s*-?%\}\s*")
DEFAULT_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatTemplate:
    """One conversation format.

    Attributes:
        marked: Jinja source with generation marks (see template_text).
        stop_word: text that ends an assistant turn; None where that is the tokenizer's own EOS token.
        system: system message where a conversation has none; None for no such message.
        training: marked source for training on every assistant turn, where it differs from `marked`.
    """

    marked: str
    stop_word: str | None
    system: str | None = None
    training: str | None = None

    @property
    def plain(self) -> str:
        """The source that goes into a tokenizer: no marks, default system message included."""
        prelude = text.default_system(self.system) if self.system else ""
        return prelude + unmarked(self.marked)

    @property
    def assistant_marked(self) -> str:
        """The source that `assistant_only_loss` renders with."""
        prelude = text.default_system(self.system) if self.system else ""
        return prelude + (self.training or self.marked)


def unmarked(source: str) -> str:
    """`source` without its generation marks."""
    return MARKS.sub("", source)


def has_marks(source: str | None) -> bool:
    """True if the template says itself what the assistant generated."""
    return source is not None and MARKS.search(source) is not None


def _im(role: str) -> tuple[str, str]:
    return f"'<|im_start|>{role}\\n'", "'<|im_end|>\\n'"


def _llama_3(role: str) -> tuple[str, str]:
    return f"'<|start_header_id|>{role}<|end_header_id|>\\n\\n'", "'<|eot_id|>'"


def _phi_3(role: str) -> tuple[str, str]:
    return f"'<|{role}|>\\n'", "'<|end|>\\n'"


def _phi_4(role: str) -> tuple[str, str]:
    return f"'<|im_start|>{role}<|im_sep|>'", "'<|im_end|>'"


def _zephyr(role: str) -> tuple[str, str]:
    return f"'<|{role}|>\\n'", "eos_token + '\\n'"


_CHATML = {role: _im(role) for role in ("system", "user", "assistant", "tool")}
_GEMMA = {
    "user": (f"'<start_of_turn>user\\n' + {text.FIRST_USER_PREFIX}", "'<end_of_turn>\\n'"),
    "assistant": ("'<start_of_turn>model\\n'", "'<end_of_turn>\\n'"),
}
_STARLING = {
    "system": ("'GPT4 Correct System: '", "'<|end_of_turn|>'"),
    "user": ("'GPT4 Correct User: '", "'<|end_of_turn|>'"),
    "assistant": ("'GPT4 Correct Assistant: '", "'<|end_of_turn|>'"),
}
_ROLES = ("system", "user", "assistant")
_VICUNA_SYSTEM = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "chatml": ChatTemplate(text.turns(_CHATML), "<|im_end|>"),
    "llama-3": ChatTemplate(
        text.turns({role: _llama_3(role) for role in (*_ROLES, "tool")}, begin="bos_token", trim=True),
        "<|eot_id|>",
    ),
    "llama-3.1": ChatTemplate(text.LLAMA_3_1, "<|eot_id|>"),
    "llama": ChatTemplate(
        text.turns(
            {
                "user": (f"bos_token + '[INST] ' + {text.FIRST_USER_PREFIX}", "' [/INST]'"),
                "assistant": ("' '", "' ' + eos_token"),
            },
            trim=True,
            prelude=text.system_into_first_user("''", "'<<SYS>>\\n'", "'\\n<</SYS>>\\n\\n'"),
        ),
        None,
    ),
    "mistral": ChatTemplate(
        text.turns(
            {
                "user": (f"'[INST] ' + {text.FIRST_USER_PREFIX}", "' [/INST]'"),
                "assistant": ("''", "eos_token"),
            },
            begin="bos_token",
            prelude=text.system_into_first_user("' '"),
        ),
        None,
    ),
    "qwen-2.5": ChatTemplate(text.QWEN_2_5, "<|im_end|>"),
    "qwen-3": ChatTemplate(
        text.qwen3("after the last question"), "<|im_end|>", training=text.qwen3("always")
    ),
    "qwen3-instruct": ChatTemplate(text.qwen3("never"), "<|im_end|>"),
    "gemma": ChatTemplate(
        text.turns(_GEMMA, begin="bos_token", trim=True, prelude=text.system_into_first_user("'\\n'")),
        "<end_of_turn>",
    ),
    "gemma-3": ChatTemplate(
        text.turns(_GEMMA, begin="bos_token", trim=True, prelude=text.system_into_first_user("'\\n\\n'")),
        "<end_of_turn>",
    ),
    "phi-3": ChatTemplate(
        # a conversation ends with the model's own EOS, unless that was mapped to the stop word
        text.turns(
            {role: _phi_3(role) for role in _ROLES}, end="(eos_token if eos_token != '<|end|>' else '')"
        ),
        "<|end|>",
    ),
    "phi-4": ChatTemplate(text.turns({role: _phi_4(role) for role in _ROLES}), "<|im_end|>"),
    "zephyr": ChatTemplate(text.turns({role: _zephyr(role) for role in _ROLES}), None),
    "starling": ChatTemplate(text.turns(_STARLING, begin="bos_token"), "<|end_of_turn|>"),
    "alpaca": ChatTemplate(
        text.turns(
            {
                "system": ("''", "'\\n\\n'"),
                "user": ("'### Instruction:\\n'", "'\\n\\n'"),
                "assistant": ("'### Response:\\n'", "eos_token + '\\n\\n'"),
            },
            begin="bos_token",
        ),
        None,
        system=(
            "Below are some instructions that describe some tasks. "
            "Write responses that appropriately complete each request."
        ),
    ),
    "vicuna": ChatTemplate(
        text.turns(
            {
                "system": ("''", "' '"),
                "user": ("'USER: '", "' '"),
                "assistant": ("'ASSISTANT: '", "eos_token"),
            },
            begin="bos_token",
        ),
        None,
        system=_VICUNA_SYSTEM.format("user", "user"),
    ),
    "vicuna_old": ChatTemplate(
        text.turns(
            {
                "system": ("''", "'\\n'"),
                "user": ("'### Human: '", "'\\n'"),
                "assistant": ("'### Assistant: '", "eos_token + '\\n'"),
            },
            begin="bos_token",
        ),
        None,
        system=_VICUNA_SYSTEM.format("human", "human"),
    ),
    "unsloth": ChatTemplate(
        text.turns(
            {
                "system": ("''", "'\\n'"),
                "user": ("'>>> User: '", "'\\n'"),
                "assistant": ("'>>> Assistant: '", "eos_token + '\\n'"),
            },
            begin="bos_token",
        ),
        None,
        system="You are a helpful assistant to the user",
    ),
}

ALIASES = {
    "llama3": "llama-3",
    **dict.fromkeys(["llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33"], "llama-3.1"),
    **dict.fromkeys(["qwen-25", "qwen25", "qwen2.5", "qwen-2", "qwen2"], "qwen-2.5"),
    **dict.fromkeys(["qwen3", "qwen3-thinking"], "qwen-3"),
    "qwen-3-instruct": "qwen3-instruct",
    **dict.fromkeys(["gemma2", "gemma-2"], "gemma"),
    **dict.fromkeys(["gemma3", "gemma-3n", "gemma3n"], "gemma-3"),
    **dict.fromkeys(["gemma_chatml", "gemma2_chatml", "yi-chat", "smollm2"], "chatml"),
    **dict.fromkeys(["phi-3.5", "phi-35"], "phi-3"),
    "llama-2": "llama",
    "vicuna old": "vicuna_old",
}

# Templates as models ship them, by SHA-256 of the text, and the format here that marks the same conversation.
FIELD_TEMPLATES = {
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama-3",  # Llama 3
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "qwen-2.5",  # Qwen2.5 Instruct
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen-3",  # Qwen3
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "qwen3-instruct",  # Qwen3 Instruct 2507
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": "gemma",  # Gemma and Gemma 2
    "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4": "gemma-3",  # Gemma 3
    "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa": "phi-3",  # Phi-3
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "phi-3",  # Phi-3.5
}


def template_named(name: str) -> ChatTemplate:
    """The template called `name`, in any case.

    Raises:
        ValueError: there is none; the message lists all names.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in CHAT_TEMPLATES:
        raise ValueError(
            f"no chat template '{name}'; there are {', '.join(sorted([*CHAT_TEMPLATES, *ALIASES]))}. "
            "A template of your own is given as (jinja source, stop word)"
        )
    return CHAT_TEMPLATES[key]


def marked_variant(source: str) -> str | None:
    """A template with generation marks that renders the same conversation as `source`, where one is known.

    Returns:
        `source` itself if it has marks; the marked variant of a template of this module or of a known model's
        template (Qwen3's gives each assistant turn its <think> block, as TRL does); None otherwise.
    """
    if has_marks(source):
        return source
    digest = hashlib.sha256(source.encode()).hexdigest()
    if digest in FIELD_TEMPLATES:
        return CHAT_TEMPLATES[FIELD_TEMPLATES[digest]].assistant_marked
    for template in CHAT_TEMPLATES.values():
        if source.endswith(unmarked(template.marked)):
            prelude = source.removesuffix(unmarked(template.marked))
            return prelude + (template.training or template.marked)
    return None


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str | None] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Give a tokenizer, or a processor of images and its tokenizer, a chat template.

    Args:
        tokenizer: changed in place where that is possible; use the returned one. A processor's named templates show
            images where the messages have them.
        chat_template: a name (see `CHAT_TEMPLATES` and `ALIASES`), or (Jinja source, stop word).
        mapping: keys and role names of the messages to come, for instance ShareGPT's
            `{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}`.
        map_eos_token: make the template's stop word the EOS token. If the vocabulary lacks it, the present
            EOS token is renamed to it, so that the model's own end-of-text embedding ends a turn.
        system_message: replaces the template's default system message.

    Returns:
        The tokenizer or processor with `chat_template` (and `eos_token`) set.

    Raises:
        ValueError: unknown name or mapping key, or no EOS token to rename.
    """
    if isinstance(chat_template, str):
        template = template_named(chat_template)
    else:
        source, stop_word = chat_template
        template = ChatTemplate(source, None if stop_word == "eos_token" else stop_word)
    if system_message is not None:
        template = replace(template, system=system_message)
    processor = tokenizer if hasattr(tokenizer, "image_processor") else None
    tokenizer = tokenizer if processor is None else processor.tokenizer
    if map_eos_token and template.stop_word is not None:
        tokenizer = _with_eos(tokenizer, template.stop_word)
    source = template.plain if isinstance(chat_template, str) else _own(template)
    if processor is not None and isinstance(chat_template, str):
        source = text.show_images(_image_mark(processor)) + source
    tokenizer.chat_template = _rename(mapping) + source
    if processor is None:
        return tokenizer
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    return processor


def use_chat_template_of(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a tokenizer the template in a .jinja file, or that of another tokenizer (folder or hub name).

    Raises:
        ValueError: the other tokenizer's template ends turns with a token that this vocabulary lacks.
    """
    if path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    other: Any = AutoTokenizer.from_pretrained(path)
    if other.eos_token not in tokenizer.get_vocab():
        raise ValueError(
            f"the chat template of {path} goes with the EOS token {other.eos_token!r}, which is not in this "
            "vocabulary, and new tokens are not supported; use get_chat_template, which renames the EOS token"
        )
    tokenizer.chat_template, tokenizer.eos_token = other.get_chat_template(), other.eos_token


def _image_mark(processor: Any) -> str:
    """What stands for an image in a text for a processor."""
    if hasattr(processor, "boi_token"):  # Gemma 3 puts the image's tokens behind it
        return processor.boi_token
    begin, end = "<|vision_start|>", "<|vision_end|>"
    around = (begin, end) if begin in processor.tokenizer.get_vocab() else ("", "")
    return str(processor.image_token).join(around)


def _own(template: ChatTemplate) -> str:
    """A user's template: its marks, if any, stay."""
    return (text.default_system(template.system) if template.system else "") + template.marked


def _rename(mapping: Mapping[str, str] | None) -> str:
    names = DEFAULT_MAPPING | dict(mapping or {})
    if unknown := set(names) - set(DEFAULT_MAPPING):
        raise ValueError(
            f"mapping has the keys {', '.join(DEFAULT_MAPPING)}; came {', '.join(sorted(unknown))} too"
        )
    return "" if names == DEFAULT_MAPPING else text.rename_messages(**names)


def _with_eos(tokenizer: PreTrainedTokenizerBase, stop_word: str) -> PreTrainedTokenizerBase:
    """The tokenizer with `stop_word` as EOS: the vocabulary's token, or else the present EOS token renamed."""
    if stop_word in tokenizer.get_vocab():
        tokenizer.eos_token = stop_word
        return tokenizer
    old = tokenizer.eos_token
    if old is None:
        raise ValueError(
            f"'{stop_word}' is not in the vocabulary and the tokenizer has no EOS token to stand for it; "
            "set tokenizer.eos_token, or pass map_eos_token=False"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    renamed = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(_rename_token(state, old, stop_word))),
        **_special_tokens(tokenizer, old, stop_word),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
    )
    return renamed


def _special_tokens(tokenizer: PreTrainedTokenizerBase, old: str, new: str) -> dict[str, Any]:
    """Special tokens by role, `old` replaced by `new` in each."""
    return {
        role: new if token == old else token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def _rename_token(state: Any, old: str, new: str) -> Any:
    """`state` (tokenizer.json) with every string and vocabulary key equal to `old` made `new`."""
    if isinstance(state, dict):
        return {new if key == old else key: _rename_token(value, old, new) for key, value in state.items()}
    if isinstance(state, list):
        return [_rename_token(value, old, new) for value in state]
    return new if state == old else state
