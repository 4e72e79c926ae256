"""`save_pretrained_gguf` from end to end on tiny models: the files, what is refused, what is left after a failure."""

from pathlib import Path

import numpy as np
import pytest
from export_judges import load as load_model
from export_judges import random_adapter
from gguf.constants import LlamaFileType

from jaxtune.export import save_gguf as module
from jaxtune.export.imatrix import ImportanceMatrix, collect_imatrix
from jaxtune.export.quantise_pool import QuantisePool
from jaxtune.export.save_gguf import save_gguf
from jaxtune.export.type_mix import METHODS, file_type
from jaxtune.fast import FastLanguageModel
from jaxtune.formats.gguf_file import GgufFile

ALL = sorted({method.name for method in METHODS.values()})
QUANTISED = [name for name in ALL if name not in ("f32", "q2_k_l")]
ROWS = ["Some text to see what matters."] * 4
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """With an adapter, on rows wide enough for the K-quants."""
    base = FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama_tied", **WIDE)), max_seq_length=None, dtype="float32", load_in_16bit=True
    )[0]
    return random_adapter(base)


@pytest.fixture(scope="module")
def matrix(model) -> ImportanceMatrix:
    return collect_imatrix(model, ROWS, progress=False)


def save(model, folder, methods="q8_0", **options) -> dict:
    return save_gguf(
        model, folder, None, methods, **{"name": "tiny", "processes": 1, "progress": False} | options
    )


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("weighted", [False, True])
def test_all_methods_in_one_pass_equal_llama_quantize(model, matrix, llama_cpp, tmp_path, weighted):
    """The reference: llama.cpp quantises the f32 file."""
    result = save(model, tmp_path, [*QUANTISED, "f32"], imatrix=matrix if weighted else None)
    assert len(result["gguf_files"]) == len(QUANTISED) + 1
    source = tmp_path / "tiny.F32.gguf"
    plain = {"importance": {name: matrix.importance(name, v.size) for name, v in matrix.sums.items()}}
    for method in QUANTISED:
        made = (tmp_path / f"tiny.{method.upper()}.gguf").read_bytes()
        if weighted:  # the keys about the matrix are llama-quantize's, not the library's
            head = GgufFile(tmp_path / f"tiny.{method.upper()}.gguf")
            assert head.metadata["quantize.imatrix.entries_count"] == 14
        target = tmp_path / "judge.gguf"
        llama_cpp.quantise_file(
            source, target, LlamaFileType(file_type(method)), **(plain if weighted else {})
        )
        assert tensors_of(made, tmp_path) == tensors_of(target.read_bytes(), tmp_path), method
        assert weighted or made == target.read_bytes(), method


def tensors_of(data: bytes, folder: Path) -> dict[str, bytes]:
    path = folder / "part.gguf"
    path.write_bytes(data)
    return {
        name: tensor.kind.name.encode() + data[tensor.start : tensor.start + tensor.size]
        for name, tensor in GgufFile(path).tensors.items()
    }


def test_the_path_of_a_gpu(model, tmp_path, monkeypatch):
    """Run on the CPU: merged and quantised by JAX, the same but for a few roundings."""
    calls, quantise = [], module.quantisers_jax.quantise

    def noting(values, kind, importance=None):
        calls.append(type(values))
        return quantise(values, kind, importance)

    monkeypatch.setattr(module.quantisers_jax, "quantise", noting)
    save(model, tmp_path / "cpu", "q6_k")
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    save(model, tmp_path / "deterministic", "q6_k", deterministic=True)
    assert not calls
    save(model, tmp_path / "gpu", "q6_k")
    assert len(calls) == 15 and all(issubclass(kind, module.jax.Array) for kind in calls)
    cpu, same, gpu = (
        GgufFile(tmp_path / where / "tiny.Q6_K.gguf") for where in ("cpu", "deterministic", "gpu")
    )
    assert cpu.path.read_bytes() == same.path.read_bytes()
    assert cpu.metadata == gpu.metadata and cpu.tensors == gpu.tensors
    for name in cpu.tensors:
        want, came = cpu.read(name), gpu.read(name)
        assert np.mean(want == came) > 0.98, name
        np.testing.assert_allclose(came, want, atol=0.02 * np.abs(want).max())


def test_one_pass_makes_each_tensor_once(model, tmp_path, monkeypatch):
    reads, quantised = [], []
    convert, quantise = module.convert, QuantisePool.quantise

    def counting(*arguments, **options):
        conversion = convert(*arguments, **options)
        read = conversion.read
        object.__setattr__(conversion, "read", lambda name: (reads.append(name), read(name))[1])
        return conversion

    def noting(self, values, kind, importance=None, progress=None):
        quantised.append(kind)
        return quantise(self, values, kind, importance, progress)

    monkeypatch.setattr(module, "convert", counting)
    monkeypatch.setattr(QuantisePool, "quantise", noting)
    save(model, tmp_path / "both", ["q4_k_m", "q5_k_m", "q4_k"])  # an alias is no second file
    names = list(GgufFile(tmp_path / "both" / "tiny.Q4_K_M.gguf").tensors)
    assert reads == names
    assert len(quantised) < 2 * len(names)  # what both files have in the same type is made once
    for method in ("q4_k_m", "q5_k_m"):
        save(model, tmp_path / method, method)
        file = f"tiny.{method.upper()}.gguf"
        assert (tmp_path / method / file).read_bytes() == (tmp_path / "both" / file).read_bytes()


def test_result_has_unsloths_keys(model, tmp_path):
    result = model.save_pretrained_gguf(
        tmp_path, model.tokenizer, "fast_quantized", name="tiny", progress=False, processes=1
    )
    verifications = result.pop("verifications")
    assert verifications == [] and result == {
        "save_directory": str(tmp_path),
        "gguf_directory": str(tmp_path),
        "gguf_files": [str(tmp_path / "tiny.Q8_0.gguf")],
        "modelfile_location": str(tmp_path / "Modelfile"),
        "want_full_precision": False,
        "is_vlm": False,
        "fix_bos_token": False,
    }
    assert "FROM ./tiny.Q8_0.gguf" in (tmp_path / "Modelfile").read_text()


@pytest.mark.parametrize(("dtype", "want"), [("float32", "F16"), ("bfloat16", "BF16")])
def test_not_quantized_is_what_the_model_is_in(tiny_model_dir, tmp_path, dtype, want):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama")), max_seq_length=None, dtype=dtype, load_in_16bit=True
    )
    result = model.save_pretrained_gguf(
        tmp_path, tokenizer, "not_quantized", progress=False, processes=1, name="tiny"
    )
    assert result["gguf_files"] == [str(tmp_path / f"tiny.{want}.gguf")] and result["want_full_precision"]


def test_existing_files_stay(model, tmp_path):
    save(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"tiny.Q8_0.gguf.*overwrite=True"):
        save(model, tmp_path, ["f16", "q8_0"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    second = save(model, tmp_path, "f16", system="new")  # another method: its own file, its own Modelfile
    assert second["modelfile_location"] == str(tmp_path / "Modelfile.F16")
    assert {path: path.read_bytes() for path in before} == before
    save(model, tmp_path, "q8_0", system="replaced", overwrite=True)
    assert "replaced" in (tmp_path / "Modelfile").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_a_failure_leaves_no_file_and_the_old_one(model, tmp_path, monkeypatch, error):
    save(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    quantise, calls = QuantisePool.quantise, []

    def breaking(self, *arguments):
        calls.append(1)
        if len(calls) > 6:
            raise error("in the middle")
        return quantise(self, *arguments)

    monkeypatch.setattr(QuantisePool, "quantise", breaking)
    with pytest.raises(error):
        save(model, tmp_path, ["q8_0", "q4_k_m"], overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_weight_that_is_no_number(tiny_model_dir, tmp_path):
    model = random_adapter(load_model(tiny_model_dir("llama"), load_in_16bit=True))
    path = next(path for path in model.trainable if path.endswith("down_proj.lora_B"))
    model.trainable[path] = model.trainable[path].at[1, 0, 0].set(np.nan)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight: .* NaN or infinite"):
        save(model, tmp_path, ["f16", "q8_0"])
    assert left_in(tmp_path) == []


def test_a_weight_that_is_too_large_for_its_type(tiny_model_dir, tmp_path):
    model = random_adapter(load_model(tiny_model_dir("llama"), load_in_16bit=True))
    path = next(path for path in model.trainable if path.endswith("down_proj.lora_B"))
    model.trainable[path] = model.trainable[path].at[1, 0, 0].set(1e9)
    with pytest.raises(ValueError, match=r"^blk.1.ffn_down.weight: .*16"):
        save(model, tmp_path, ["f32", "f16"])
    assert left_in(tmp_path) == []


def test_a_full_disk(model, tmp_path, monkeypatch):
    """Room for one file, not for two: known before a byte is written."""
    usage = type("usage", (), {"free": 51_500_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"need 0.06 GB .* 0.05 GB are free"):
        save(model, tmp_path, ["f32", "q8_0"])
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("methods", ["q9_k", [], ["q8_0", "iq2_xs"]])
def test_unknown_methods(model, tmp_path, methods):
    with pytest.raises(ValueError, match="quantization_method"):
        save(model, tmp_path / "new", methods)
    assert not (tmp_path / "new").exists()


def test_options_of_unsloth(model, tmp_path):
    with pytest.warns(UserWarning, match="no effect in jaxtune: first_conversion, maximum_memory_usage"):
        model.save_pretrained_gguf(
            tmp_path, first_conversion="f16", maximum_memory_usage=0.7, progress=False, processes=1
        )
    with pytest.raises(NotImplementedError, match="push_to_hub"):
        model.save_pretrained_gguf(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="save_method"):
        model.save_pretrained_gguf(tmp_path, save_method="merged_16bit")
    with pytest.raises(TypeError, match="quantisation"):
        model.save_pretrained_gguf(tmp_path, quantisation="q8_0")


def test_importance_from_rows_file_and_object_are_the_same(model, matrix, tmp_path):
    matrix.save(tmp_path / "matrix.gguf")
    made = {}
    for key, given in {"object": matrix, "file": tmp_path / "matrix.gguf", "rows": ROWS}.items():
        save(model, tmp_path / key, "q4_k_m", imatrix=given)
        made[key] = GgufFile(tmp_path / key / "tiny.Q4_K_M.gguf")
    save(model, tmp_path / "none", "q4_k_m")
    name = "blk.0.ffn_gate.weight"
    raw = lambda file: file.path.read_bytes()[file.tensors[name].start :][: file.tensors[name].size]  # noqa: E731
    assert raw(made["object"]) == raw(made["file"]) == raw(made["rows"])
    assert raw(made["object"]) != raw(GgufFile(tmp_path / "none" / "tiny.Q4_K_M.gguf"))
    assert made["file"].metadata["quantize.imatrix.file"] == str(tmp_path / "matrix.gguf")
    narrow = ImportanceMatrix({name: np.ones(7, np.float32)}, {name: 1})
    with pytest.raises(ValueError, match="another model"):
        save(model, tmp_path / "bad", "q4_k_m", imatrix=narrow)
    assert not (tmp_path / "bad").exists()


def test_the_mixture_knows_of_the_matrix(tiny_model_dir, tmp_path):
    """As in llama.cpp, q4_0 then has more bits in the first eighth of the down projections."""
    model = load_model(tiny_model_dir("llama", num_hidden_layers=8), load_in_16bit=True)
    name = "blk.0.ffn_down.weight"
    matrix = ImportanceMatrix({name: np.ones(192, np.float32)}, {name: 1})
    for given, kind in ((None, "Q4_0"), (matrix, "Q4_1")):
        (path,) = save(model, tmp_path / kind, "q4_0", imatrix=given)["gguf_files"]
        assert GgufFile(path).tensors[name].kind.name == kind


def test_adapter_alone(model, tmp_path, capsys):
    result = model.save_pretrained_gguf(tmp_path, save_method="lora", name="tiny")
    file = GgufFile(result["gguf_files"][0])
    assert Path(file.path).name == "tiny.LORA.gguf" and file.metadata["general.type"] == "adapter"
    assert "--lora" in capsys.readouterr().out


def test_what_is_shown(model, tmp_path, capsys):
    save(model, tmp_path, ["q8_0", "q4_k_m"], progress=True)
    shown = capsys.readouterr()
    assert shown.err == "", "no progress bar without a terminal"
    size = (tmp_path / "tiny.Q8_0.gguf").stat().st_size
    for word in ("tiny.Q8_0.gguf", f"{size / 1e6:,.1f} MB", "8.5", "ollama create tiny -f", "llama-cli -m"):
        assert word in shown.out
