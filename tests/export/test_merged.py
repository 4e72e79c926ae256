import json
import shutil
import weakref
from pathlib import Path

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from export_judges import in_float32, load, logits_of, random_adapter, relative_error
from tolerances import LOGITS, MERGED

from jaxtune.export.merged import save_merged
from jaxtune.formats.safetensors_reader import SafetensorsFolder
from jaxtune.formats.safetensors_writer import ShardWriter
from jaxtune.hub import resolve
from jaxtune.lora import merged_weight
from jaxtune.models.names import hf_weights

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def torch_model(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return in_float32(model.eval())


def save(model, folder, **options):
    save_merged(model, folder, progress=False, **options)
    return folder


@pytest.fixture(scope="module")
def qlora(tiny_model_dir):
    """A tiny llama in NF4 with a random adapter."""
    return random_adapter(load(tiny_model_dir("llama"), load_in_4bit=True))


VARIANTS = {
    "4-bit base": ("llama", {"load_in_4bit": True}, {}),
    "4-bit base, dora": ("llama", {"load_in_4bit": True}, {"use_dora": True}),
    "16-bit base, rslora": ("qwen2", {"load_in_16bit": True}, {"use_rslora": True}),
    "some layers": ("mistral_window", {"load_in_4bit": True}, {"layers_to_transform": [1]}),
    "tied": ("qwen3_tied", {"load_in_4bit": True}, {}),
    "biases": ("llama_bias", {"load_in_4bit": True}, {"target_modules": ["q_proj", "o_proj"]}),
    "tied, head trained": ("llama_tied", {"load_in_4bit": True}, {"modules_to_save": ["lm_head"]}),
    "tied, embedding trained": ("llama_tied", {"load_in_4bit": True}, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_logits_of_the_model_with_its_adapter(tiny_model_dir, tmp_path, ids, name):
    family, options, adapter = VARIANTS[name]
    model = random_adapter(load(tiny_model_dir(family), **options), **adapter)
    save(model, tmp_path / "merged", dtype="float32")
    expected = np.asarray(model.logits(ids))
    assert relative_error(logits_of(torch_model(tmp_path / "merged"), ids), expected) <= MERGED
    assert relative_error(load(tmp_path / "merged", load_in_16bit=True).logits(ids), expected) <= MERGED


def test_full_finetuning(tiny_model_dir, tmp_path, ids):
    model = load.__wrapped__(tiny_model_dir("llama"), full_finetuning=True)  # not the shared one
    path = next(p for p in model.trainable if p.endswith("q_proj.weight"))
    model.trainable[path] = model.trainable[path] + 0.1
    save(model, tmp_path / "merged", dtype="float32")
    assert relative_error(logits_of(torch_model(tmp_path / "merged"), ids), model.logits(ids)) <= MERGED


def test_16_bits_are_the_merged_weights_rounded_once(qlora, tmp_path):
    save(qlora, tmp_path / "merged")
    saved = SafetensorsFolder(tmp_path / "merged")
    names = []
    for name, value in hf_weights(qlora):
        names.append(name)
        exact = merged_weight(qlora, name.removesuffix(".weight"), np.asarray(value, np.float32))
        assert saved.read(name).dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(saved.read(name), exact.astype(ml_dtypes.bfloat16))
    assert set(saved.names()) == set(names)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


def test_original_base(qlora, tiny_model_dir, tmp_path):
    """The adapter on the weights of the checkpoint, which differ from what training saw."""
    save(qlora, tmp_path / "merged", base="original", dtype="float32")
    saved, original = SafetensorsFolder(tmp_path / "merged"), SafetensorsFolder(tiny_model_dir("llama"))
    changed = 0
    for name in original.names():
        exact = merged_weight(qlora, name.removesuffix(".weight"), np.array(original.read(name)))
        np.testing.assert_array_equal(saved.read(name), exact)
        changed += bool((saved.read(name) != original.read(name)).any())
    assert changed == 14
    save(qlora, tmp_path / "dequantised", dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (SafetensorsFolder(tmp_path / "dequantised").read(name) != saved.read(name)).any()


@pytest.fixture(scope="module")
def bnb_folder(tiny_model_dir, tmp_path_factory):
    """A tiny llama stored in 4 bits by bitsandbytes, one module left in 16."""
    quantisation = transformers.BitsAndBytesConfig(
        **NF4, llm_int8_skip_modules=["lm_head", "layers.1.mlp.up_proj"]
    )
    model = torch_model(tiny_model_dir("llama"), quantization_config=quantisation, device_map="cpu")
    folder = tmp_path_factory.mktemp("bnb")
    model.save_pretrained(folder)
    for file in Path(tiny_model_dir("llama")).glob("token*"):
        shutil.copy(file, folder)
    return folder


def test_original_base_of_a_4bit_checkpoint(bnb_folder, tmp_path):
    model = random_adapter(load(bnb_folder))
    with pytest.raises(ValueError, match="itself stored in 4 bits"):
        save(model, tmp_path / "merged", base="original")
    assert list(tmp_path.iterdir()) == []


def test_4bit_checkpoint_with_its_skipped_module(bnb_folder, tmp_path, ids):
    model = random_adapter(load(bnb_folder))
    plain = "model.layers.1.mlp.up_proj"
    save(model, tmp_path / "merged", save_method="merged_4bit", dtype="float32")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert set(config["llm_int8_skip_modules"]) == {"lm_head", plain}
    judge = torch_model(tmp_path / "merged", device_map="cpu")
    assert type(judge.get_submodule(plain)) is torch.nn.Linear
    assert relative_error(logits_of(judge, ids), load(tmp_path / "merged").logits(ids)) <= LOGITS


@pytest.mark.parametrize("family", ["llama", "qwen3_tied"])
def test_4bit_equals_bitsandbytes_quantising_the_merged_model(tiny_model_dir, tmp_path, ids, family):
    model = random_adapter(load(tiny_model_dir(family), load_in_4bit=True))
    save(model, tmp_path / "four", save_method="merged_4bit", dtype="float32")
    assert resolve(tmp_path / "four").kind == "bnb-4bit"
    judge = torch_model(tmp_path / "four", device_map="cpu")
    ours = load(tmp_path / "four")
    assert relative_error(logits_of(judge, ids), ours.logits(ids)) <= LOGITS

    save(model, tmp_path / "sixteen", dtype="float32")
    quantisation = transformers.BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)
    expected = torch_model(tmp_path / "sixteen", quantization_config=quantisation, device_map="cpu")
    layers = {n: m for n, m in expected.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 14
    for name, layer in layers.items():
        stored = judge.get_submodule(name).weight
        assert torch.equal(stored.data, layer.weight.data), name
        ours, theirs = (bnb.dequantize_4bit(w.data, w.quant_state) for w in (stored, layer.weight))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spelling", ["merged_4bit_forced", "forced_merged_4bit"])
def test_unsloths_spellings(qlora, tmp_path, spelling):
    save(qlora, tmp_path / "four", save_method=spelling)
    assert resolve(tmp_path / "four").kind == "bnb-4bit"


def test_4bit_single_quantised(bnb_folder, tmp_path, ids):
    """The nesting of the scales follows the model's."""
    save(random_adapter(load(bnb_folder)), tmp_path / "four", save_method="merged_4bit")
    names = SafetensorsFolder(tmp_path / "four").names()
    assert not any("nested" in name for name in names) and any(name.endswith(".absmax") for name in names)


def test_4bit_of_a_16bit_model(tiny_model_dir, tmp_path, ids):
    model = random_adapter(load(tiny_model_dir("llama"), load_in_16bit=True))
    save(model, tmp_path / "four", save_method="merged_4bit", dtype="float32")
    judge = torch_model(tmp_path / "four", device_map="cpu")
    assert relative_error(logits_of(judge, ids), load(tmp_path / "four").logits(ids)) <= LOGITS


def test_4bit_keeps_the_codes_of_modules_without_adapter(tiny_model_dir, tmp_path):
    base = load(tiny_model_dir("llama"), load_in_4bit=True)
    save(base, tmp_path / "a", save_method="merged_4bit")
    adapted = random_adapter(base, target_modules=["q_proj"])
    save(adapted, tmp_path / "b", save_method="merged_4bit")
    a, b = SafetensorsFolder(tmp_path / "a"), SafetensorsFolder(tmp_path / "b")
    changed = {name for name in a.names() if a.read(name).tobytes() != b.read(name).tobytes()}
    assert changed and all(".q_proj.weight" in name for name in changed)


def test_shards_and_index(qlora, tmp_path, ids):
    save(qlora, tmp_path / "whole", dtype="float32")
    save(qlora, tmp_path / "shards", dtype="float32", max_shard_size="200KB")
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    whole, shards = SafetensorsFolder(tmp_path / "whole"), SafetensorsFolder(tmp_path / "shards")
    assert set(index["weight_map"]) == set(shards.names()) == set(whole.names())
    assert index["metadata"]["total_size"] == sum(whole.read(name).nbytes for name in whole.names())
    expected = logits_of(torch_model(tmp_path / "whole"), ids)
    np.testing.assert_array_equal(logits_of(torch_model(tmp_path / "shards"), ids), expected)


def test_4bit_shards_keep_a_weight_and_its_scales_together(qlora, tmp_path, ids):
    save(qlora, tmp_path / "m", save_method="merged_4bit", max_shard_size="60KB", dtype="float32")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in index.items():
        if ".weight." in name:
            assert shard == index[name.split(".weight.")[0] + ".weight"]
    judge = torch_model(tmp_path / "m", device_map="cpu")
    assert relative_error(logits_of(judge, ids), load(tmp_path / "m").logits(ids)) <= LOGITS


def test_everything_a_user_needs_lies_there(qlora, tmp_path):
    save(qlora, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template == qlora.tokenizer.chat_template
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert generation.eos_token_id == 2
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert config.architectures == ["LlamaForCausalLM"] and config.dtype == torch.bfloat16


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_rope_is_saved_under_its_old_and_new_names(tiny_model_dir, tmp_path, rope):
    base = tiny_model_dir("llama", rope)
    save(load(base, load_in_16bit=True), tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    expected = transformers.AutoConfig.from_pretrained(base).rope_parameters
    assert transformers.AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == expected
    old = {"rope_theta": fields["rope_theta"]} | (fields["rope_scaling"] or {"rope_type": "default"})
    assert old == expected
    del fields["rope_parameters"]  # as version 4 would write it
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == expected


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_weights_stream(qlora, tmp_path, monkeypatch, method):
    """When a weight is written no earlier one is alive any more."""
    written: list[weakref.ref] = []
    add = ShardWriter.add

    def watch(writer, group):
        alive = [ref for ref in written if ref() is not None]
        assert not alive, f"{len(alive)} of {len(written)} earlier tensors are still in memory"
        add(writer, group)
        written.extend(weakref.ref(value) for name, value in group.items() if name.endswith(".weight"))

    monkeypatch.setattr(ShardWriter, "add", watch)
    save(qlora, tmp_path / "m", save_method=method)
    assert len(written) > 20


def test_lora_method_and_the_models_own_functions(qlora, tmp_path, ids):
    qlora.save_pretrained_merged(tmp_path / "adapter", qlora.tokenizer, save_method="lora")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    qlora.save_pretrained_merged(tmp_path / "merged", qlora.tokenizer, dtype="float32")
    assert relative_error(logits_of(torch_model(tmp_path / "merged"), ids), qlora.logits(ids)) <= MERGED


def test_a_merged_model_replaces_an_adapter_in_the_same_folder(qlora, tmp_path, ids):
    save(qlora, tmp_path / "m", save_method="lora")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    save(qlora, tmp_path / "m", dtype="float32", max_shard_size="200KB")
    save(qlora, tmp_path / "m", dtype="float32")
    left = {file.name for file in (tmp_path / "m").iterdir()}
    assert "notes.txt" in left and not any(name.startswith(("adapter", "model-")) for name in left)
    assert "model.safetensors.index.json" not in left
    assert relative_error(logits_of(torch_model(tmp_path / "m"), ids), qlora.logits(ids)) <= MERGED


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_failures_leave_the_target_as_it_was(qlora, tmp_path, monkeypatch):
    target = tmp_path / "m"
    save(qlora, target)
    before = snapshot(target)
    path = next(p for p in qlora.trainable if p.endswith("down_proj.lora_B"))
    good = qlora.trainable[path]
    qlora.trainable[path] = good.at[1].set(jnp.inf)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .* NaN or infinite"):
        save(qlora, target)
    qlora.trainable[path] = good
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match=r"needs 0\.05 GB and 0\.00 GB are free there; nothing was written"):
        save(qlora, target)
    monkeypatch.undo()
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(qlora, target)
    assert snapshot(target) == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_float16_overflow_is_named(qlora, tmp_path):
    path = "model.norm.weight"
    good = qlora.base[path]
    qlora.base[path] = good.at[3].set(1e6)
    try:
        with pytest.raises(ValueError, match=r"model\.norm\.weight: 1 of 128 values"):
            save(qlora, tmp_path / "m", dtype="float16")
    finally:
        qlora.base[path] = good


def test_arguments(qlora, tmp_path, tiny_model_dir):
    with pytest.raises(ValueError, match="save_method 'gguf' is unknown; expected one of lora, merged_16bit"):
        save(qlora, tmp_path / "m", save_method="gguf")
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; expected one of bfloat16"):
        save(qlora, tmp_path / "m", dtype="int8")
    with pytest.raises(ValueError, match="base 'other' is unknown"):
        save(qlora, tmp_path / "m", base="other")
    with pytest.raises(ValueError, match="holds the base model itself"):
        save(qlora, tiny_model_dir("llama"))
    with pytest.raises(ValueError, match="size '5 apples' is not understood"):
        save(qlora, tmp_path / "m", max_shard_size="5 apples")
    with pytest.raises(ValueError, match="safe_serialization=False"):
        save(qlora, tmp_path / "m", safe_serialization=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        save(qlora, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
