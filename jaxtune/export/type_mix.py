"""Which type each tensor of a file gets: the mixtures behind names such as q4_k_m, as llama.cpp's llama-quant.cpp has
them (release v0.5.0).

A method has one main type; the tensors that matter most for the output get more bits: the output matrix (or the
embedding that serves as one), attention values, the down projection of the feed-forward network, attention output.
"""

import math
import re
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Kind


@dataclass(frozen=True)
class Method:
    """A quantization_method: canonical name, main type, general.file_type, one line for the user.

    Attributes:
        mixture: the method whose rules for single tensors hold (its own name, but for q2_k_l).
        embeddings: type forced on the output matrix and the token embedding.
    """

    name: str
    kind: Kind
    file_type: LlamaFileType
    text: str
    mixture: str
    embeddings: Kind | None = None


def _method(name: str, text: str, kind: Kind | None = None, **fields) -> Method:
    kind = kind or Kind[name.upper()]
    prefix = "ALL" if kind == Kind.F32 else "MOSTLY"
    file_type = LlamaFileType[f"{prefix}_{fields.get('mixture', name).upper()}"]
    return Method(name, kind, file_type, text, **{"mixture": name, **fields})


_ALL = [
    _method("f32", "All weights as they are; four times the size of q8_0, for conversions"),
    _method("f16", "16-bit floats: nothing lost that matters, big files, slow on a CPU"),
    _method("bf16", "16-bit floats with the range of f32: exact for models trained in bf16"),
    _method("q8_0", "8 bits: hardly to be told from f16, half its size"),
    _method("q6_k", "6 bits: very near to q8_0"),
    _method("q5_k_m", "5 bits, 6 for half of the attention values and down projections: good", Kind.Q5_K),
    _method("q5_k_s", "5 bits everywhere but in the output matrix", Kind.Q5_K),
    _method("q5_1", "5 bits, old format with a minimum; q5_k_m is better"),
    _method("q5_0", "5 bits, old format; q5_k_m is better"),
    _method(
        "q4_k_m", "4 bits, 6 for half of the attention values and down projections: recommended", Kind.Q4_K
    ),
    _method("q4_k_s", "4 bits, 5 for the first attention values and down projections", Kind.Q4_K),
    _method("iq4_nl", "4 bits on an uneven scale; for rows that no k-quant fits"),
    _method("iq4_xs", "4 bits on an uneven scale, smaller than q4_k_s at about its quality"),
    _method("q4_1", "4 bits, old format with a minimum; q4_k_m is better"),
    _method("q4_0", "4 bits, old format, fastest on ARM; q4_k_m is better"),
    _method("q3_k_l", "3 bits, 5 for attention values and outputs and down projections", Kind.Q3_K),
    _method("q3_k_m", "3 bits, 4 to 5 for attention values and outputs and down projections", Kind.Q3_K),
    _method("q3_k_s", "3 bits everywhere but in the output matrix", Kind.Q3_K),
    _method(
        "q2_k_l", "q2_k with 8 bits for embedding and output", Kind.Q2_K, mixture="q2_k", embeddings=Kind.Q8_0
    ),
    _method("q2_k", "2 bits, 3 to 4 for attention values and outputs and down projections: much is lost"),
]
_BY_NAME = {method.name: method for method in _ALL}
# Unsloth's names.
_ALIASES = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}
#: Every accepted name; an alias leads to the method it means. "not_quantized" is f16; for a bf16 model say bf16.
METHODS: dict[str, Method] = _BY_NAME | {alias: _BY_NAME[name] for alias, name in _ALIASES.items()}

# Where a row is no multiple of the type's block.
_FALLBACK = {
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
    Kind.IQ4_XS: Kind.IQ4_NL,
}


def find_method(name: str) -> Method:
    """The method of a name or alias, in any case.

    Raises:
        ValueError: unknown; the known ones are listed.
    """
    if name.lower() in METHODS:
        return METHODS[name.lower()]
    hint = " (the iq1, iq2 and iq3 types are not written by jaxtune)" if name.lower().startswith("iq") else ""
    raise ValueError(f"quantization_method {name!r} is unknown{hint}; expected one of {', '.join(METHODS)}")


def file_type(method: str) -> int:
    """general.file_type of a file made with `method`."""
    return int(find_method(method).file_type)


@dataclass(frozen=True)
class _Mixer:
    """What the choice of a type depends on beside the tensor itself."""

    method: Method
    layers: int
    attention_values: int
    gqa: int  # query heads per key/value head
    experts: int
    is_70b: bool
    tied: bool
    has_importance: bool

    def kind(self, name: str, width: int, values_before: int, downs_before: int) -> Kind:
        """The type of a matrix with rows of `width` weights, before the fallback for odd widths."""
        main, mixture = self.method.kind, self.method.mixture
        if main in (Kind.F32, Kind.F16, Kind.BF16):
            return main
        if name in ("token_embd.weight", "output.weight"):
            return self._embedding(name, width)
        if _is_value(name):
            return self._attention_value(mixture, values_before)
        if "attn_k.weight" in name and self.experts == 8:
            return Kind.Q8_0
        if "ffn_down" in name:
            layer = re.match(r"blk\.(\d+)\.", name) if self.experts > 1 else None
            return self._ffn_down(mixture, int(layer[1]) if layer else downs_before)
        if "attn_output.weight" in name:
            return self._attention_output(mixture)
        return main

    def _embedding(self, name: str, width: int) -> Kind:
        main = self.method.kind
        if self.method.embeddings is not None:
            return self.method.embeddings
        if name == "token_embd.weight" and not self.tied:
            return main
        return Kind.Q8_0 if main == Kind.Q8_0 or width % GGML_QUANT_SIZES[main][0] else Kind.Q6_K

    def _attention_value(self, mixture: str, i: int) -> Kind:
        kind = self.method.kind
        match mixture:
            case "q2_k":
                kind = Kind.Q4_K if self.gqa >= 4 else Kind.Q3_K
            case "q3_k_m":
                kind = Kind.Q5_K if i < 2 else Kind.Q4_K
            case "q3_k_l":
                kind = Kind.Q5_K
            case "iq4_nl" | "iq4_xs" if self.gqa >= 4:
                kind = Kind.Q5_K
            case "q4_k_m" | "q5_k_m" if _use_more_bits(i, self.attention_values):
                kind = Kind.Q6_K
            case "q4_k_s" if i < 4:
                kind = Kind.Q5_K
        if self.is_70b and kind in (Kind.Q3_K, Kind.Q4_K):
            kind = Kind.Q5_K  # one matrix for 8 query heads: small, and it matters
        return Kind.Q8_0 if self.experts == 8 else kind

    def _ffn_down(self, mixture: str, i: int) -> Kind:
        first_eighth = i < self.layers // 8
        match mixture:
            case "q2_k":
                return Kind.Q3_K
            case "q3_k_m":
                return Kind.Q5_K if i < self.layers // 16 else Kind.Q4_K
            case "q3_k_l":
                return Kind.Q5_K
            case "q4_k_m" | "q5_k_m" if _use_more_bits(i, self.layers):
                return Kind.Q6_K
            case "iq4_nl" | "iq4_xs" if first_eighth and not self.has_importance:
                return Kind.Q5_K
            case "q4_k_s" if first_eighth:
                return Kind.Q5_K
            case "q4_0" | "q5_0" if first_eighth and self.has_importance:
                return Kind.Q4_1 if mixture == "q4_0" else Kind.Q5_1
        return self.method.kind

    def _attention_output(self, mixture: str) -> Kind:
        if self.experts == 8:
            few_bits = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
            return Kind.Q5_K if mixture in few_bits else self.method.kind
        return {"q2_k": Kind.Q3_K, "q3_k_m": Kind.Q4_K, "q3_k_l": Kind.Q5_K}.get(mixture, self.method.kind)


def tensor_kinds(
    method: str,
    shapes: dict[str, tuple[int, ...]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    architecture: str,
    experts: int = 0,
    has_importance: bool = False,
) -> dict[str, Kind]:
    """The type of each tensor of a file.

    Args:
        method: a key of `METHODS`.
        shapes: GGUF name -> shape, slowest first (Hugging Face's order).
        layers, heads, kv_heads, experts, architecture: the numbers of the model (general.architecture).
        has_importance: an importance matrix is used; a few types depend on it.

    Returns:
        GGUF name -> type, in llama.cpp's order of tensors in a file: by layer, then by name. Vectors and norms
        are F32.

    Raises:
        ValueError: an unknown method.
    """
    chosen = find_method(method)
    gqa = heads // kv_heads
    mixer = _Mixer(
        method=chosen,
        layers=layers,
        attention_values=sum(map(_is_value, shapes)),
        gqa=gqa,
        experts=experts,
        is_70b=layers == 80 and (architecture == "qwen2" or (architecture == "llama" and gqa > 1)),
        tied="output.weight" not in shapes,
        has_importance=has_importance,
    )
    kinds, values, downs = {}, 0, 0
    for name in sorted(shapes, key=_file_order):
        if not _is_quantised(name, shapes[name]):
            kinds[name] = Kind.F32
            continue
        width = shapes[name][-1]
        kinds[name] = _fitting(mixer.kind(name, width, values, downs), width)
        values += _is_value(name)
        downs += "ffn_down" in name
    return kinds


def bits_per_weight(kinds: dict[str, Kind], shapes: dict[str, tuple[int, ...]]) -> float:
    """Mean bits of a weight, scales included, over the tensors of a file."""
    sizes = {name: math.prod(shapes[name]) for name in kinds}
    bits = sum(
        sizes[name] * 8 * GGML_QUANT_SIZES[kind][1] / GGML_QUANT_SIZES[kind][0]
        for name, kind in kinds.items()
    )
    return bits / sum(sizes.values())


def _file_order(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1), name


def _is_value(name: str) -> bool:
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    if math.prod(shape) == shape[-1] or not name.endswith("weight"):  # one row is a vector to llama.cpp
        return False
    return not name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def _use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _fitting(kind: Kind, width: int) -> Kind:
    if width % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if width % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16
