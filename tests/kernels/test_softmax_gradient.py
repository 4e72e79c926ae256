"""The softmax kernel on the CPU: in Pallas' interpreter at tiny shapes, and lowered for CUDA at the shipped ones."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import BF16, GRADIENT

from jaxtune.kernels import softmax_gradient as kernel
from jaxtune.kernels import target
from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy
from jaxtune.kernels.softmax_gradient import LANES, Plan

HOPPER = (9, 0)
VOCABULARIES = [32000, 49152, 128256, 151936, 256000, 262144]

# Rounds fewer than, as many as and more than the slots; an odd number of them; with and without a tail.
PLANS = [Plan(1, 1, 3, 0, 2), Plan(2, 2, 2, 1, 2), Plan(2, 1, 5, 3, 2), Plan(4, 1, 2, 0, 1)]

# The interpreter runs each warpgroup as a program that blocks a thread of XLA's pool until the others have come as
# far: with as many threads as cores, the default, it hangs.
interpreted = pytest.mark.skipif("NPROC" not in os.environ, reason="run by test_in_the_interpreter")


@pytest.mark.slow
def test_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "not interpreter",
    ]
    done = subprocess.run(
        command, env={**os.environ, "NPROC": "32"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:]


def inputs(rows: int, vocabulary: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, vocabulary)) * 4
    logits[0] = 0  # all alike
    logits[1, 5] = 90
    weights = rng.random(rows)
    weights[2] = 0
    return jnp.asarray(logits, dtype), jnp.asarray(weights, jnp.float32)


def assert_equals_the_reference(logits, weights, scale, **options):
    got = kernel.softmax_gradient(logits, weights, scale, **options)
    want = kernel.reference(logits, weights, scale)
    for ours, theirs in zip(got, want, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=2**-7 if ours.ndim == 2 else GRADIENT, atol=1e-30)
    np.testing.assert_array_equal(got[0], want[0])
    assert not np.asarray(got[2], np.float32)[2].any()


@interpreted
@pytest.mark.parametrize("plan, dtype", [*((plan, jnp.float32) for plan in PLANS), (PLANS[1], jnp.bfloat16)])
def test_equals_the_reference(plan, dtype):
    """Five rows for two blocks: one takes a row more than the other."""
    vocabulary = LANES * (plan.warpgroups * plan.tile * plan.rounds + plan.tail)
    poisoned = plgpu.InterpretGPUParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    assert_equals_the_reference(*inputs(5, vocabulary, dtype), 0.7, plan=plan, blocks=2, interpret=poisoned)


@interpreted
def test_no_races(capfd):
    plan = Plan(2, 1, 3, 1, 2)
    watched = plgpu.InterpretGPUParams(detect_races=True)
    assert_equals_the_reference(*inputs(5, 7 * LANES), 1.0, plan=plan, blocks=2, interpret=watched)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plans_cover_every_logit(vocabulary, dtype):
    plan = kernel.plan_for(vocabulary, dtype)
    assert LANES * (plan.warpgroups * plan.tile * plan.rounds + plan.tail) == vocabulary
    assert plan.slots <= plan.rounds and plan.warpgroups * plan.slots <= kernel.BARRIERS
    assert plan.tail <= plan.tile  # of one warpgroup: at most one tile more than the others have


@pytest.mark.parametrize("vocabulary, dtype", [(50257, "f4"), (32064, "f4"), (1280, "f4"), (128256, "f2")])
def test_what_is_not_supported(vocabulary, dtype):
    logits = jax.ShapeDtypeStruct((8, vocabulary), jnp.dtype(dtype))
    assert not kernel.supported(logits)
    with pytest.raises(ValueError, match="supported"):
        jax.eval_shape(kernel.softmax_gradient, logits, jax.ShapeDtypeStruct((8,), jnp.float32))


@interpreted
@pytest.mark.parametrize("logits_dtype", [jnp.float32, jnp.bfloat16])
def test_inside_the_loss(logits_dtype):
    """The dispatch and the label's own gradient, beside the plain path (which XLA may spare the rounding)."""
    rng = np.random.default_rng(1)
    vocabulary, width = 65 * LANES, 16
    hidden, head = (jnp.asarray(rng.normal(size=(n, width)), jnp.bfloat16) for n in (7, vocabulary))
    labels = jnp.asarray([3, -100, vocabulary - 1, 100, -100, 0, 9])
    labels = labels.at[3].set(jnp.argmax(hidden[3] @ head.T))

    def probe(impl):
        options = Options(chunk=4, logit_scale=0.5, logits_dtype=logits_dtype, impl=impl)
        loss = lambda h: fused_cross_entropy(h, head, labels, options)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(hidden)

    (want, want_correct), want_grad = probe("xla")
    with target.tracing_for(HOPPER), plgpu.force_gpu_interpret_mode():
        (got, correct), grad = probe("mosaic_gpu")
    tolerance = GRADIENT if logits_dtype == jnp.float32 else BF16
    assert abs(got - want) <= tolerance * want and correct == want_correct >= 1
    difference, size = (np.linalg.norm(np.asarray(x, np.float32)) for x in (grad - want_grad, want_grad))
    assert difference <= BF16 * size


@pytest.mark.parametrize("chunk", [1024, 2048])
@pytest.mark.parametrize("vocabulary", [49152, 128256, 151936])
@pytest.mark.parametrize("logits_dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(vocabulary, chunk, logits_dtype):
    """Layouts and shared memory of the shipped configurations, without the device."""
    shapes = [jax.ShapeDtypeStruct((n, 64), jnp.bfloat16) for n in (4096, vocabulary)]
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    options = Options(chunk=chunk, logits_dtype=logits_dtype, impl="mosaic_gpu")

    def loss(hidden, head, labels):
        return fused_cross_entropy(hidden, head, labels, options)

    with target.tracing_for(HOPPER):
        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(*shapes, labels)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
