"""Running an exported file in llama.cpp and comparing: with the real libraries, and with a stand-in for llama-cli."""

import importlib.machinery
import stat
from pathlib import Path

import pytest

from jaxtune.export import verify as module
from jaxtune.export.verify import LlamaCpp, find_llama_cpp, verify
from jaxtune.fast import FastLanguageModel

QUESTION = "Hi?"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama")), max_seq_length=None, dtype="float32", load_in_16bit=True
    )[0]


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXTUNE_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def installed(llama_cpp, monkeypatch) -> Path:
    folder = Path(llama_cpp.lib._name).parent
    monkeypatch.setenv("JAXTUNE_LLAMA_CPP", str(folder))
    return folder


def save(model, folder, method="f32", **options):
    return model.save_pretrained_gguf(
        folder, None, method, name="tiny", processes=1, **{"progress": False} | options
    )


def test_library(model, installed, tmp_path, capsys):
    result = save(model, tmp_path, ["f32", "q4_0"], verify=QUESTION, progress=True)
    whole, coarse = result["verifications"]
    assert whole.prompt == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert whole.same_tokens and whole.same_choice == 1 and whole.answer == whole.expected != ""
    assert whole.logit_error < 1e-3 < coarse.logit_error < 0.5
    shown = capsys.readouterr().out
    for word in ("Verified tiny.F32.gguf in llama.cpp", "the same tokens", "100% of the positions"):
        assert word in shown


def test_another_models_file_is_told_apart(model, installed, tiny_model_dir, tmp_path):
    save(model, tmp_path)
    other = FastLanguageModel.from_pretrained(
        str(tiny_model_dir("llama_tied")), max_seq_length=None, dtype="float32", load_in_16bit=True
    )[0]
    (found,) = verify(other, [tmp_path / "tiny.F32.gguf"], question=QUESTION)
    assert found.logit_error > 0.5 and found.same_choice < 0.5


def test_a_file_that_llama_cpp_does_not_load(model, installed, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(RuntimeError, match=r"bad.gguf: .*llama.cpp does not load the file"):
        verify(model, [tmp_path / "bad.gguf"], question=QUESTION)


def test_a_library_that_is_none(model, monkeypatch, tmp_path):
    (tmp_path / "libllama.so").write_text("not a library")
    monkeypatch.setenv("JAXTUNE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"libllama\.so"):
        verify(model, [tmp_path / "x.gguf"], question=QUESTION)
    monkeypatch.setenv("JAXTUNE_LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no libllama"):
        find_llama_cpp()


def test_without_llama_cpp_nothing_is_written(model, nothing_installed, tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install xllamacpp"):
        save(model, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "file"), [("llama_cpp", "lib/libllama.so"), ("xllamacpp", "xllamacpp.abi3.so")]
)
def test_python_packages_are_found(nothing_installed, monkeypatch, tmp_path, package, file):
    folder = tmp_path / package
    for name in (file, "lib/libggml.so", "lib/libllama-common.so", "__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    spec = importlib.machinery.ModuleSpec(package, None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec if name == package else None)
    assert find_llama_cpp() == LlamaCpp(folder / file, True)


def test_program_on_path(model, nothing_installed, tmp_path):
    """llama-cli can be asked for an answer only."""
    program = tmp_path / "llama-cli"
    program.write_text(
        f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$@" > {tmp_path}/arguments\n'
        f'while [ "$1" != -f ]; do shift; done\ncat "$2" > {tmp_path}/prompt\necho \' An answer. [end of text]\'\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    save(model, tmp_path)
    (found,) = verify(model, [tmp_path / "tiny.F32.gguf"], question=QUESTION, max_new_tokens=5)
    assert found.answer == "An answer." and found.logit_error is None and found.expected
    assert (tmp_path / "prompt").read_text() == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    arguments = (tmp_path / "arguments").read_text()
    for part in (f"-m {tmp_path}/tiny.F32.gguf", "-n 5", "--temp 0"):
        assert part in arguments
    assert "jaxtune" in str(found) and "logits" not in str(found)
    program.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="no such option"):
        verify(model, [tmp_path / "tiny.F32.gguf"], question=QUESTION)
