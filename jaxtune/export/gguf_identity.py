"""The general.name, .basename, .finetune, .version and .size_label keys: a model's name taken apart.

The rules are those of llama.cpp's converter (GGUF naming convention): "SmolLM2-135M-Instruct-v0.2" is basename
SmolLM2, size 135M, finetune Instruct, version v0.2.
"""

import re

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_STORAGE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_KEPT_AS_IS = re.compile(r"v\d+(\.\d+)*|\d.*")
_UNITS = " KMBT"


def identity(model_id: str, parameters: int, *, adapter: bool = False) -> dict[str, str]:
    """The keys general.name, .version, .finetune, .basename and .size_label of a model's name, in this order.

    Args:
        model_id: folder name or last part of a hub id; a name with spaces is only a name.
        parameters: number of weights; gives the size where the name has none, and tells a size from a
            context length.
        adapter: the parameters are those of the layers that a LoRA adapts, a part of the model.
    """
    parts = [] if " " in model_id else _parts(model_id, parameters, adapter)
    sizes = [text for text, kinds in parts if "size" in kinds]
    finetune = "-".join(text for text, kinds in parts if "finetune" in kinds)
    version = "-".join(text for text, kinds in parts if "version" in kinds and "basename" not in kinds)
    basename = "-".join(text for text, kinds in parts if "basename" in kinds)
    if not (sizes or finetune or version):  # too ambiguous
        basename = ""
    keys = {
        "general.name": _title(model_id),
        "general.version": version,
        "general.finetune": finetune,
        "general.basename": basename,
        "general.size_label": "-".join(dict.fromkeys(sizes)) or ("" if adapter else size_label(parameters)),
    }
    return {key: value for key, value in keys.items() if value}


def size_label(parameters: int) -> str:
    """1_234_000_000 -> "1.2B": thousands, millions, … with two digits at least."""
    unit = next((u for u in "TBM" if parameters > 1000 ** _UNITS.index(u)), "K")
    scaled = parameters * 10.0 ** (-3 * _UNITS.index(unit))
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{unit}"


def _title(name: str) -> str:
    words = name.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not _KEPT_AS_IS.fullmatch(w) else w for w in words)


def _parts(name: str, parameters: int, adapter: bool) -> list[tuple[str, set[str]]]:
    """The name's parts with what each is: basename, size, finetune, version, storage; a version may be in the
    basename too ("Llama-3-8B")."""
    texts = filter(None, name.split("-"))
    parts = [_classified(text, at, parameters, adapter) for at, text in enumerate(texts)]
    if any(c.isdecimal() for text, kinds in parts if "size" in kinds for c in text):
        for text, kinds in parts:  # "mini" is no size beside "3.8B"
            if text.isalpha():
                kinds.discard("size")
    at_start = True
    for text, kinds in parts:
        at_start = at_start and ((not kinds and text[0].isalpha()) or "version" in kinds)
        if at_start:
            kinds.add("basename")
        elif not kinds:
            kinds.add("finetune")
    for _, kinds in reversed(parts):
        if not {"basename", "version"} <= kinds:
            break
        kinds.discard("basename")
    return parts


def _classified(text: str, at: int, parameters: int, adapter: bool) -> tuple[str, set[str]]:
    if _VERSION.fullmatch(text):
        return text, {"version"}
    if _STORAGE.fullmatch(text):
        return text.upper(), {"storage"}
    if at and _SIZE.fullmatch(text):
        return _size(text.replace("_", "."), parameters, adapter)
    if adapter and at and text.lower() == "lora":
        return text, {"storage"}
    return text, {"finetune"} if at and _FINETUNE.fullmatch(text) else set()


def _size(text: str, parameters: int, adapter: bool) -> tuple[str, set[str]]:
    if text[-1].isdecimal():  # bloom-7b1 means 7.1B
        text = f"{text[:-2]}.{text[-1]}{text[-2]}"
    if text[-2].isdecimal() and text[-1] in "kmbt":
        text = text[:-1] + text[-1].upper()
    try:
        meant = float(text[:-1]) * 1000 ** _UNITS.find(text[-1])
    except ValueError:  # a word, or 8x7B
        return text, {"size"}
    far = meant < parameters // 8 if adapter else abs(meant - parameters) > 7 * parameters // 8
    if far:  # a context length, such as 32k
        return text[:-1] + text[-1].lower(), {"finetune"}
    return text, {"size"}
