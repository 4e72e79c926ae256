"""SwiGLU's backward pass with its adapters: the reference against autodiff, the kernel against the reference."""

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import BF16, FP8, FP8_GRADIENT, GRADIENT

from jaxtune.kernels import gated_mlp as module
from jaxtune.kernels import linear, swiglu, swiglu8, target
from jaxtune.kernels.fp8_mlp import fp8_gated_mlp
from jaxtune.kernels.gated_mlp import gated_mlp
from jaxtune.kernels.keep import keeping
from jaxtune.kernels.linear import Adapter
from jaxtune.quant import quantize_nf4

pytestmark = pytest.mark.usefixtures("quick_compilation")


def arrays(n, f, r, s, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(n + f + r + s), 4)
    shapes = ((n, f), (n, 2 * f), (n, r), (n, s))
    return [2 * jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes)]


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_the_reference_is_autodiff():
    d_act, gate_up, xa, d_xa = arrays(24, 16, 4, 3, jnp.float32)

    def act(gate_up):
        gate, up = jnp.split(gate_up, 2, axis=1)
        return jax.nn.silu(gate) * up

    value, vjp = jax.vjp(act, gate_up)
    (want,) = vjp(d_act)
    got = swiglu.reference(d_act, gate_up, xa, d_xa)
    for ours, theirs in zip(got, (want, want.T @ xa, value.T @ d_xa), strict=True):
        assert relative(ours, theirs) <= GRADIENT


@pytest.mark.parametrize(
    "n, f, r, s, races, in_place",
    [
        (64, 64, 32, 16, False, False),
        (192, 128, 8, 16, False, True),
        (192, 128, 8, 16, True, False),
        (192, 128, 8, 16, True, True),
        (128, 64, 64, 40, True, False),
    ],
)
def test_the_kernel_is_the_reference(n, f, r, s, races, in_place):
    args = arrays(n, f, r, s)
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    got = swiglu.kernel(*args, in_place=in_place, interpret=interpret)  # outputs start as NaN
    for ours, theirs in zip(got, swiglu.reference(*args), strict=True):
        assert relative(ours, theirs) <= BF16


def powers_of_two(n, seed):
    return 2.0 ** jax.random.randint(jax.random.key(seed), (n,), -3, 4).astype(jnp.float32)


def test_the_kernel_in_8_bits_is_the_reference():
    args, scales = arrays(192, 128, 8, 16), (powers_of_two(192, 1), powers_of_two(192, 2))
    got = swiglu.kernel(*args, scales, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert got[0].dtype == jnp.float8_e5m2
    for ours, theirs in zip(got, swiglu.reference(*args, scales), strict=True):
        assert relative(ours, theirs) <= BF16
    scaled = [(x * scale[:, None]).astype(x.dtype) for x, scale in zip(args, scales)]
    for ours, theirs in zip(got[1:], swiglu.reference(*scaled, *args[2:])[1:], strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("rows, ffn, blocks, keeps", [(5, 1024, 2, True), (3, 1536, 4, False)])
def test_the_forward_kernel_is_the_reference(rows, ffn, blocks, keeps):
    gate_up, scale = arrays(rows, ffn, 1, 1)[1], powers_of_two(rows, 1)
    got = swiglu8.kernel(gate_up, scale, keeps, blocks, plgpu.InterpretGPUParams(detect_races=True))
    for ours, theirs in zip(got, swiglu8.reference(gate_up, scale, keeps), strict=True):
        assert relative(ours, theirs) <= BF16
    gate, up = jnp.split(gate_up.astype(jnp.float32) * scale[:, None], 2, axis=1)
    eighth, out_scale, top, *kept = got
    assert [(copy == gate_up).all() for copy in kept] == [True] * keeps
    assert relative(eighth.astype(jnp.float32) * out_scale[:, None], jax.nn.silu(gate) * up) <= FP8
    np.testing.assert_array_equal(top, jnp.maximum(jnp.abs(gate).max(1), jnp.abs(up).max(1)))


@pytest.mark.parametrize("ffn", [14336, 28672, 11008, 1536])
def test_the_forward_kernel_lowers_for_a_gpu(ffn):
    shapes = jax.ShapeDtypeStruct((8192, 2 * ffn), jnp.bfloat16), jax.ShapeDtypeStruct((8192,), jnp.float32)
    with target.tracing_for((9, 0)):
        assert swiglu8.supported(ffn, jnp.bfloat16)
    for keeps in (False, True):
        jax.jit(swiglu8.kernel, static_argnums=2).trace(*shapes, keeps).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("scaled, in_place", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    "rows, ffn, r, s", [(8192, 14336, 32, 16), (2048, 1536, 16, 8), (4096, 14336, 64, 64)]
)
def test_the_kernel_lowers_for_a_gpu(rows, ffn, r, s, scaled, in_place):
    shapes = [
        jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((rows, ffn), (rows, 2 * ffn), (rows, r), (rows, s))
    ]
    scales = (jax.ShapeDtypeStruct((rows,), jnp.float32),) * 2 if scaled else None
    jax.jit(partial(swiglu.kernel, in_place=in_place)).trace(*shapes, scales).lower(
        lowering_platforms=("cuda",)
    )


def mlp(width, ffn, ranks):
    rng = np.random.default_rng(0)
    shapes = ((ffn, width), (ffn, width), (width, ffn))
    weights = tuple(quantize_nf4((0.1 * rng.normal(size=shape)).astype(np.float32)) for shape in shapes)
    adapters = tuple(
        None
        if rank is None
        else Adapter(*(jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for s in ((i, rank), (rank, o))))
        for (o, i), rank in zip(shapes, ranks)
    )
    return weights, adapters


@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, None, 4), (None, 4, 16)])
def test_the_joined_mlp_is_three_layers(ranks):
    weights, adapters = mlp(64, 128, ranks)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 64)), jnp.float32)

    def apart(x, adapters):
        gate_up = linear.reference(x, weights[:2], adapters[:2])
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return linear.reference(jax.nn.silu(gate) * up, weights[2:], adapters[2:])

    def probe(function):
        y, vjp = jax.vjp(function, x, adapters)
        return jax.tree.leaves((y, vjp(jnp.cos(y))))

    got, want = probe(lambda x, a: gated_mlp(x, weights, a)), probe(apart)
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() <= GRADIENT * np.abs(theirs).max()


@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, None, 4)])
@pytest.mark.parametrize("ffn", [128, 64])  # backwards the joined matrix of gate and up serves twice, or not
def test_tiles_of_tokens_change_nothing(monkeypatch, ranks, ffn):
    weights, adapters = mlp(64, ffn, ranks)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 96, 64)), jnp.float32)
    monkeypatch.setattr(module, "TILE", 64)

    def probe(kept):
        with keeping(frozenset(kept)):
            y, vjp = jax.vjp(lambda x, a: gated_mlp(x, weights, a), x, adapters)
            program = str(jax.make_jaxpr(vjp)(y))
        return jax.tree.leaves((y, vjp(jnp.cos(y)))), "while" in program or "scan" in program

    (got, tiled), (want, whole) = probe(()), probe(("gate_up",))
    assert tiled and not whole
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() <= GRADIENT * np.abs(theirs).max()


def test_tiles_are_equal_and_whole_for_the_kernel(monkeypatch):
    monkeypatch.setattr(module, "TILE", 256)
    tiles = {256: 1, 257: 1, 320: 1, 512: 2, 576: 3, 640: 5, 1000: 1, 1024: 4}
    assert {tokens: module.tiles_of(tokens) for tokens in tiles} == tiles


@pytest.mark.parametrize("dy_scale", [1e-9, 1.0, 1e4])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, None, 4), (None, 4, 16)])
def test_the_joined_mlp_in_8_bits(ranks, dy_scale):
    """Beside float32. Three products in a row, and for the gradients of A two of them: errors add in squares."""
    weights, adapters = mlp(128, 256, ranks)
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(300, 128)), jnp.float32) for _ in range(2))
    dy = dy * dy_scale * np.exp(rng.normal(size=(300, 1)))

    def apart(x, adapters):
        gate_up = linear.reference(x, weights[:2], adapters[:2])
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return linear.reference(jax.nn.silu(gate) * up, weights[2:], adapters[2:])

    def probe(function):
        y, vjp = jax.vjp(function, x, adapters)
        return y, jax.tree.leaves(vjp(dy.astype(jnp.float32)))

    (y, grads), (want, exact) = probe(lambda x, a: fp8_gated_mlp(x, weights, a)), probe(apart)
    assert relative(y, want) <= 2 * FP8
    for ours, theirs in zip(grads, exact, strict=True):
        assert relative(ours, theirs) <= 2 * FP8_GRADIENT


def test_where_it_is_used():
    weights, adapters = mlp(64, 128, (8, 8, 8))
    enough = jax.ShapeDtypeStruct((2, 512, 64), jnp.bfloat16)
    assert not module.supported(enough, weights, adapters)  # no GPU here
    with target.tracing_for((9, 0)):
        assert module.supported(enough, weights, adapters)
        assert not module.supported(jax.ShapeDtypeStruct((2, 4, 64), jnp.bfloat16), weights, adapters)
        assert not module.supported(jax.ShapeDtypeStruct((1, 500, 64), jnp.bfloat16), weights, adapters)
        assert not module.supported(jax.ShapeDtypeStruct((2, 512, 64), jnp.float32), weights, adapters)
        assert not module.supported(enough, weights, (*adapters[:2], None))
        wide = mlp(64, 128, (40, 40, 8))
        assert not module.supported(enough, *wide)
    with target.tracing_for((10, 0)):
        assert not module.supported(enough, weights, adapters)
