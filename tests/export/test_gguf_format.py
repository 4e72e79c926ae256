"""The writer of .gguf files, read back by jaxtune's and the gguf package's readers."""

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Kind

from jaxtune.export import gguf_format
from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.export.quantisers import quantise
from jaxtune.formats.gguf_file import GgufFile

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.real": 0.5,
    "a.text": "naïve ▁",
    "a.u64": np.uint64(2**40),
    "a.i32": np.int32(-1),
    "a.f32": np.float32(1e-5),
    "a.words": ["", "b", "ü"],
    "a.types": np.array([1, 3], np.int32),
    "a.scores": np.array([0.5, -1000], np.float32),
    "a.flags": np.array([True, False]),
}


def _write(path, metadata=METADATA, shape=(3, 64), kind=Kind.Q8_0):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    bias = np.arange(5, dtype=np.float32)
    entries = [TensorEntry("w.weight", shape, kind), TensorEntry("b.bias", (5,), Kind.F32)]
    with GgufWriter(path, metadata, entries) as writer:
        writer.write("w.weight", quantise(values, kind))
        writer.write("b.bias", bias)
    return values, bias, writer.nbytes


def test_both_readers_read_it(tmp_path):
    values, bias, nbytes = _write(tmp_path / "a.gguf")
    ours = GgufFile(tmp_path / "a.gguf")
    assert {
        k: v if not isinstance(v, np.ndarray) else v.tolist() for k, v in METADATA.items()
    } == ours.metadata
    assert list(ours.metadata) == list(METADATA)
    np.testing.assert_array_equal(ours.read("b.bias"), bias)
    assert np.abs(ours.read("w.weight") - values).max() < 0.02
    theirs = GGUFReader(tmp_path / "a.gguf")
    assert (
        theirs.fields["a.u64"].types[0].name == "UINT64"
        and theirs.fields["a.count"].types[0].name == "UINT32"
    )
    assert [tensor.name for tensor in theirs.tensors] == ["w.weight", "b.bias"]
    assert (tmp_path / "a.gguf").stat().st_size == nbytes and nbytes % 32 == 0


def test_a_failure_leaves_nothing(tmp_path):
    entries = [TensorEntry("a", (4,), Kind.F32), TensorEntry("b", (4,), Kind.F32)]
    with pytest.raises(KeyError), GgufWriter(tmp_path / "a.gguf", {}, entries) as writer:
        writer.write("a", np.zeros(4, np.float32))
        assert [file.suffix for file in tmp_path.iterdir()] == [".part"]
        raise KeyError
    with (
        pytest.raises(ValueError, match="'b' was never written"),
        GgufWriter(tmp_path / "a.gguf", {}, entries) as writer,
    ):
        writer.write("a", np.zeros(4, np.float32))
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), GgufWriter(path, {}, []):
        raise KeyError
    assert path.read_bytes() == b"old"
    _write(path)
    assert path.read_bytes()[:4] == b"GGUF"


def test_wrong_order_and_size_are_refused(tmp_path):
    entries = [TensorEntry("a", (4,), Kind.F32), TensorEntry("b", (4,), Kind.F32)]
    with pytest.raises(ValueError, match="'b' is out of order; expected 'a'"):
        with GgufWriter(tmp_path / "a.gguf", {}, entries) as writer:
            writer.write("b", np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="'a' has 20 bytes; its entry says 16"):
        with GgufWriter(tmp_path / "a.gguf", {}, entries) as writer:
            writer.write("a", np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="the same name"):
        GgufWriter(tmp_path / "a.gguf", {}, [entries[0]] * 2)
    with pytest.raises(ValueError, match="rows of 33 weights cannot be Q8_0"):
        GgufWriter(tmp_path / "a.gguf", {}, [TensorEntry("a", (2, 33), Kind.Q8_0)])


@pytest.mark.parametrize("value", [-1, 2**32, None, [1, 2], np.array(["a"]), np.complex64(1)])
def test_values_without_a_type_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"metadata key 'a\.b'"):
        GgufWriter(tmp_path / "a.gguf", {"a.b": value}, [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(gguf_format.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="nothing was written"):
        GgufWriter(tmp_path / "a.gguf", {}, [TensorEntry("a", (1000,), Kind.F32)])
    assert not list(tmp_path.iterdir())
