"""Rebuild a fast tokenizer from GGUF metadata: vocabulary, merges, pre-tokenizer, special tokens, chat
template.

"gpt2" files hold a byte-level BPE and name their pre-tokenizer in tokenizer.ggml.pre; each name here
becomes the pre-tokenizer of the tokenizer.json that the file was made from. "llama" files hold a
SentencePiece BPE: its merges are not stored, they follow from the pieces and their scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"


class Pre(NamedTuple):
    """How one tokenizer.ggml.pre splits text before the merges.

    splits: regexes applied one after another, each match its own piece.
    digits: every digit its own piece. gpt2: then GPT-2's own split.
    ignore_merges: a piece that is a token is taken whole. nfc: Unicode NFC first. bos: begin with <bos> by
    default.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    bos: bool = False


_GPT2 = Pre(gpt2=True)
_DIGITS_GPT2 = Pre(digits=True, gpt2=True)
_LLAMA3_PRE = Pre((_LLAMA3,), ignore_merges=True, bos=True)
_QWEN2_PRE = Pre((_QWEN2,), nfc=True)
_DEEPSEEK_CODER = Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), digits=True)
PRE_TOKENIZERS: dict[str, Pre] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b", "exaone"), _DIGITS_GPT2),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3_PRE,
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Pre((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_PRE),
    "stablelm2": Pre((_QWEN2,)),
    "tekken": Pre((_TEKKEN,), ignore_merges=True, bos=True),
    "deepseek-coder": _DEEPSEEK_CODER,
}


def load_tokenizer(metadata: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, ready to save beside a model.

    A pre-tokenizer that is not in the table is never guessed: a tokenizer.json beside the file is used,
    else an error says so.

    Raises:
        ValueError: no tokenizer, or a kind that jaxtune cannot rebuild; it is named.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # here because it imports torch if it can

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "llama":
        core, default_bos = _sentencepiece(metadata), True
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        core, default_bos = _byte_level(metadata, PRE_TOKENIZERS[pre]), PRE_TOKENIZERS[pre].bos
    elif (path.parent / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(str(path.parent), trust_remote_code=False)
    else:
        raise ValueError(
            f"{path}: cannot rebuild its tokenizer (tokenizer.ggml.model = {kind!r}, .pre = {pre!r}). "
            f"Known: model 'llama', or 'gpt2' with pre {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Put the original tokenizer.json and tokenizer_config.json beside the file."
        )
    _add_special(core, metadata)
    _add_ends(core, metadata, default_bos)
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    special = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    arch = metadata["general.architecture"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata[f"{arch}.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: dict[str, Any], pre: Pre) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [_merge(line) for line in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    return core


def _merge(line: str) -> tuple[str, str]:
    """ "a b" -> (a, b); llama.cpp writes a space inside a part as U+0120, as byte-level BPE does."""
    left, _, right = line.partition(" ")
    return left, right


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == _UNKNOWN), None)
    if unknown is None and (i := metadata.get("tokenizer.ggml.unknown_token_id")) is not None:
        unknown = tokens[i]  # converted from a tokenizer.json that marks it as special
    bytes_too = _BYTE in kinds
    merges = _merges_from_scores(vocab, scores, kinds)
    core = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(back + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return core


def _merges_from_scores(
    vocab: dict[str, int], scores: list[float], kinds: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose joined piece scores highest: order the pairs by that score."""
    plain = {token for token, i in vocab.items() if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE, _USER)}
    ranked = []
    for token in plain:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in plain and right in plain]
        ranked += [(-scores[vocab[token]], vocab[left], vocab[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_special(core: Tokenizer, metadata: dict[str, Any]) -> None:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for wanted, special in (((_CONTROL, _UNKNOWN), True), ((_USER,), False)):
        chosen = [token for token, kind in zip(tokens, kinds) if kind in wanted]
        added = [AddedToken(token, special=special, normalized=False) for token in chosen]
        (core.add_special_tokens if special else core.add_tokens)(added)


def _add_ends(core: Tokenizer, metadata: dict[str, Any], default_bos: bool) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", default_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {end: metadata.get(f"tokenizer.ggml.{end}_token_id") for end in wanted}
    used = {end: (tokens[i], i) for end, i in ids.items() if wanted[end] and i is not None}
    if not used:
        return
    before = [used["bos"][0]] if "bos" in used else []
    after = [used["eos"][0]] if "eos" in used else []
    single = [*before, "$A", *after]
    pair = single + [f"{part}:1" for part in (*before, "$B", *after)]
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(used.values())
    )
