"""The importance matrix: torch's hooks judge what is collected, the gguf package and the format's text the files."""

import struct
from functools import cache

import gguf
import numpy as np
import pytest
import torch
import transformers
from export_judges import random_adapter

from jaxtune.export.imatrix import ImportanceMatrix, _packed, collect_imatrix, load_or_collect, read_imatrix
from jaxtune.fast import FastLanguageModel
from jaxtune.formats.gguf_names import hf_name

ROWS = ["Hello world, how are you today?" * 3, "short", "Another row of text, number 123."]
CHUNK = 64


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=None, dtype="float32", **options)[0]


def torch_sums(folder, tokenizer) -> dict[str, np.ndarray]:
    """Σ x² of what goes into every linear layer of transformers' model, each document of the chunks run alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    sums: dict[str, np.ndarray] = {}

    def watch(name):
        def hook(module, arguments):
            sums[name] = sums.get(name, 0) + arguments[0].double().square().sum((0, 1)).numpy()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.no_grad():
        for row in _packed(ROWS, tokenizer, CHUNK, "text"):
            ids = torch.tensor(row["input_ids"])
            for document in ids.split(row["seq_lengths"]):
                model(document[None])
    return sums


def assert_equal_sums(matrix: ImportanceMatrix, want: dict[str, np.ndarray]) -> None:
    assert {hf_name(name, "llama") for name in matrix.sums} == set(want)
    for name, value in matrix.sums.items():
        reference = want[hf_name(name, "llama")]
        assert np.abs(value - reference).max() <= 1e-5 * np.abs(reference).max(), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sums_equal_torchs(tiny_model_dir, family):
    folder = tiny_model_dir(family)
    model = load(folder, load_in_16bit=True)
    matrix = collect_imatrix(model, ROWS, chunk_size=CHUNK, batch_size=2, progress=False)
    assert_equal_sums(matrix, torch_sums(folder, model.tokenizer))
    tokens = sum(len(model.tokenizer(row)["input_ids"]) + 1 for row in ROWS)  # EOS ends a text
    assert set(matrix.counts.values()) == {tokens}, "padding does not count"


def test_the_adapter_is_seen(tiny_model_dir, tmp_path):
    """On a base in 4 bits: torch runs the merged model."""
    model = random_adapter(load(tiny_model_dir("llama"), load_in_4bit=True))
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", progress=False)
    matrix = collect_imatrix(model, ROWS, chunk_size=CHUNK, batch_size=2, progress=False)
    assert_equal_sums(matrix, torch_sums(tmp_path / "merged", model.tokenizer))
    plain = collect_imatrix(load(tiny_model_dir("llama")), ROWS, chunk_size=CHUNK, progress=False)
    assert not np.allclose(plain.sums["blk.1.ffn_down.weight"], matrix.sums["blk.1.ffn_down.weight"], 1e-2)


def test_rows_of_other_formats_and_fewer_chunks(tiny_model_dir):
    model = load(tiny_model_dir("llama"), load_in_16bit=True)
    chats = [
        {"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": "Yes."}]}
        for row in ROWS
    ]
    whole = collect_imatrix(model, chats, chunk_size=CHUNK, progress=False)
    part = collect_imatrix(model, chats, chunk_size=CHUNK, max_chunks=2, progress=False)
    assert 0 < part.counts["blk.0.attn_q.weight"] <= 2 * CHUNK < whole.counts["blk.0.attn_q.weight"]
    assert whole.chunks == whole.counts["blk.0.attn_q.weight"] // CHUNK


@cache
def example() -> ImportanceMatrix:
    rng = np.random.default_rng(0)
    widths = {"blk.0.attn_q.weight": 64, "blk.0.ffn_down.weight": 96, "blk.10.attn_q.weight": 64}
    sums = {name: rng.gamma(1.0, 100.0, width).astype(np.float32) for name, width in widths.items()}
    return ImportanceMatrix(sums, dict.fromkeys(sums, 1300), ("rows.jsonl",))


def test_gguf_file(tmp_path):
    example().save(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    value = lambda key: reader.fields[key].contents()  # noqa: E731
    assert value("general.type") == "imatrix" and value("imatrix.datasets") == ["rows.jsonl"]
    assert (value("imatrix.chunk_count"), value("imatrix.chunk_size")) == (2, 512)
    names = [tensor.name for tensor in reader.tensors]
    assert names == [f"{name}{end}" for name in sorted(example().sums) for end in (".in_sum2", ".counts")]
    assert reader.tensors[1].data.tolist() == [1300.0]
    back = read_imatrix(tmp_path / "imatrix.gguf")
    assert back.counts == example().counts and back.datasets == ("rows.jsonl",) and back.chunks == 2
    for name, value in example().sums.items():
        assert (back.sums[name] == value).all()


def test_dat_file(tmp_path):
    """The older format, read apart from the writer: a string, the calls, the width, mean · calls."""
    path = tmp_path / "imatrix.dat"
    example().save(path)
    data, at = path.read_bytes(), 4
    assert struct.unpack_from("<i", data) == (3,)
    for name in sorted(example().sums):
        (length,) = struct.unpack_from("<i", data, at)
        assert data[at + 4 : at + 4 + length].decode() == name
        calls, width = struct.unpack_from("<ii", data, at + 4 + length)
        assert calls == 3 and width == example().sums[name].size  # 1300 tokens are begun chunks
        at += 12 + length
        mean = np.frombuffer(data, "<f4", width, at) / calls
        np.testing.assert_allclose(mean, example().sums[name] / 1300, rtol=1e-6)
        at += 4 * width
    assert data[at:] == struct.pack("<ii", 2, 10) + b"rows.jsonl"
    back = read_imatrix(path)
    for name in example().sums:
        width = example().sums[name].size
        np.testing.assert_allclose(back.importance(name, width), example().importance(name, width), rtol=1e-6)


def test_what_a_path_means(tiny_model_dir, tmp_path):
    model = load(tiny_model_dir("llama"), load_in_16bit=True)
    example().save(tmp_path / "imatrix.dat")
    (tmp_path / "imatrix_unsloth.gguf_file").write_bytes((tmp_path / "imatrix.dat").read_bytes())
    (tmp_path / "rows.txt").write_text("Some text.\n")
    for name in ("imatrix.dat", "imatrix_unsloth.gguf_file"):
        assert load_or_collect(str(tmp_path / name), model).chunks == 3
    collected = load_or_collect(tmp_path / "rows.txt", model, progress=False)
    assert collected.datasets == (str(tmp_path / "rows.txt"),) and len(collected.sums) == 14
    assert load_or_collect(example(), model) is example()
    with pytest.raises(FileNotFoundError):
        load_or_collect("nowhere.gguf", model)
    with pytest.raises(ValueError, match="pass rows"):
        load_or_collect(True, model)


def test_importance():
    matrix = example()
    values = matrix.importance("blk.0.attn_q.weight", 64)
    assert values is not None and values.dtype == np.float32
    np.testing.assert_allclose(values, matrix.sums["blk.0.attn_q.weight"] / 1300, rtol=1e-6)
    assert matrix.importance("output.weight", 64) is None
    with pytest.raises(ValueError, match=r"64 columns for blk.0.attn_q.weight, the model 96"):
        matrix.importance("blk.0.attn_q.weight", 96)
    keys = matrix.metadata()
    assert keys["quantize.imatrix.dataset"] == "rows.jsonl" and keys["quantize.imatrix.chunks_count"] == 2
    assert "quantize.imatrix.file" not in keys and keys["quantize.imatrix.entries_count"] == 3


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"blk.7.other.weight": np.ones(64, np.float32)}, "fits no tensor"),
        ({"blk.0.attn_q.weight": np.ones(32, np.float32)}, "another model"),
        ({"blk.0.attn_q.weight": np.full(64, np.nan, np.float32)}, "NaN"),
        ({"blk.0.attn_q.weight": np.full(64, -1, np.float32)}, "negative"),
    ],
)
def test_a_matrix_that_does_not_fit(sums, message):
    shapes = {"blk.0.attn_q.weight": (128, 64), "output_norm.weight": (64,)}
    with pytest.raises(ValueError, match=message):
        ImportanceMatrix(sums, dict.fromkeys(sums, 10)).check(shapes)


def test_files_that_are_none(tmp_path, smollm2_gguf):
    with pytest.raises(ValueError, match="type 'model', not 'imatrix'"):
        read_imatrix(smollm2_gguf)
    example().save(tmp_path / "whole.dat")
    whole = (tmp_path / "whole.dat").read_bytes()
    for cut in (b"", b"some text that is no matrix", whole[:100], whole[:3]):
        (tmp_path / "cut.dat").write_bytes(cut)
        with pytest.raises(ValueError, match="no importance matrix"):
            read_imatrix(tmp_path / "cut.dat")
