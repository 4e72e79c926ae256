"""The NF4 product for few rows, in Mosaic GPU's interpreter, and compiled for CUDA at the shapes that are served.

The interpreter knows neither inline PTX nor register operands of wgmma: there a jnp twin stands for the products of a
block. What the twin replaces is tested on a GPU only (tests/gpu/test_nf4_matmul.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import BF16, GRADIENT

from jaxtune.kernels import nf4_matmul as kernel
from jaxtune.kernels import target
from jaxtune.kernels.linear import Adapter, adapted_linear, reference
from jaxtune.kernels.nf4_matmul import Config, config_for, nf4_matmul, supported
from jaxtune.quant import NF4, NF4_CODE, quantize_nf4

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUPS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}


def given(m, width, outs, ranks, seed=0):
    """(x, weights, adapters), bfloat16 and double-quantised NF4."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    weights = tuple(quantize_nf4(rng.normal(size=(out, width)).astype(np.float32)) for out in outs)
    adapters = tuple(
        None if rank is None else Adapter(draw(width, rank), draw(rank, out))
        for rank, out in zip(ranks, outs, strict=True)
    )
    return draw(m, width), weights, adapters


def check(m, width, outs, ranks, config=None, **interpret):
    """Memory starts as NaN in the interpreter: what is finite has been written."""
    arguments = given(m, width, outs, ranks)
    interpreted = plgpu.InterpretGPUParams(**interpret)
    x, weights, adapters = arguments
    product = jax.jit(lambda x, weights, lora: nf4_matmul(x, weights, lora, config, interpreted))
    got = np.asarray(product(x, weights, kernel.fold(weights, adapters)))
    want = np.asarray(kernel.reference(*arguments))
    assert got.shape == want.shape and np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= BF16 * np.linalg.norm(want)


@pytest.mark.parametrize("m", [1, 7, 8, 63, 64])
def test_it_is_the_reference(m):
    check(m, 256, (64,), (None,))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("ranks", [(8, 4), (None, 8)])
def test_layers_that_share_x(ranks, m):
    check(m, 768, (128, 256), ranks, Config(2, 2))  # three chunks through two stages, in three parts


def test_no_stage_is_read_before_it_is_full(monkeypatch):
    monkeypatch.setattr(kernel, "SMS", 1)  # one part: the stages are used again
    check(2, 768, (128,), (8,), Config(2, 2), detect_races=True)


def test_more_tiles_than_processors(monkeypatch):
    monkeypatch.setattr(kernel, "SMS", 1)
    check(2, 256, (64, 128), (None, None), Config(1, 3))


def test_a_block_of_zeros():
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    weight[:, 64:128] = 0
    weight[3] = 0
    stored = (quantize_nf4(weight, double_quant=False),)
    x = jnp.ones((2, 256), jnp.bfloat16)
    got = nf4_matmul(x, stored, None, interpret=plgpu.InterpretGPUParams())
    want = kernel.reference(x, stored, (None,))
    assert (got[:, 3] == 0).all()
    assert np.linalg.norm(got - want) <= BF16 * np.linalg.norm(want)


def shapes(rows, width, outs, rank):
    make = jax.ShapeDtypeStruct
    weights = tuple(
        NF4(make((out, width // 2), jnp.uint8), make((out, width // 64), jnp.float32)) for out in outs
    )
    adapters = tuple(
        Adapter(make((width, rank), jnp.bfloat16), make((rank, out), jnp.bfloat16)) for out in outs
    )
    return make((rows, 1, width), jnp.bfloat16), weights, adapters


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("group", GROUPS)
def test_few_rows_compile_for_cuda(group, rows):
    """Llama-3.1-8B's layers, through the dispatch: layouts and shared memory are checked without a GPU."""
    with target.tracing_for((9, 0)):
        program = jax.jit(lambda *a: adapted_linear(*a)).trace(*shapes(rows, *GROUPS[group], 16))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("rank, warpgroups", [(128, 1), (40, 1), (8, 2)])
def test_other_ranks_compile_for_cuda(rank, warpgroups):
    assert config_for(64, GROUPS["qkv"][1], rank).warpgroups == warpgroups
    with target.tracing_for((9, 0)):
        program = jax.jit(lambda *a: adapted_linear(*a)).trace(*shapes(64, *GROUPS["qkv"], rank))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_what_is_supported():
    bf16, shape = jnp.bfloat16, [(4096, 4096)]
    assert not supported(8, bf16, shape, 16)  # no Hopper GPU here
    with target.tracing_for((9, 0)):
        assert supported(8, bf16, shape, 16) and supported(64, jnp.dtype("bfloat16"), shape, 0)
        assert not supported(65, bf16, shape, 16)
        assert not supported(8, jnp.float32, shape, 16)
        assert not supported(8, bf16, [(4096, 4096 + 64)], 16)
        assert not supported(8, bf16, [(4096 + 32, 4096)], 16)
        assert supported(8, bf16, shape, 256) and not supported(8, bf16, shape, 257)
    with target.tracing_for((8, 0)):
        assert not supported(8, bf16, shape, 16)


def test_more_rows_or_ranks_make_smaller_tiles():
    assert [config_for(m, [4096], 16).warpgroups for m in (1, 16, 32, 64)] == [4, 4, 2, 2]
    assert config_for(8, [4096, 128], 0).warpgroups == 2
    assert config_for(64, [4096], 128).warpgroups == 1


def test_gradients_are_those_of_two_products(monkeypatch):
    x, weights, adapters = given(4, 256, (64, 64), (8, None))

    def probe():
        y, vjp = jax.vjp(lambda x, adapters: adapted_linear(x, weights, adapters), x, adapters)
        return jax.tree.leaves(vjp(jnp.ones_like(y)))

    want = probe()
    monkeypatch.setattr(kernel, "supported", lambda *_: True)
    monkeypatch.setattr(kernel, "fold", lambda weights, adapters: None)
    monkeypatch.setattr(kernel, "nf4_matmul", lambda x, weights, lora: reference(x, weights, adapters))
    for ours, theirs in zip(probe(), want, strict=True):
        difference = np.abs((ours - theirs).astype(np.float32)).max()
        assert difference <= GRADIENT * np.abs(theirs.astype(np.float32)).max()


def test_adapters_are_folded_once_by_who_says_so(monkeypatch):
    """A decode step is given them folded; what it would do for each token is 6 launches a layer."""
    x, weights, adapters = given(4, 256, (64, 64), (8, None))
    folded = kernel.fold(weights, adapters)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, folded)
    monkeypatch.setattr(kernel, "supported", lambda *_: True)
    seen = []
    monkeypatch.setattr(
        kernel, "nf4_matmul", lambda x, weights, lora: seen.append(lora) or reference(x, weights, adapters)
    )
    adapted_linear(x, weights, adapters, doubled)
    adapted_linear(x, weights, adapters)
    for ours, theirs in zip(jax.tree.leaves(seen), jax.tree.leaves((doubled, folded)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_values_have_no_common_error():
    """Of weights as they are: normal, in blocks of 64."""
    weights = np.random.default_rng(0).normal(size=(20000, 64)).astype(np.float32)
    scaled = weights / np.abs(weights).max(1, keepdims=True)
    error = kernel.values().astype(np.float32) - NF4_CODE
    codes = np.searchsorted((NF4_CODE[1:] + NF4_CODE[:-1]) / 2, scaled)
    assert (
        abs(error[codes].mean())
        < 1e-5
        < abs((NF4_CODE.astype(jnp.bfloat16).astype(np.float32) - NF4_CODE)[codes].mean())
    )
    assert np.abs(error).max() <= 2.0**-8
