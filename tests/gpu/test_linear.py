"""On a Hopper GPU (`pytest -m gpu`): layers with adapters, in bfloat16 and in 8 bits, beside products in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_checks import Draws, kernels_in, poisoned, relative
from tolerances import BF16, FP8, FP8_GRADIENT

from jaxtune.kernels import fp8, gated_mlp, linear, target
from jaxtune.kernels.fp8_mlp import _through, fp8_gated_mlp
from jaxtune.kernels.keep import keeping
from jaxtune.kernels.linear import Adapter, adapted_linear
from jaxtune.quant import dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.gpu
TOKENS = 2, 512
LAYERS = [(1024, (1024, 256, 256), (16, 16, 16)), (1024, (2048, 2048), (16, 8)), (2048, (1024,), (16,))]
RANKS = [(16, 16, 16), (8, None, 4)]


@pytest.fixture(autouse=True)
def hopper():
    if target.capability() != (9, 0):
        pytest.skip(f"the kernels are for sm_90, this is {target.capability()}")


def layers(draws, shapes, ranks):
    """NF4 weights [out, in] and bfloat16 adapters, None where there is no rank."""
    weights = tuple(quantize_nf4(0.1 * draws.normal(*shape)) for shape in shapes)
    low = lambda *shape: (0.1 * draws.normal(*shape)).astype(jnp.bfloat16)  # noqa: E731
    adapters = [None if r is None else Adapter(low(i, r), low(r, o)) for (o, i), r in zip(shapes, ranks)]
    return weights, tuple(adapters)


def errors(
    function, exact, draws, width, out, weights, adapters, kernels
) -> tuple[float, float, list[float]]:
    """Relative errors of y, of dx and of the adapters' gradients; kernels: how many are called at least."""
    x, dy = (draws.normal(*TOKENS, size, dtype=jnp.bfloat16) for size in (width, out))

    def probe(product):
        def run(x, adapters, dy):
            y, vjp = jax.vjp(lambda x, a: product(x, weights, a), x, adapters)
            return jax.tree.leaves((y, vjp(dy)))

        return run

    assert kernels_in(probe(function), x, adapters, dy) >= kernels
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, adapters, dy))
    with jax.default_matmul_precision("highest"):
        want = probe(exact)(*wide)
    y, dx, *rest = map(relative, poisoned(probe(function))(x, adapters, dy), want)
    print(f"y {y:.1e}, dx {dx:.1e}, adapters {max(rest):.1e}")
    return y, dx, rest


@pytest.mark.parametrize("width, outs, ranks", LAYERS)
def test_the_joined_product(width, outs, ranks):
    draws = Draws()
    weights, adapters = layers(draws, [(out, width) for out in outs], ranks)
    y, dx, rest = errors(
        adapted_linear, linear.reference, draws, width, sum(outs), weights, adapters, kernels=2
    )
    assert max(y, dx, *rest) <= BF16


def joined8(x, weights, adapters):
    return jnp.concatenate(fp8.fp8_linear(x, weights, adapters), axis=-1)


@pytest.mark.parametrize("width, outs, ranks", [*LAYERS, (1024, (1024, 256, 256), (8, None, 4))])
def test_the_product_in_8_bits(width, outs, ranks):
    """The adapters' gradients are two 16-bit products in a row."""
    draws = Draws()
    weights, adapters = layers(draws, [(out, width) for out in outs], ranks)
    y, dx, rest = errors(joined8, linear.reference, draws, width, sum(outs), weights, adapters, kernels=2)
    assert y <= FP8 and dx <= FP8_GRADIENT and max(rest) <= 2 * BF16


def whole8(weights):
    """The weights one below the other as their 8-bit numbers say them, float32."""
    return jnp.concatenate([fp8.rounded(dequantize_nf4(w), fp8.E4M3, axis=None) for w in weights])


def test_the_product_in_8_bits_is_that_of_the_rounded_numbers():
    """Both ways. The adapter's part is about as large as the weights', so that what either loses is seen."""
    draws = Draws()
    weights, adapters = layers(draws, [(1024, 1024), (256, 1024)], (16, 16))
    adapters = jax.tree.map(lambda leaf: 2 * leaf, adapters)
    x, dy = (draws.normal(512, width, dtype=jnp.bfloat16) for width in (1024, 1280))

    def both_ways(x, dy):
        y, vjp = jax.vjp(lambda x: joined8(x, weights, adapters), x)
        return y, *vjp(dy)

    with jax.default_matmul_precision("highest"):
        through = dy @ linear.joined_b(weights, adapters).T.astype(jnp.float32)
        through = through @ linear.joined_a(adapters).T.astype(jnp.float32)
        back = fp8.rounded(dy.astype(jnp.float32), fp8.E5M2) @ whole8(weights) + through
        want = jnp.concatenate(fp8.reference(x, weights, adapters), axis=1), back
    for ours, theirs in zip(poisoned(both_ways)(x, dy), want, strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
def test_what_8_bit_numbers_give_to_an_adapter_in_the_same_product(kind):
    """Forwards through down, backwards through gate and up. The adapter's product is rounded between its two."""
    draws, backwards = Draws(), kind is fp8.E5M2
    weights, _ = layers(draws, [(768, 1024), (256, 1024)], (None, None))
    width = out = 1024
    left = draws.normal(512, width).astype(kind.dtype)
    scale = draws.powers_of_two(512, 1)
    into, after = (0.2 * draws.normal(*shape, dtype=jnp.bfloat16) for shape in ((width, 16), (16, out)))
    exact = left.astype(jnp.float32) * scale
    with jax.default_matmul_precision("highest"):
        inner = exact @ into.astype(jnp.float32)
        w = whole8(weights)
        want = exact @ (w if backwards else w.T) + inner @ after.astype(jnp.float32), inner
    got = poisoned(lambda left, scale: _through(left, scale, weights, backwards, into, after))(left, scale)
    for ours, theirs in zip(got, want, strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("rows, out, width", [(512, 1024, 4096), (300, 64, 704), (8, 14336, 4096)])
def test_8_bit_numbers_are_multiplied_as_they_are(rows, out, width, kind):
    draws = Draws()
    left, right = (
        draws.normal(rows, width).astype(kind.dtype),
        draws.normal(out, width).astype(fp8.E4M3.dtype),
    )
    got = poisoned(lambda left, right: fp8.dot8(left, right, jnp.bfloat16))(left, right)
    want = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    assert relative(got, want) <= BF16


def mlp(draws, width, ffn, ranks):
    return layers(draws, [(ffn, width), (ffn, width), (width, ffn)], ranks)


def three_layers(x, weights, adapters):
    gate, up = jnp.split(linear.reference(x, weights[:2], adapters[:2]), 2, axis=-1)
    return linear.reference(jax.nn.silu(gate) * up, weights[2:], adapters[2:])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("way", ["kept", "made again", "in tiles"])
@pytest.mark.parametrize(
    "ffn", [1536, 512]
)  # backwards the joined matrix of gate and up serves twice, or not
def test_the_mlp(monkeypatch, ffn, way, ranks):
    """Up to three 16-bit products in a row."""
    monkeypatch.setattr(gated_mlp, "TILE", 256 if way == "in tiles" else 8192)
    draws = Draws()
    weights, adapters = mlp(draws, 512, ffn, ranks)
    assert gated_mlp.supported(jax.ShapeDtypeStruct((*TOKENS, 512), jnp.bfloat16), weights, adapters)
    with keeping(frozenset({"gate_up"} if way == "kept" else ())):
        found = errors(gated_mlp.gated_mlp, three_layers, draws, 512, 512, weights, adapters, kernels=5)
    y, dx, rest = found
    assert max(y, dx, *rest) <= 2 * BF16


@pytest.mark.parametrize("ranks", RANKS)
def test_the_mlp_in_8_bits(ranks):
    """As on a CPU: three products in a row, errors add in squares."""
    draws = Draws()
    weights, adapters = mlp(draws, 512, 1536, ranks)
    y, dx, rest = errors(fp8_gated_mlp, three_layers, draws, 512, 512, weights, adapters, kernels=6)
    assert y <= 2 * FP8 and max(dx, *rest) <= 2 * FP8_GRADIENT
