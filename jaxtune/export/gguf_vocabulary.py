"""A fast tokenizer as GGUF metadata: tokens, types, merges or scores, in the converter's keys and order.

The tokenizer object is the truth, since the model was trained with it: where the converter would guess from
the files beside the model (the scores of a SentencePiece vocabulary, the space in front, BOS and EOS), what the
tokenizer does is written.
"""

from __future__ import annotations

import json
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.export.gguf_metadata import Metadata
from jaxtune.export.gguf_pre_tokenizer import pre_tokenizer_name
from jaxtune.export.gguf_special_tokens import ids_and_flags
from jaxtune.formats import sentencepiece_model as spm
from jaxtune.formats.gguf_names import GEMMA, GgufFamily
from jaxtune.formats.gguf_tokenizer import PRE_TOKENIZERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokens that publishers forgot to mark as special; llama.cpp's converter marks them.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ADDED_SCORE, _HOLE_SCORE = -1000.0, -10000.0
_UNMERGED_SCORE = -1e9


def vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    family: GgufFamily,
    *,
    generation: dict[str, Any],
    pre_tokenizer: str | None = None,
) -> Metadata:
    """The tokenizer.* keys.

    Args:
        tokenizer: a fast tokenizer: byte-level BPE, or SentencePiece BPE with byte fallback.
        config: the model's; its vocab_size rows of the embedding are filled up with unused tokens.
        family: how llama.cpp knows the model.
        generation: fields of generation_config.json; all its eos_token_id end a text in llama.cpp too.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for rules that jaxtune does not know.

    Raises:
        ValueError: something in the tokenizer that GGUF or llama.cpp cannot say; it is named.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer (tokenizer.json); GGUF needs its rules"
        )
    core = json.loads(backend.to_str())
    rows = config.get_text_config().vocab_size
    _check(tokenizer, core, rows)
    keys: Metadata = {}
    last: Metadata = {}
    if core["model"].get("byte_fallback"):
        prefix = _space_prefix(core, tokenizer)
        if family.architecture in GEMMA:
            last["tokenizer.ggml.add_space_prefix"] = prefix
        elif _declared_prefix(tokenizer, family) is not None or not prefix:
            keys["tokenizer.ggml.add_space_prefix"] = prefix
        keys |= _sentencepiece(core, rows, _model_file(tokenizer))
        default_bos = True
    else:
        declared = _declared_prefix(tokenizer, family)
        if declared is not None:
            keys["tokenizer.ggml.add_space_prefix"] = declared
        name = pre_tokenizer or pre_tokenizer_name(core)
        keys |= _byte_level(core, rows, name)
        default_bos = PRE_TOKENIZERS[name].bos if name in PRE_TOKENIZERS else None
    return keys | ids_and_flags(tokenizer, core, config, family, generation, default_bos=default_bos) | last


def harmless_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A model's name that llama.cpp does not take for Phi-3's.

    A name with "phi3" or "phi-3" makes llama.cpp swallow spaces after special tokens, and end the process when Phi-3's
    tokens are missing.
    """
    is_phi = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if is_phi and {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= tokenizer.get_vocab().keys():
        return name
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def _check(tokenizer: PreTrainedTokenizerBase, core: dict[str, Any], rows: int) -> None:
    if core["model"]["type"] != "BPE":
        raise ValueError(f"a {core['model']['type']} tokenizer cannot be exported; GGUF export has BPE only")
    vocab = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocab.items() if i >= rows)
    if beyond:
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding "
            f"(first: {beyond[0][1]!r}, id {beyond[0][0]}); they cannot be exported"
        )
    stripping = [t["content"] for t in core["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if stripping:
        logger.warning(
            "GGUF cannot say that %d tokens (%s) swallow the spaces beside them or match whole words only: "
            "llama.cpp splits such places in another way",
            *(len(stripping), ", ".join(stripping[:5])),
        )


def _declared_prefix(tokenizer: PreTrainedTokenizerBase, family: GgufFamily) -> bool | None:
    """add_prefix_space of tokenizer_config.json, which the converter copies for architecture llama alone."""
    value = tokenizer.init_kwargs.get("add_prefix_space")
    return value if family.architecture == "llama" and isinstance(value, bool) else None


def _added_kind(token: dict[str, Any]) -> int:
    special = token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"])
    return spm.CONTROL if special else spm.USER_DEFINED


def _added_text(token: dict[str, Any]) -> str:
    """llama.cpp looks for user-defined tokens in the raw text, where a space is a space."""
    return token["content"].replace("▁", " ") if _added_kind(token) == spm.USER_DEFINED else token["content"]


def _byte_level(core: dict[str, Any], rows: int, pre: str) -> Metadata:
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], np.full(rows, spm.UNUSED, np.int32)
    for text, i in core["model"]["vocab"].items():
        tokens[i], kinds[i] = text, spm.NORMAL
    for token in core["added_tokens"]:
        tokens[token["id"]], kinds[token["id"]] = _added_text(token), _added_kind(token)
    _check_distinct(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        # A space inside a part would end it; byte-level text has U+0120 for a space anyway.
        "tokenizer.ggml.merges": [
            " ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(core)
        ],
    }


def _check_distinct(tokens: list[str]) -> None:
    """llama.cpp looks tokens up by their text and ends the process where two are the same."""
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))
        raise ValueError(f"two tokens have the same text {twice!r}; GGUF needs them distinct")


def _merges(core: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; old tokenizer.json files write them as "a b"."""
    merges = core["model"]["merges"]
    split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges)
    return [(left, right) for left, right in split]


def _sentencepiece(core: dict[str, Any], rows: int, model_file: Path | None) -> Metadata:
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], np.full(rows, spm.UNUSED, np.int32)
    scores = np.full(rows, _HOLE_SCORE, np.float32)
    pieces = _pieces_of_the_model(core, model_file) or _pieces_of_the_merges(core)
    for i, piece in pieces.items():
        if i < rows:
            tokens[i], scores[i], kinds[i] = piece
    for token in core["added_tokens"]:
        i = token["id"]
        tokens[i], scores[i], kinds[i] = _added_text(token), _ADDED_SCORE, _added_kind(token)
    _check_distinct(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }


def _model_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """tokenizer.model beside the tokenizer, if it came from a folder that has one."""
    file = Path(tokenizer.name_or_path) / "tokenizer.model"
    return file if tokenizer.name_or_path and file.is_file() else None


def _pieces_of_the_model(core: dict[str, Any], file: Path | None) -> dict[int, spm.Piece] | None:
    """Pieces and scores of tokenizer.model; None where they would not split text as the tokenizer does."""
    if file is None:
        return None
    pieces = dict(enumerate(spm.read_pieces(file)))
    added = {token["id"] for token in core["added_tokens"]}
    vocab = core["model"]["vocab"]
    if any(i not in pieces or pieces[i].text != text for text, i in vocab.items() if i not in added):
        return None
    ranked = [pieces[vocab[left + right]].score for left, right in _merges(core)]
    if any(later > earlier for earlier, later in pairwise(ranked)):
        return None
    normal = {spm.USER_DEFINED: spm.NORMAL}  # as the converter: user-defined is what the added tokens say
    return {i: piece._replace(kind=normal.get(piece.kind, piece.kind)) for i, piece in pieces.items()}


def _pieces_of_the_merges(core: dict[str, Any]) -> dict[int, spm.Piece]:
    """Pieces whose scores give the merges' order: llama.cpp joins the pair whose joined piece scores highest."""
    rank: dict[str, int] = {}
    for at, (left, right) in enumerate(_merges(core)):
        rank.setdefault(left + right, at)

    def piece(text: str) -> spm.Piece:
        if _BYTE_PIECE.fullmatch(text):
            return spm.Piece(text, 0.0, spm.BYTE)
        return spm.Piece(text, float(-rank[text]) if text in rank else _UNMERGED_SCORE, spm.NORMAL)

    return {i: piece(text) for text, i in core["model"]["vocab"].items()}


def _space_prefix(core: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp is to put a space in front of text (it does so again after every special token)."""
    normalizer, pre = core["normalizer"], core["pre_tokenizer"]
    to_bar = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizer == to_bar and pre and (pre["type"], pre.get("pattern")) == ("Split", {"String": " "}):
        return False  # Gemma's: no space is left to split at
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    steps = [step for step in steps if step is not None]
    if pre is None and steps in ([{"type": "Prepend", "prepend": "▁"}, to_bar], [to_bar]):
        return len(steps) == 2
    if not steps and pre and pre["type"] == "Metaspace" and pre["replacement"] == "▁" and not pre["split"]:
        if pre["prepend_scheme"] != "first":
            return pre["prepend_scheme"] == "always"
        # At the very start only, which GGUF cannot say. A chat begins with a special token: no space there.
        chat = tokenizer.chat_template is not None
        logger.warning(
            "the tokenizer puts a space in front of a text's start only, GGUF knows always or never; written as "
            "%s",
            "never, which is right for chats" if chat else "always, which is right for plain text",
        )
        return not chat
    raise ValueError(
        "llama.cpp's SentencePiece tokenizer has no counterpart to this one's rules: "
        f"normalizer {normalizer}, pre_tokenizer {pre}"
    )
