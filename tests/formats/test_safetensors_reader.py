import json
import resource

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.formats.safetensors_reader import INDEX_NAME, SafetensorsFile, SafetensorsFolder


def assert_equal(folder, weights):
    reader = SafetensorsFolder(folder)
    assert set(reader.names()) == set(weights)
    for name, expected in weights.items():
        value = reader.read(name)
        assert value.dtype == ml_dtypes.bfloat16 == reader.info(name).dtype
        assert value.shape == expected.shape == reader.info(name).shape
        np.testing.assert_array_equal(value.astype(np.float32), expected)


def test_single_file(llama):
    assert_equal(*llama)


def test_shards(sharded):
    folder, weights = sharded
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(folder, weights)


def test_a_single_file_comes_before_an_index(llama, sharded):
    """As in transformers, when both lie in a folder."""
    folder, _ = sharded
    (folder / "model.safetensors").write_bytes((llama[0] / "model.safetensors").read_bytes())
    next(folder.glob("model-*")).unlink()
    assert_equal(folder, llama[1])


def test_a_tensor_that_the_index_does_not_name_is_left_out(sharded):
    folder, weights = sharded
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert_equal(folder, {name: value for name, value in weights.items() if name != "model.norm.weight"})


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_]
)
def test_dtypes(tmp_path, dtype):
    values = {"a": np.arange(6).reshape(2, 3).astype(dtype), "empty": np.zeros((0, 4), dtype)}
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, expected in values.items():
        np.testing.assert_array_equal(file.read(name), expected)


def test_views_are_read_only_and_survive_the_next_read(llama):
    folder, weights = llama
    reader = SafetensorsFolder(folder)
    first, second = reader.names()[:2]
    view = reader.read(first)
    reader.read(second)
    np.testing.assert_array_equal(view.astype(np.float32), weights[first])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_reading_keeps_one_tensor_resident(tmp_path):
    """A pass over 240 MB of weights raises the peak resident memory by about one 20 MB tensor."""
    size = 5_000_000
    save_file({f"w{i:02d}": np.full(size, i, np.float32) for i in range(12)}, tmp_path / "model.safetensors")
    reader = SafetensorsFolder(tmp_path)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident()
    peak = 0
    for name in reader.names():
        assert reader.read(name).sum() == int(name[1:]) * size
        peak = max(peak, resident() - before)
    assert peak < 3 * 4 * size, f"{peak / 1e6:.0f} MB resident, one tensor is {4 * size / 1e6:.0f} MB"


def test_missing_shard_is_named(sharded):
    folder, _ = sharded
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the .* shards .*{lost.name}"):
        SafetensorsFolder(folder)


def test_index_names_a_tensor_that_is_not_there(sharded):
    folder, _ = sharded
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.ghost\.weight"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("keep", [-1, -1000, 300, 9, 4, 0])
def test_truncated_file(llama, tmp_path, keep):
    raw = (llama[0] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors .*(truncated|not a whole)"):
        SafetensorsFolder(tmp_path)


def test_header_that_is_not_json(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 64)
    with pytest.raises(ValueError, match="header is not JSON"):
        SafetensorsFolder(tmp_path)


def test_wrong_byte_count_and_unknown_dtype(tmp_path):
    def write(entry):
        header = json.dumps({"w": entry}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))

    write({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]})
    with pytest.raises(ValueError, match=r"'w'.*12 bytes do not hold float32"):
        SafetensorsFolder(tmp_path)
    write({"dtype": "F4", "shape": [4], "data_offsets": [0, 2]})
    with pytest.raises(ValueError, match="dtype F4"):
        SafetensorsFolder(tmp_path)


def test_other_formats_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, which jaxtune does not read"):
        SafetensorsFolder(tmp_path)
