"""Name the pre-tokenizer of a byte-level BPE as llama.cpp knows it (tokenizer.ggml.pre).

llama.cpp has each pre-tokenizer built in under a name. Its converter finds the name by a hash of what a text
becomes, which needs the model to be known; here the tokenizer's own rules are compared with those that each
name stands for (formats.gguf_tokenizer), so any vocabulary will do. A set of rules without a name is an error:
a wrong name splits words elsewhere and quietly spoils every answer.
"""

from typing import Any

from jaxtune.formats.gguf_tokenizer import PRE_TOKENIZERS, Pre


def pre_tokenizer_name(core: dict[str, Any]) -> str:
    """The name for the tokenizer whose tokenizer.json is `core`.

    Raises:
        ValueError: no name stands for these rules; they are shown.
    """
    pre = _rules(core)
    # Unicode NFC is no part of what a name stands for: llama.cpp never normalises. It only tells twins apart.
    for exact in (True, False):
        for name, known in PRE_TOKENIZERS.items():
            if pre._replace(bos=known.bos, nfc=pre.nfc if exact else known.nfc) == known:
                return name
    raise ValueError(
        "llama.cpp has no name for this tokenizer's pre-tokenizer "
        f"({core['pre_tokenizer']}, ignore_merges={pre.ignore_merges}). Known: {', '.join(PRE_TOKENIZERS)}. "
        "If llama.cpp has it under another name, pass pre_tokenizer=…"
    )


def _rules(core: dict[str, Any]) -> Pre:
    normalizer = core["normalizer"]
    normalisers = _steps(normalizer, "normalizers")
    if any(step != {"type": "NFC"} for step in normalisers):
        raise ValueError(f"llama.cpp cannot normalise text as this tokenizer does: {normalizer}")
    steps = _steps(core["pre_tokenizer"], "pretokenizers")
    splits, digits, gpt2 = [], False, None
    for step in steps:
        if gpt2 is None and not digits and _splits(step):
            splits.append(step["pattern"]["Regex"])
        elif gpt2 is None and step.get("type") == "Digits" and step["individual_digits"]:
            digits = True
        elif gpt2 is None and step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            gpt2 = bool(step["use_regex"])
        else:
            raise ValueError(f"llama.cpp has no pre-tokenizer with the step {step}")
    ignore = bool(core["model"].get("ignore_merges"))
    return Pre(tuple(splits), digits, bool(gpt2), ignore, nfc=bool(normalisers))


def _splits(step: dict[str, Any]) -> bool:
    is_regex = step.get("type") == "Split" and "Regex" in step["pattern"]
    return is_regex and step["behavior"] == "Isolated" and not step["invert"]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, which is one step, a Sequence, or absent."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]
