"""Config, tensors and metadata of exported models: against llama.cpp's converter, and run by llama.cpp itself."""

import json
from dataclasses import replace
from pathlib import Path

import gguf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import transformers
from export_judges import load, logits_of, random_adapter, relative_error, write
from tolerances import LLAMA_CPP_GELU, LLAMA_CPP_LOGITS, MERGED

from jaxtune.export.gguf_conversion import convert
from jaxtune.export.gguf_identity import identity, size_label
from jaxtune.export.gguf_metadata import file_metadata
from jaxtune.export.merged import merged_tensor
from jaxtune.fast import FastLanguageModel
from jaxtune.formats.gguf_file import GgufFile
from jaxtune.formats.gguf_names import ROPE_FACTORS, file_order
from jaxtune.models.names import expected_names

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_conversion.json").read_text("utf-8"))
IDS = np.random.default_rng(0).integers(0, 259, 200)  # longer than the context that the scalings start from
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def load_16bit(path, **options):
    options = {"max_seq_length": None, "dtype": "float32", "load_in_16bit": True} | options
    return FastLanguageModel.from_pretrained(str(path), **options)[0]


# Where the file is better than the converter's, which pads no vocabulary without tokenizer.model (llama.cpp then
# refuses the file) and gives all its tokens the same score (so that llama.cpp joins pieces from left to right).
BETTER = {"tied": {f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type")}}


@pytest.mark.parametrize("name", gguf_cases.CASES)
def test_metadata_and_tensors_are_the_converters(tmp_path, name):
    """Key by key in the same order, with the same types; every tensor to the bit."""
    folder = gguf_cases.write_case(name, tmp_path)
    folder.rename(tmp_path.parent / name)  # the name of the folder is the model's
    folder = tmp_path.parent / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = gguf_cases.summary(write(convert(load_16bit(folder), tokenizer), folder / "m.gguf"))
    theirs = GOLDEN[name]
    assert ours["tensors"] == theirs["tensors"]
    assert [key for key, *_ in ours["keys"]] == [key for key, *_ in theirs["keys"]]
    assert {a[0] for a, b in zip(ours["keys"], theirs["keys"]) if a != b} == BETTER.get(name, set())


def test_smollm2s_metadata_is_the_converters(smollm2_dir):
    """A published tokenizer, which the converter recognises by itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)  # jaxtune's pads with another token
    metadata = convert(load_16bit(smollm2_dir), tokenizer, name="smollm2").metadata
    assert gguf_cases.described(metadata) == GOLDEN["smollm2"]["keys"]


def test_order_of_a_file():
    """Keys and tensors as llama.cpp's quantiser leaves them: version and file type last, layers by number."""
    names = ["blk.10.attn_q.weight", "output.weight", "blk.2.ffn_up.weight", "blk.2.attn_q.weight"]
    assert file_order(names) == [names[1], names[3], names[2], names[0]]
    metadata = {"a": "x", "general.file_type": 0, "general.quantization_version": 2, "b": "y"}
    kept = file_metadata(metadata, 15)
    assert list(kept.items())[2:] == [("general.quantization_version", 2), ("general.file_type", 15)]
    assert list(kept)[:2] == ["a", "b"]


GEMMA = {"query_pre_attn_scalar": 32}  # head_dim: what llama.cpp computes with


@pytest.mark.parametrize("family, rope", [("gemma2", "default"), ("gemma3", "linear")])
def test_llama_cpp_computes_gemma(tiny_model_dir, llama_cpp, tmp_path, family, rope):
    """NF4 with an adapter, merged; and read back, it is the same model."""
    model = random_adapter(load(tiny_model_dir(family, rope, **GEMMA)))
    path, expected = write(convert(model), tmp_path / "m.gguf"), model.logits(IDS[None])[0]
    with llama_cpp.load(path) as judge:
        assert relative_error(judge.logits(IDS.tolist()), expected) < LLAMA_CPP_GELU
    again = load_16bit(path)
    assert relative_error(again.logits(IDS[None])[0], expected) < MERGED
    assert (
        gguf_cases.summary(write(convert(again), tmp_path / "n.gguf"))["keys"]
        == gguf_cases.summary(path)["keys"]
    )


FAMILIES = ["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3", "qwen3_tied"]
SCALED = [(family, rope) for family in ("llama", "qwen2", "qwen3") for rope in ("linear", "yarn")]


@pytest.mark.parametrize(
    ("family", "rope"),
    [*((family, "default") for family in FAMILIES), *SCALED, ("llama", "llama3"), ("mistral", "llama3")],
)
def test_llama_cpp_computes_what_transformers_does(tiny_model_dir, llama_cpp, tmp_path, family, rope):
    folder = tiny_model_dir(family, rope)
    path = write(convert(load(folder, load_in_16bit=True)), tmp_path / "m.gguf")
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with llama_cpp.load(path) as model:
        assert relative_error(model.logits(IDS.tolist()), logits_of(judge, IDS[None])[0]) < LLAMA_CPP_LOGITS


@pytest.mark.parametrize("fields", [{"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
def test_yarn_with_an_attention_factor_of_its_own(tiny_model_dir, llama_cpp, tmp_path, fields):
    """The converter's key for it is ignored by llama.cpp; ours is not. Reading the file gives the config back."""
    folder = tiny_model_dir("llama", rope_parameters=YARN | fields)
    path = write(convert(load(folder, load_in_16bit=True)), tmp_path / "m.gguf")
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = logits_of(judge, IDS[None])[0]
    with llama_cpp.load(path) as model:
        assert relative_error(model.logits(IDS.tolist()), expected) < LLAMA_CPP_LOGITS
    assert relative_error(load_16bit(path).logits(IDS[None])[0], expected) < LLAMA_CPP_LOGITS


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_adapter_on_a_4_bit_model_is_merged(tiny_model_dir, llama_cpp, tmp_path, family):
    model = random_adapter(load(tiny_model_dir(family)))
    with llama_cpp.load(write(convert(model), tmp_path / "m.gguf")) as judge:
        assert relative_error(judge.logits(IDS.tolist()), model.logits(IDS[None])[0]) < LLAMA_CPP_LOGITS


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"use_dora": True}), ("qwen3", {}), ("llama_bias", {})]
)
def test_tensors_merged_on_the_device_are_the_same(tiny_model_dir, family, options):
    """Up to the order of sums: a few units in the last place."""
    conversion = convert(random_adapter(load(tiny_model_dir(family)), **options))
    for name in conversion.shapes:
        device = conversion.read_on_device(name)
        assert isinstance(device, jax.Array) and device.dtype == jnp.float32
        assert relative_error(device, conversion.read(name)) < 2e-6, name


def test_an_untied_head_is_written(tiny_model_dir, llama_cpp, tmp_path):
    model = random_adapter(load(tiny_model_dir("llama_tied")), modules_to_save=["lm_head"])
    conversion = convert(model)
    assert "output.weight" in conversion.shapes
    with llama_cpp.load(write(conversion, tmp_path / "m.gguf")) as judge:
        assert relative_error(judge.logits(IDS.tolist()), model.logits(IDS[None])[0]) < LLAMA_CPP_LOGITS


def test_weights_are_read_one_at_a_time_and_checked(tiny_model_dir):
    model = load_16bit(tiny_model_dir("llama"))
    hf, (slot, leaf) = (
        "model.layers.1.mlp.up_proj.weight",
        expected_names(model.module)["model.layers.1.mlp.up_proj.weight"],
    )
    np.testing.assert_array_equal(
        convert(model).read("blk.1.ffn_up.weight"), merged_tensor(model, "dequantised", hf, slot, leaf)
    )
    model.base = model.base | {"model.norm.weight": model.base["model.norm.weight"].at[3].set(jnp.nan)}
    conversion = convert(model)  # reads no weight
    for read in (conversion.read, conversion.read_on_device):
        with pytest.raises(ValueError, match=r"model\.norm\.weight: 1 of 128 values are NaN"):
            read("output_norm.weight")


REFUSED = {
    "hidden_act": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': llama.cpp's llama has silu only"),
    "window": ("mistral", {"sliding_window": 128}, r"sliding_window=128.*max_position_embeddings = 128"),
    "upper layers' window": ("qwen2_window", {}, "sliding_window=16"),
    "dynamic": ("llama", {"rope_parameters": {"rope_theta": 1e4} | tiny_models.ROPES["dynamic"]}, "dynamic"),
    "llama3 on qwen": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4} | tiny_models.ROPES["llama3"]},
        "rope_type='llama3': llama.cpp's qwen3",
    ),
    "beta_fast": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "yarn with beta_fast=16"),
    "truncate": ("qwen2", {"rope_parameters": YARN | {"truncate": False}}, "yarn with truncate=False"),
    "another activation": (
        "gemma3",
        GEMMA | {"hidden_activation": "silu"},
        "gemma3 has gelu_pytorch_tanh only",
    ),
    "query scale": ("gemma3", {}, r"query_pre_attn_scalar=48.*gemma3 of 14 layers always computes with 32"),
    "pattern": ("gemma2", GEMMA | {"layer_types": ["sliding_attention"] * 5}, "last of every 2 layers"),
    "no softcap": ("gemma2", GEMMA | {"final_logit_softcapping": None}, "gemma2 always caps both"),
    "bias": ("qwen3", {"attention_bias": True}, r"blk\.0\.attn_.\.bias: llama.cpp's qwen3 has no bias there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tiny_model_dir, case):
    family, changes, message = REFUSED[case]
    model = load_16bit(tiny_model_dir(family, **changes))
    with pytest.raises(ValueError, match=message):
        convert(model)


def test_a_window_as_wide_as_the_context_is_none(tiny_model_dir):
    conversion = convert(load_16bit(tiny_model_dir("mistral", sliding_window=256)))
    assert "llama.attention.sliding_window" not in conversion.metadata


def test_wrong_arguments_and_shapes(tiny_model_dir):
    model = load_16bit(tiny_model_dir("llama"))
    with pytest.raises(ValueError, match="base 'merged' is unknown"):
        convert(model, base="merged")
    model.config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": 300})
    with pytest.raises(ValueError, match=r"embedding has 320 rows and config\.vocab_size is 300"):
        convert(model)


@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_a_gguf_model_keeps_its_metadata(tiny_model_dir, tmp_path, rope):
    """From file to model to file: the same keys, types and tensors, whatever transformers has no word for."""
    conversion = convert(load(tiny_model_dir("llama", rope), load_in_16bit=True))
    own = {"general.author": "me", "general.tags": ["a", "b"], "llama.expert_count": np.uint32(0)}
    dropped = {"quantize.imatrix.file": "x.dat", "split.count": np.uint16(0)}
    conversion.metadata.update(own | dropped | {"general.file_type": np.uint32(0)})
    first = write(conversion, tmp_path / "first.gguf")
    second = write(convert(load_16bit(first)), tmp_path / "second.gguf")
    expected = gguf_cases.summary(first)
    expected["keys"] = [key for key in expected["keys"] if key[0] not in dropped]
    assert gguf_cases.summary(second) == expected


def test_rope_divisors_of_a_gguf_model_are_kept_to_the_bit(tiny_model_dir, tmp_path):
    """The scaling that is read from them gives them back only nearly."""
    conversion = convert(load(tiny_model_dir("llama", "llama3"), load_in_16bit=True))
    factors = conversion.read(ROPE_FACTORS) * np.float32(1 + 1e-5)
    changed = replace(conversion, _factors=factors)
    model = load_16bit(write(changed, tmp_path / "first.gguf"))
    np.testing.assert_array_equal(convert(model).read(ROPE_FACTORS), factors)
    model.config.rope_parameters["factor"] = 2.0  # another scaling: its own divisors
    assert convert(model).read(ROPE_FACTORS).max() == 2.0


def test_what_training_changed_is_changed_in_a_gguf_model(tiny_model_dir, tmp_path):
    """Context, chat template and end of text; the rest stays."""
    first = write(convert(load(tiny_model_dir("llama"), load_in_16bit=True)), tmp_path / "first.gguf")
    with pytest.warns(UserWarning, match="RoPE is scaled linearly by 2"):
        model = load_16bit(first, max_seq_length=512)
    model.tokenizer.chat_template = "{{ messages[0].content }}<|im_start|>"
    model.tokenizer.eos_token = "<|im_start|>"
    old, new = GgufFile(first).metadata, convert(model).metadata
    changed = {key: new[key] for key in new if key not in old or not np.array_equal(new[key], old[key])}
    assert changed == {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_start|>",
        "tokenizer.ggml.eos_token_id": 1,
    }
    other = tiny_models.make_tokenizer()
    other.add_tokens(["<new>"])
    tokens = convert(model, other).metadata["tokenizer.ggml.tokens"]
    assert tokens[259:261] == ["<new>", "[PAD260]"] and len(tokens) == 320


def test_smollm2_equals_its_own_file(smollm2_gguf, tmp_path):
    """Real weights and metadata: read from .gguf, exported, every tensor and key as in the file."""
    file, conversion = GgufFile(smollm2_gguf), convert(load_16bit(smollm2_gguf))
    assert set(conversion.shapes) == set(file.tensors)
    for name in (
        "token_embd.weight",
        "blk.7.attn_q.weight",
        "blk.7.attn_k.weight",
        "blk.29.attn_norm.weight",
    ):
        np.testing.assert_array_equal(conversion.read(name), file.read(name), err_msg=name)
    old, new = file.typed_metadata(), conversion.metadata
    assert list(old) == list(new)
    differing = {key for key in old if not np.array_equal(old[key], new[key])}
    assert differing == {"general.file_type"}


def test_names_taken_apart():
    assert identity("SmolLM2-135M-Instruct-v0.2", 135_000_000) == {
        "general.name": "SmolLM2 135M Instruct v0.2",
        "general.version": "v0.2",
        "general.finetune": "Instruct",
        "general.basename": "SmolLM2",
        "general.size_label": "135M",
    }
    assert identity("phi-3-mini-4k-instruct", 3_800_000_000)["general.finetune"] == "4k-instruct"
    assert identity("my_model", 7_241_732_096) == {"general.name": "My_Model", "general.size_label": "7.2B"}
    assert list(identity("A name with-2 spaces", 999)) == ["general.name", "general.size_label"]
    assert [size_label(n) for n in (999, 65_000, 1_234_567, 70_000_000_000)] == ["1.0K", "65K", "1.2M", "70B"]
