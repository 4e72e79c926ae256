"""Quantised blocks equal llama.cpp's, byte for byte: from a golden file, and against the library itself."""

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from golden.gguf_blocks import FILE, KINDS, hard_rows, importances

from jaxtune.export import quantisers
from jaxtune.export.quantisers import quantise, row_bytes

WIDTH = 1024


@pytest.fixture(scope="module")
def golden():
    return np.load(FILE)


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    plain = {
        f"plain {i}": row.astype(np.float32) for i, row in enumerate(0.02 * rng.normal(size=(60, WIDTH)))
    }
    return {**hard_rows(WIDTH), **plain}


def _assert_equal(ours: np.ndarray, theirs: np.ndarray, kind: Kind, names: list[str]):
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    block = GGML_QUANT_SIZES[kind][1]
    wrong = (ours.reshape(len(names), -1, block) != theirs.reshape(len(names), -1, block)).any(-1)
    told = [
        f"{name}: {count} of {wrong.shape[1]} blocks" for name, count in zip(names, wrong.sum(1)) if count
    ]
    assert not told, f"{kind.name} differs from llama.cpp in {told}"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", KINDS)
def test_blocks_equal_the_golden_ones(golden, name, weighted):
    values = golden["values"]
    ours = quantise(values, Kind[name], golden["importance"] if weighted else None)
    theirs = golden[f"{name} importance" if weighted else name]
    _assert_equal(ours, theirs, Kind[name], [f"row {i}" for i in range(len(values))])


@pytest.mark.parametrize("importance", importances(WIDTH).items(), ids=importances(WIDTH))
@pytest.mark.parametrize("name", ["F16", "BF16", *KINDS])
def test_blocks_equal_llama_cpps(llama_cpp, rows, name, importance):
    values = np.stack(list(rows.values()))
    theirs = llama_cpp.quantise(values, Kind[name], importance[1])
    _assert_equal(quantise(values, Kind[name], importance[1]), theirs, Kind[name], list(rows))


@pytest.mark.parametrize("name", KINDS)
def test_one_row_alone_is_the_same(llama_cpp, name):
    """A single group or superblock in flight: NumPy sums a lone column in another order than many."""
    width = GGML_QUANT_SIZES[Kind[name]][0]
    for importance in (None, importances(512)["squares"][:width]):
        for row in np.random.default_rng(5).normal(size=(8, 1, width)).astype(np.float32):
            _assert_equal(
                quantise(row, Kind[name], importance),
                llama_cpp.quantise(row, Kind[name], importance),
                Kind[name],
                ["row"],
            )


def test_the_descent_ends_after_five_sweeps(llama_cpp):
    """Uniform weights: some groups of Q3_K would go on improving, others need the fifth."""
    values = np.random.default_rng(10).uniform(-1, 1, (1000, 512)).astype(np.float32)
    ours, theirs = quantise(values, Kind.Q3_K), llama_cpp.quantise(values, Kind.Q3_K)
    _assert_equal(ours, theirs, Kind.Q3_K, [f"row {i}" for i in range(len(values))])


@pytest.mark.parametrize("name", KINDS)
def test_chunks_and_layout_of_the_input_do_not_matter(monkeypatch, name):
    values = np.random.default_rng(4).normal(size=(512, 7)).astype(np.float32).T
    importance = importances(512)["squares"]
    whole = quantise(values, Kind[name], importance)
    monkeypatch.setattr(quantisers, "CHUNK", 1)
    np.testing.assert_array_equal(quantise(values, Kind[name], importance), whole)


@pytest.mark.parametrize(("name", "most"), [("F16", 3e-4), ("BF16", 2e-3), ("Q8_0", 6e-3), ("Q6_K", 0.02)])
def test_the_gguf_package_reads_the_weights_back(name, most):
    values = np.random.default_rng(6).normal(size=(4, 512)).astype(np.float32)
    back = dequantize(quantise(values, Kind[name]), Kind[name])
    assert np.sqrt(np.mean((back - values) ** 2)) < most


def test_importance_lowers_the_weighted_error():
    rng = np.random.default_rng(7)
    values = rng.normal(size=(16, 1024)).astype(np.float32)
    importance = (rng.random(1024) ** 4).astype(np.float32)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        kind = Kind[name]
        plain, weighted = (dequantize(quantise(values, kind, i), kind) for i in (None, importance))
        error, least = (np.sum(importance * (back - values) ** 2) for back in (plain, weighted))
        assert least < error, name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *KINDS])
def test_nan_and_infinity_are_refused(name, bad):
    values = np.ones((2, 256), np.float32)
    values[1, 17] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(values, Kind[name])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["F16", *KINDS])
def test_what_float16_cannot_hold_is_refused(llama_cpp, name, weighted):
    values = np.random.default_rng(8).normal(size=(2, 256)).astype(np.float32)
    values[1, :32] *= 1e9
    importance = np.ones(256, np.float32) if weighted else None
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        quantise(values, Kind[name], importance)
    blocks = llama_cpp.quantise(values, Kind[name], importance)
    assert not llama_cpp.is_valid(blocks, Kind[name])


def test_bfloat16_has_an_end_too():
    with pytest.raises(ValueError, match="bfloat16 cannot hold"):
        quantise(np.full((1, 32), 3.4e38, np.float32), Kind.BF16)


def test_wrong_arguments_are_refused():
    values = np.ones((2, 96), np.float32)
    with pytest.raises(ValueError, match="rows of 96 weights cannot be Q4_K: it has blocks of 256"):
        quantise(values, Kind.Q4_K)
    with pytest.raises(ValueError, match="IQ2_XS cannot be written; expected F32, F16"):
        row_bytes(Kind.IQ2_XS, 256)
    with pytest.raises(ValueError, match=r"importance has shape \(95,\); expected \(96,\)"):
        quantise(values, Kind.Q4_0, np.ones(95, np.float32))
    for bad in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN, infinity or negative"):
            quantise(values, Kind.Q4_0, np.full(96, bad, np.float32))
