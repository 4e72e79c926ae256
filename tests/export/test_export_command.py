"""`python -m jaxtune.export`: what it takes, where it finds a training run's model, what it says when it cannot."""

import json

import numpy as np
import pytest
from export_judges import load, random_adapter

from jaxtune.export.__main__ import main
from jaxtune.export.imatrix import read_imatrix
from jaxtune.formats.gguf_file import GgufFile


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """A model with an adapter, saved as `python -m jaxtune.train` leaves it."""
    model = random_adapter(load(tiny_model_dir("llama"), load_in_16bit=True))
    folder = tmp_path_factory.mktemp("run") / "orders"
    model.save_pretrained(folder / "adapter")
    model.save_pretrained_merged(folder / "merged", dtype="float32", progress=False)
    (folder / "train.yaml").write_text("learning_rate: 1e-3\n")
    return folder


def test_output_folder_adapter_and_gguf_give_the_same_weights(adapter, tmp_path):
    assert main([str(adapter), str(tmp_path), "--method", "f32", "q8_0"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"orders.F32.gguf", "orders.Q8_0.gguf", "Modelfile"}
    again = tmp_path / "again"
    assert main([str(adapter / "adapter"), str(again), "--method", "f32", "--name", "adapter"]) == 0
    assert main([str(tmp_path / "orders.F32.gguf"), str(again), "--method", "f32", "--name", "gguf"]) == 0
    files = [
        GgufFile(path)
        for path in (tmp_path / "orders.F32.gguf", again / "adapter.F32.gguf", again / "gguf.F32.gguf")
    ]
    assert len({tuple(file.tensors) for file in files}) == 1
    for name in files[0].tensors:
        first, *others = (file.read(name) for file in files)
        for other in others:
            np.testing.assert_allclose(first, other, atol=1e-6)


def test_settings_reach_the_files(adapter, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"Row {i}"}) for i in range(6)))
    arguments = [
        str(adapter),
        str(tmp_path / "out"),
        "--method",
        "q4_0",
        "--system",
        "Be brief.",
        "--imatrix",
    ]
    assert main([*arguments, str(rows), "--save_imatrix", str(tmp_path / "m.dat"), "--processes", "1"]) == 0
    assert 'SYSTEM """Be brief."""' in (tmp_path / "out" / "Modelfile").read_text()
    keys = GgufFile(tmp_path / "out" / "orders.Q4_0.gguf").metadata
    assert keys["quantize.imatrix.dataset"] == str(rows) and keys["quantize.imatrix.entries_count"] == 14
    assert set(read_imatrix(tmp_path / "m.dat").sums) > {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}


def test_adapter_alone(adapter, tmp_path):
    assert main([str(adapter / "adapter"), str(tmp_path), "--lora", "--name", "orders"]) == 0
    assert GgufFile(tmp_path / "orders.LORA.gguf").metadata["adapter.type"] == "lora"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "q9"], "quantization_method 'q9' is unknown"),
        (["--imatrix", "nowhere.dat"], "nowhere.dat"),
        (["--lora"], "has no adapter"),
    ],
)
def test_mistakes_are_one_line(tiny_model_dir, tmp_path, capsys, arguments, message):
    assert main([str(tiny_model_dir("llama")), str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
