"""The K-quants in JAX: nearly all blocks those of the NumPy path, and the same error."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from golden.gguf_blocks import hard_rows
from tolerances import GGUF_BLOCKS, GGUF_ERROR

from jaxtune.export import quantisers, quantisers_jax

WIDTH = 512
IMPORTANCE = (np.random.default_rng(1).normal(size=WIDTH) ** 2).astype(np.float32)
KINDS = sorted(quantisers_jax.KINDS)


def assert_alike(values: np.ndarray, kind: Kind, importance: np.ndarray | None):
    ours, exact = (m.quantise(values, kind, importance) for m in (quantisers_jax, quantisers))
    assert ours.shape == exact.shape and ours.dtype == np.uint8
    block = GGML_QUANT_SIZES[kind][1]
    same = (ours.reshape(-1, block) == exact.reshape(-1, block)).all(1).mean()
    error, least = (np.sqrt(np.mean((dequantize(blocks, kind) - values) ** 2)) for blocks in (ours, exact))
    assert same >= GGUF_BLOCKS and error <= GGUF_ERROR * least, (
        f"{same:.2%} of the blocks, {error / least:.6f} times the error"
    )


@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_and_errors(kind, importance):
    rng = np.random.default_rng(0)
    normal, heavy = 0.02 * rng.normal(size=(500, WIDTH)), 0.02 * rng.standard_t(3, size=(500, WIDTH))
    assert_alike(np.concatenate([normal, heavy]).astype(np.float32), kind, importance)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_hard_rows(kind):
    rows = hard_rows(WIDTH)
    del rows["subnormal"]  # XLA may flush them to zero
    values = np.stack(list(rows.values()))
    ours, exact = (m.quantise(values, kind) for m in (quantisers_jax, quantisers))
    for name, a, b in zip(rows, ours, exact):
        a, b = dequantize(a, kind), dequantize(b, kind)
        assert np.isfinite(a).all() and np.abs(a - b).max() <= 0.05 * np.abs(b).max(), name


def test_more_than_one_part_and_arrays_of_jax(monkeypatch):
    monkeypatch.setattr(quantisers_jax, "_SIZES", (16, 64))
    values = np.random.default_rng(2).normal(size=(45, 3 * 256)).astype(np.float32)
    importance = np.random.default_rng(3).random(3 * 256).astype(np.float32)
    blocks = quantisers_jax.quantise(jnp.asarray(values), Kind.Q6_K, importance)
    np.testing.assert_array_equal(blocks, quantisers.quantise(values, Kind.Q6_K, importance))


def test_what_the_numpy_path_refuses_is_refused():
    values = np.ones((2, 256), np.float32)
    with pytest.raises(ValueError, match="IQ2_XS cannot be written"):
        quantisers_jax.quantise(values, Kind.IQ2_XS)
    with pytest.raises(ValueError, match="rows of 128 weights cannot be Q4_K"):
        quantisers_jax.quantise(values.reshape(4, 128), Kind.Q4_K)
    with pytest.raises(ValueError, match=r"importance has shape \(255,\)"):
        quantisers_jax.quantise(values, Kind.Q6_K, np.ones(255, np.float32))
    values[1, 5] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantisers_jax.quantise(values, Kind.Q6_K)
    values[1, 5] = 1e12
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        quantisers_jax.quantise(values, Kind.Q6_K)


@pytest.mark.gpu
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_and_errors_on_a_gpu(kind, importance):
    assert_alike(
        (0.02 * np.random.default_rng(4).normal(size=(8192, WIDTH))).astype(np.float32), kind, importance
    )
