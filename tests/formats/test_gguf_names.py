import numpy as np
import pytest

from jaxtune.formats.gguf_names import (
    GgufFamily,
    file_order,
    gguf_name,
    hf_name,
    interleave_rotary_halves,
    join_rotary_halves,
    rotary_heads,
)
from jaxtune.models import FAMILIES

GEMMA = {
    "blk.3.attn_norm.weight": "model.layers.3.input_layernorm.weight",
    "blk.3.post_attention_norm.weight": "model.layers.3.post_attention_layernorm.weight",
    "blk.3.ffn_norm.weight": "model.layers.3.pre_feedforward_layernorm.weight",
    "blk.3.post_ffw_norm.weight": "model.layers.3.post_feedforward_layernorm.weight",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_q.bias": "model.layers.0.self_attn.q_proj.bias",
    "blk.12.attn_output.weight": "model.layers.12.self_attn.o_proj.weight",
    "blk.12.attn_k_norm.weight": "model.layers.12.self_attn.k_norm.weight",
    "blk.3.ffn_norm.weight": "model.layers.3.post_attention_layernorm.weight",
    "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
}


def test_names_both_ways():
    for architecture, names in {"llama": NAMES, "gemma3": GEMMA}.items():
        for gguf, hf in names.items():
            assert hf_name(gguf, architecture) == hf and gguf_name(hf, architecture) == gguf
    for unknown in ("blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "blk.0.post_ffw_norm.weight"):
        with pytest.raises(KeyError):
            hf_name(unknown, "llama")
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.mlp.router.weight", "llama")


def test_order_of_tensors():
    names = [
        "blk.10.attn_q.weight",
        "output.weight",
        "blk.2.ffn_up.weight",
        "blk.2.attn_q.weight",
        "a.weight",
    ]
    assert file_order(names) == [names[4], names[1], names[3], names[2], names[0]]


def test_rotary_halves():
    """Row by row: pair i of a head is rows 2i and 2i+1 in GGUF, rows i and i + half in Hugging Face."""
    heads, half = 3, 4
    values = np.arange(heads * 2 * half * 5).reshape(heads * 2 * half, 5)
    stored = interleave_rotary_halves(values, heads)
    for head in range(heads):
        for i in range(half):
            for part in range(2):
                row = values[head * 2 * half + part * half + i]
                np.testing.assert_array_equal(stored[head * 2 * half + 2 * i + part], row)
    np.testing.assert_array_equal(join_rotary_halves(stored, heads), values)
    bias = values[:, 0]
    np.testing.assert_array_equal(interleave_rotary_halves(bias, heads), stored[:, 0])
    assert rotary_heads("model.layers.1.self_attn.q_proj.weight", 8, 2) == 8
    assert rotary_heads("model.layers.1.self_attn.k_proj.bias", 8, 2) == 2
    assert rotary_heads("model.layers.1.self_attn.v_proj.weight", 8, 2) is None


def test_every_family_says_how_llama_cpp_knows_it():
    families = {name: module.GGUF for name, module in FAMILIES.items() if name != "mllama"}  # it does not
    assert all(isinstance(family, GgufFamily) for family in families.values())
    assert {name for name, family in families.items() if family.interleaved} == {
        "llama",
        "mistral",
        "idefics3",
        "smolvlm",
    }
