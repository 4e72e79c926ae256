"""Special tokens in GGUF: the ids of BOS, EOS, …, what is put around a text, the chat template, and where
llama.cpp stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from jaxtune.export.gguf_metadata import Metadata
from jaxtune.formats.gguf_names import GgufFamily

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Attribute of the tokenizer -> part of the key, in the converter's order; "seperator" is GGUF's spelling.
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
# Texts that llama.cpp takes for the end of a generation without being told.
_ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <｜end▁of▁sentence｜>""".split()
)
_GRANITE_ROWS = 49152  # a vocabulary size for which the converter always says whether BOS is added
_PROBE = "jaxtune0probe"


def ids_and_flags(
    tokenizer: PreTrainedTokenizerBase,
    core: dict[str, Any],
    config: PretrainedConfig,
    family: GgufFamily,
    generation: Mapping[str, Any],
    *,
    default_bos: bool | None,
) -> Metadata:
    """The keys after the vocabulary: *_token_id, add_*_token, chat_template, and further ends of a text.

    Args:
        tokenizer, core: the tokenizer and its tokenizer.json.
        config: of the model, for ids that the tokenizer does not name.
        family: how llama.cpp knows the model.
        generation: fields of generation_config.json.
        default_bos: whether llama.cpp adds BOS when add_bos_token is absent; None when that is not known.

    Raises:
        ValueError: the tokenizer puts something around a text, or ends it in a way, that GGUF cannot say.
    """
    ids = _ids(tokenizer, config)
    truth = _added(tokenizer, ids)
    keys: Metadata = {f"tokenizer.ggml.{_ROLES[role]}_token_id": np.uint32(i) for role, i in ids.items()}
    flags = _flags(tokenizer, core)
    keys |= {f"tokenizer.ggml.add_{end}_token": truth.get(end, flag) for end, flag in flags.items()}
    keys |= _templates(tokenizer.chat_template)
    always_told = family.architecture == "llama" and config.get_text_config().vocab_size == _GRANITE_ROWS
    defaults = {"bos": None if always_told else default_bos, "eos": False}
    for end, value in truth.items():
        if end not in flags and value != defaults[end]:
            keys[f"tokenizer.ggml.add_{end}_token"] = value
    return keys | further_ends(tokenizer, ids, generation)


def _ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, int]:
    """Role -> id: what the tokenizer names, then what only the config does.

    Without an EOS llama.cpp would end every text at its default, token 11 of a byte-level vocabulary.
    """
    vocab = tokenizer.get_vocab()
    named = {role: getattr(tokenizer, f"{role}_token", None) for role in _ROLES}
    ids = {role: vocab[text] for role, text in named.items() if text in vocab}
    for role in _ROLES:
        told = getattr(config, f"{role}_token_id", None)
        told = told[0] if isinstance(told, list) and told and role == "eos" else told
        if role not in ids and isinstance(told, int) and 0 <= told < config.get_text_config().vocab_size:
            ids[role] = told
    if "eos" not in ids:
        raise ValueError("nothing says which token ends a text; set tokenizer.eos_token")
    return ids


def _added(tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text; finds out by trying, and adds a BOS to `ids`
    that goes by no name."""
    plain, whole = tokenizer.encode(_PROBE, add_special_tokens=False), tokenizer.encode(_PROBE)
    starts = range(len(whole) - len(plain) + 1)
    at = next((i for i in starts if whole[i : i + len(plain)] == plain), None)
    before, after = (whole, []) if at is None else (whole[:at], whole[at + len(plain) :])
    if len(before) == 1:
        ids.setdefault("bos", before[0])
    for found, end in ((before, "bos"), (after, "eos")):
        if found not in ([], [ids.get(end)]):
            texts = tokenizer.convert_ids_to_tokens(found)
            raise ValueError(
                f"the tokenizer adds {texts} where GGUF has room for the {end.upper()} token only"
            )
    return {"bos": bool(before), "eos": bool(after)}


def _flags(tokenizer: PreTrainedTokenizerBase, core: dict[str, Any]) -> dict[str, bool]:
    """The add_*_token keys that the converter writes, in its order, with its value for "sep"."""
    flags: dict[str, bool] = {}
    post = core["post_processor"] or {}
    for step in post.get("processors", [post] if post else []):
        if step["type"] == "ByteLevel":
            flags |= {"bos": flags.get("bos", False), "eos": flags.get("eos", False)}
        elif step["type"] == "TemplateProcessing":
            flags |= _template_flags(tokenizer, step)
    for end in ("bos", "eos", "sep"):
        declared = tokenizer.init_kwargs.get(f"add_{end}_token")
        if isinstance(declared, bool):
            flags.setdefault(end, declared)
    return flags


def _template_flags(tokenizer: PreTrainedTokenizerBase, step: dict[str, Any]) -> dict[str, bool]:
    single = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
    pair = [part.get("SpecialToken", {}).get("id") for part in step["pair"]]
    first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
    flags = {end: True for end, token in (("bos", first), ("eos", last)) if token}
    pair = pair[1:] if first and pair[:1] == [first] else pair
    pair = pair[:-1] if last and pair[-1:] == [last] else pair
    between = pair[1:-1]  # of "A … B"
    if not between or pair[0] or pair[-1]:
        return flags
    separators = (tokenizer.sep_token, tokenizer.eos_token)
    separated = between[0] in separators and not last
    return flags | {"sep": separated or (len(between) == 2 and between[1] in separators)}


def _templates(template: str | dict[str, str] | None) -> Metadata:
    """The chat template; of several named ones, the others under their own keys."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in name): text
        for name, text in template.items()
        if name != "default"
    }
    keys: Metadata = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def further_ends(
    tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int | None], generation: Mapping[str, Any]
) -> Metadata:
    """eot and eom: ends of a text that are not EOS and that llama.cpp would not recognise by their text."""
    ends = generation.get("eos_token_id") or []
    ends = [*(ends if isinstance(ends, list) else [ends]), _end_of_turn(tokenizer)]
    texts = {i: tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys(ends) if i is not None}
    unknown = [i for i, text in texts.items() if i != ids.get("eos") and text not in _ENDS]
    if len(unknown) > 2:
        raise ValueError(
            f"a text ends with any of {[texts[i] for i in unknown]}; GGUF has room for EOS and two more"
        )
    return {f"tokenizer.ggml.{key}_token_id": np.uint32(i) for key, i in zip(("eot", "eom"), unknown)}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after an assistant's answer."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):  # a template for other conversations
        return None
    tail = str(text).rpartition(_PROBE)[2]
    added = tokenizer.added_tokens_decoder.items()
    places = {tail.find(token.content): i for i, token in added if token.special}
    places.pop(-1, None)
    return places[min(places)] if places else None
