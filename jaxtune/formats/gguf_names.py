"""Tensor names of GGUF and of Hugging Face, both ways, and the order of q and k rows.

One table serves reading and writing. What a family does differently stands beside its own description, as a
`GgufFamily` in jaxtune/models.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP_BACK = {hf: name for name, hf in _TOP.items()}
_BLOCK_BACK = {hf: name for name, hf in _BLOCK.items()}
_GEMMA_BLOCK_BACK = {hf: name for name, hf in _GEMMA_BLOCK.items()}
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.")
# Architectures whose q and k rows llama.cpp keeps pair by pair, because its rotary kernel for them turns
# neighbouring rows; the others turn row i with row i + head_dim/2, as Hugging Face does.
INTERLEAVED = frozenset({"llama"})
# Architectures with norms behind attention and MLP too. GGUF has what norms multiply by, Hugging Face that less 1.
GEMMA = frozenset({"gemma2", "gemma3"})


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp knows a model family.

    architecture: general.architecture, also the prefix of the family's keys.
    extra_keys: keys that only some architectures have, of "vocab_size", "rope.dimension_count", "n_deepstack_layers".
    biases: block tensors that llama.cpp's graph adds a bias to; a bias elsewhere cannot be exported.
    own_head_dim: head_dim may differ from hidden_size / heads.
    rope_factors: the graph knows llama3's RoPE scaling, the tensor rope_freqs.
    activation: the MLP's.
    window_period: the last layer of so many sees everything, the others a window; None: no layer has a window.
    large: with so many layers scores are scaled by hidden_size / heads, else, as in other families, by head_dim.
    """

    architecture: str
    extra_keys: tuple[str, ...] = ()
    biases: frozenset[str] = frozenset()
    own_head_dim: bool = True
    rope_factors: bool = False
    activation: str = "silu"
    window_period: int | None = None
    large: int | None = None

    @property
    def interleaved(self) -> bool:
        return self.architecture in INTERLEAVED


def hf_name(name: str, architecture: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; KeyError for an unknown tensor."""
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_TOP[stem]}.{leaf}"
    _, layer, kind = stem.split(".", 2)
    return f"model.layers.{layer}.{(_GEMMA_BLOCK if architecture in GEMMA else _BLOCK)[kind]}.{leaf}"


def gguf_name(name: str, architecture: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight"; KeyError for an unknown tensor."""
    stem, _, leaf = name.rpartition(".")
    match = _HF_LAYER.fullmatch(stem)
    if match is None:
        return f"{_TOP_BACK[stem]}.{leaf}"
    block = _GEMMA_BLOCK_BACK if architecture in GEMMA else _BLOCK_BACK
    return f"blk.{match[1]}.{block[match[2]]}.{leaf}"


def norm_shift(name: str, architecture: str) -> float:
    """What the GGUF of a tensor (by either name) has more than the Hugging Face checkpoint."""
    return 1.0 if architecture in GEMMA and name.endswith("norm.weight") else 0.0


def file_order(names: Iterable[str]) -> list[str]:
    """GGUF names as llama.cpp's quantiser orders them: those of no layer first, then by layer, then by name."""

    def place(name: str) -> tuple[int, str]:
        layer = _GGUF_LAYER.match(name)
        return (int(layer[1]) if layer else -1, name)

    return sorted(names, key=place)


def rotary_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of an HF weight or bias are, if it is a q or k projection; else None."""
    return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])


def join_rotary_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving: rows (h, i, half) -> (h, half, i). values: [H*h, in] or a bias [H*h]."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def interleave_rotary_halves(values, heads: int):
    """The inverse: rows (h, half, i) -> (h, i, half). values: [H*h, in] or a bias [H*h], of NumPy or JAX."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
