"""LoRA adapters as .gguf: llama.cpp with base and adapter against jaxtune's own model."""

import numpy as np
import pytest
import tiny_models
from export_judges import load, random_adapter, relative_error
from gguf.constants import GGMLQuantizationType
from tolerances import LLAMA_CPP_LOGITS

from jaxtune.export.gguf_adapter import save_gguf_adapter
from jaxtune.export.gguf_conversion import convert
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.formats.gguf_file import GgufFile

IDS = np.random.default_rng(0).integers(0, 259, 60)


def adapted(tiny_model_dir, family="llama", **options):
    return random_adapter(load(tiny_model_dir(family), load_in_16bit=True), **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"use_rslora": True, "lora_alpha": 5}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        ("qwen3", {"use_rslora": True}),
    ],
)
def test_llama_cpp_with_the_adapter_computes_the_model(tiny_model_dir, llama_cpp, tmp_path, family, options):
    model = adapted(tiny_model_dir, family, **options)
    base = convert(load(tiny_model_dir(family), load_in_16bit=True))
    entries = [TensorEntry(name, shape, GGMLQuantizationType.F32) for name, shape in base.shapes.items()]
    with GgufWriter(tmp_path / "base.gguf", base.metadata, entries) as writer:
        for name in base.shapes:
            writer.write(name, np.ascontiguousarray(base.read(name)))
    adapter = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    expected = np.asarray(model.logits(IDS[None])[0])
    with llama_cpp.load(tmp_path / "base.gguf") as alone:
        assert relative_error(alone.logits(IDS.tolist()), expected) > 0.1
    with llama_cpp.load(tmp_path / "base.gguf", adapter=adapter) as judge:
        assert relative_error(judge.logits(IDS.tolist()), expected) < LLAMA_CPP_LOGITS


def test_file(tiny_model_dir, tmp_path):
    """Keys in the converter's order; alpha with rsLoRA's scale in it; float16 on request."""
    model = adapted(tiny_model_dir, use_rslora=True, lora_alpha=8, target_modules=["v_proj"])
    path = save_gguf_adapter(model, tmp_path / "My-LoRA.gguf", dtype="float16")
    file = GgufFile(path)
    assert list(file.metadata.items()) == [
        ("general.architecture", "llama"),
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.name", "My LoRA"),
        ("adapter.lora.alpha", 16.0),  # rank 4: alpha * sqrt(4)
        ("general.quantization_version", 2),
    ]
    assert list(file.tensors) == [f"blk.{i}.attn_v.weight.lora_{leaf}" for i in range(2) for leaf in "ab"]
    assert [tensor.shape for tensor in file.tensors.values()] == [(4, 128), (64, 4)] * 2
    assert {tensor.kind for tensor in file.tensors.values()} == {GGMLQuantizationType.F16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "GGUF has no DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"cannot hold modules_to_save=\['lm_head'\]"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tiny_model_dir, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_gguf_adapter(adapted(tiny_model_dir, **options), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_on_an_error(tiny_model_dir, tmp_path):
    base, path = load(tiny_model_dir("llama"), load_in_16bit=True), tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_gguf_adapter(base, path)
    model = adapted(tiny_model_dir)
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        save_gguf_adapter(model, path, dtype="int8")  # type: ignore[arg-type]
    leaf = next(iter(model.trainable))
    model.trainable[leaf] = model.trainable[leaf] + 7e4
    with pytest.raises(ValueError, match="are NaN or infinite"):
        save_gguf_adapter(model, path, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_gguf_adapter(adapted(tiny_model_dir), path)
    assert path.read_text() == "mine"


def test_a_window_is_refused_for_adapters_too(tiny_model_dir, tmp_path):
    assert tiny_models.FAMILIES["mistral_window"][1]["sliding_window"] == 16
    with pytest.raises(ValueError, match="sliding_window=16"):
        save_gguf_adapter(adapted(tiny_model_dir, "mistral_window"), tmp_path / "a.gguf")
