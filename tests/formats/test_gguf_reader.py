import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxtune.export.gguf_format import GgufWriter
from jaxtune.formats.gguf_config import llama3_scaling
from jaxtune.formats.gguf_file import GgufFile
from jaxtune.formats.gguf_reader import GgufModel
from jaxtune.formats.safetensors_reader import SafetensorsFolder

Q = GGMLQuantizationType
CAN_QUANTIZE = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]
DEQUANTIZE_ONLY = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.TQ1_0, Q.TQ2_0, Q.MXFP4, Q.IQ4_NL, Q.IQ4_XS]
DEQUANTIZE_ONLY += [Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "o_proj": "attn_output",
    **{f"{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def gguf_name(name):
    stem, _, leaf = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{leaf}"
    parts = stem.split(".")
    return f"blk.{parts[2]}.{NAMES[parts[-1]]}.{leaf}"


def interleave(values, heads):
    """llama.cpp's order of q and k rows, written down row by row from its description."""
    half = values.shape[0] // heads // 2
    rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
    return values[rows]


def write_gguf(path, model, kind=Q.F32, extra=None, drop=(), rope_freqs=None):
    """A transformers model -> .gguf through the gguf package's writer, matrices in `kind`."""
    config, arch = model.config, ARCH[model.config.model_type]
    writer = GGUFWriter(path, arch)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, value in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = value.float().numpy()
        if arch == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, heads)
        own = kind if values.ndim == 2 else Q.F32
        writer.add_tensor(gguf_name(name), quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def models():
    configs = {
        "llama": tiny_models.make_config("llama"),
        "llama-tied-bias": tiny_models.make_config("llama", tie_word_embeddings=True, attention_bias=True),
        "mistral": tiny_models.make_config("mistral"),
        "qwen2": tiny_models.make_config("qwen2"),
        "qwen3": tiny_models.make_config("qwen3_tied", head_dim=64),
    }
    return {name: tiny_models.make_model(config) for name, config in configs.items()}


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "mistral", "qwen2", "qwen3"])
def test_logits_after_a_round_trip(models, tmp_path, name):
    """Weights under HF names and the rebuilt config give transformers the same logits."""
    original = models[name]
    reader = GgufModel(write_gguf(tmp_path / "m.gguf", original))
    config = transformers.AutoConfig.for_model(**reader.config)
    assert config.tie_word_embeddings == original.config.tie_word_embeddings
    copy = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = {n: torch.tensor(reader.read(n)) for n in reader.names()}
    missing, unexpected = copy.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    copy.tie_weights()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(copy(ids).logits, original(ids).logits, rtol=0, atol=0)


def test_config_fields(models, tmp_path):
    config = GgufModel(write_gguf(tmp_path / "m.gguf", models["qwen2"])).config
    original = models["qwen2"].config
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    ):
        assert config[field] == getattr(original, field)
    assert config["rope_theta"] == 1e4 and config["num_key_value_heads"] == 2 and config["vocab_size"] == 320
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("kind", CAN_QUANTIZE, ids=lambda kind: kind.name)
def test_quantised_model_equals_transformers_own_reader(models, tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", models["llama"], kind)
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    reader = GgufModel(path)
    state = judge.state_dict()
    assert set(reader.names()) == set(state)
    for name, expected in state.items():
        value = reader.read(name)
        assert value.dtype == np.float32 and value.shape == reader.info(name).shape
        np.testing.assert_array_equal(value, expected.numpy())


@pytest.mark.parametrize("kind", DEQUANTIZE_ONLY, ids=lambda kind: kind.name)
def test_types_that_gguf_only_dequantises(tmp_path, kind):
    """Random blocks; scales that are NaN or infinite by chance are part of the comparison."""
    shape = (4, 512)
    raw = np.random.default_rng(0).integers(0, 256, quant_shape_to_byte_shape(shape, kind), np.uint8)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected, value = dequantize(raw, kind), GgufFile(tmp_path / "m.gguf").read("x")
    assert value.shape == shape
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta", "head_dim"),
    [
        (8.0, 1.0, 4.0, 8192, 5e5, 128),
        (32.0, 1.0, 4.0, 8192, 5e5, 64),
        (4.0, 2.0, 6.0, 2048, 1e4, 64),
        (8.0, 1.0, 4.0, 32, 1e4, 16),
    ],
)
def test_llama3_rope_scaling_is_recovered(factor, low, high, original, theta, head_dim):
    """From the divisors alone a scaling comes back that gives transformers the same frequencies."""

    def frequencies(scaling):
        config = transformers.LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=131072,
            rope_parameters={"rope_theta": theta, **scaling},
        )  # fmt: skip
        return ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()

    truth = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    expected = frequencies(truth | {"original_max_position_embeddings": original})
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    found = llama3_scaling((plain / expected).astype(np.float32), theta)
    np.testing.assert_allclose(frequencies(found), expected, rtol=1e-3)
    if (low, original) == (1.0, 8192):
        assert found == truth | {"original_max_position_embeddings": original}


def test_rope_scaling_keys(models, tmp_path):
    model = models["llama"]
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    scaling = GgufModel(write_gguf(tmp_path / "a.gguf", model, extra=extra)).config["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}
    extra = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    extra |= {"llama.rope.scaling.original_context_length": 512}
    scaling = GgufModel(write_gguf(tmp_path / "b.gguf", model, extra=extra)).config["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    with pytest.raises(ValueError, match=r"rope\.scaling\.type = 'longrope'"):
        GgufModel(write_gguf(tmp_path / "c.gguf", model, extra={"llama.rope.scaling.type": "longrope"}))
    with pytest.raises(ValueError, match="no llama3 RoPE scaling"):
        GgufModel(write_gguf(tmp_path / "d.gguf", model, rope_freqs=np.linspace(1, 3, 16) ** 2))
    assert (
        GgufModel(write_gguf(tmp_path / "e.gguf", model, rope_freqs=np.ones(16))).config["rope_scaling"]
        is None
    )


def test_sliding_window_makes_it_mistral(models, tmp_path):
    extra = {"llama.attention.sliding_window": 64}
    config = GgufModel(write_gguf(tmp_path / "m.gguf", models["mistral"], extra=extra)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


def test_end_of_turn_joins_end_of_sequence(models, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", models["llama"], extra={"tokenizer.ggml.eot_token_id": 7})
    assert GgufModel(path).generation_config["eos_token_id"] == [2, 7]


def test_errors_name_what_is_wrong(models, tmp_path):
    model = models["llama"]
    with pytest.raises(ValueError, match=r"llama\.expert_count = 8"):
        GgufModel(write_gguf(tmp_path / "a.gguf", model, extra={"llama.expert_count": 8}))
    path = write_gguf(tmp_path / "b.gguf", model)
    raw = path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(raw[:-100])
    with pytest.raises(ValueError, match=r"short\.gguf is truncated: tensor"):
        GgufModel(tmp_path / "short.gguf")
    (tmp_path / "head.gguf").write_bytes(raw[:400])
    with pytest.raises(ValueError, match=r"head\.gguf is truncated or damaged"):
        GgufModel(tmp_path / "head.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK" + raw)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GgufModel(tmp_path / "other.gguf")
    (tmp_path / "old.gguf").write_bytes(raw[:4] + (1).to_bytes(4, "little") + raw[8:])
    with pytest.raises(ValueError, match="GGUF version 1"):
        GgufModel(tmp_path / "old.gguf")
    writer = GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture is 'gemma'"):
        GgufModel(tmp_path / "gemma.gguf")


def test_split_file(models, tmp_path):
    """Two parts; opening either reads both, and a missing part is named."""
    whole = GgufModel(write_gguf(tmp_path / "whole.gguf", models["llama"]))
    half = list(models["llama"].state_dict())[:9]
    others = [name for name in models["llama"].state_dict() if name not in half]
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", models["llama"], drop=others)
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", models["llama"], drop=half)
    for part in (first, second):
        model = GgufModel(part)
        assert set(model.names()) == set(whole.names())
        np.testing.assert_array_equal(model.read(others[-1]), whole.read(others[-1]))
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 2 parts; missing .*m-00002-of-00002\.gguf"):
        GgufModel(first)


def test_block_sizes_of_every_known_type():
    """Each type the gguf package dequantises is in one of the two lists above."""
    from gguf.quants import _type_traits

    known = {kind for kind in GGML_QUANT_SIZES if kind in _type_traits}
    assert known - {Q.NVFP4} <= set(CAN_QUANTIZE + DEQUANTIZE_ONLY)


def test_metadata_with_its_own_types(tmp_path):
    """A file of metadata alone, whose last byte is the last key's value."""
    values = {
        "a.u8": np.uint8(3),
        "a.i64": np.int64(-5),
        "a.f64": np.float64(0.1),
        "a.text": "ä",
        "a.numbers": np.float32([1.5, 2.5]),
        "a.words": ["x", ""],
        "a.last": True,
    }
    path = tmp_path / "m.gguf"
    with GgufWriter(path, values, []):
        pass
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    found = GgufFile(path).typed_metadata()
    assert list(found) == list(values)
    for key, value in values.items():
        assert type(found[key]) is type(value) and np.array_equal(found[key], value), key
    assert found["a.numbers"].dtype == np.float32


def test_smollm2_equals_the_converted_folder(smollm2_gguf, smollm2_dir):
    """Real weights: every tensor bit-equal after rounding to bfloat16."""
    ours, folder = GgufModel(smollm2_gguf), SafetensorsFolder(smollm2_dir)
    assert set(ours.names()) == set(folder.names())
    for name in folder.names():
        rounded = ours.read(name).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(
            rounded.view(np.uint16), folder.read(name).view(np.uint16), err_msg=name
        )
    config = transformers.AutoConfig.from_pretrained(smollm2_dir)
    again = transformers.AutoConfig.for_model(**ours.config)
    differing = {
        key: (value, again.to_dict().get(key))
        for key, value in config.to_dict().items()
        if again.to_dict().get(key) != value
    }
    assert set(differing) <= {"initializer_range", "dtype", "torch_dtype", "_name_or_path"}, differing
