"""On an NVIDIA GPU (`pytest -m gpu`): the loss and the log-probabilities beside float32 references."""

import jax
import jax.numpy as jnp
import pytest
from gpu_checks import Draws, poisoned, relative
from tolerances import BF16

from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy, token_log_probs

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 300, 256


def inputs(draws: Draws, vocabulary: int):
    hidden, head = (draws.normal(n, WIDTH) for n in (ROWS, vocabulary))
    labels = jax.random.randint(draws.next_key(), (ROWS,), 0, vocabulary)
    labels = jnp.where(jax.random.uniform(draws.next_key(), (ROWS,)) < 0.3, -100, labels)
    return hidden.astype(jnp.bfloat16), (0.1 * head).astype(jnp.bfloat16), labels


def exact(hidden, head, labels):
    """(log-probabilities, entropies) [N] in float32."""
    log_p = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
    return tuple(jnp.where(labels == -100, 0, x) for x in (chosen, entropy))


def test_the_loss():
    """Rows without label hold no number; a chunk of 128 makes the last one part empty."""
    hidden, head, labels = inputs(Draws(), 128256)
    options = Options(chunk=128)
    with jax.default_matmul_precision("highest"):
        want, want_grad = jax.value_and_grad(lambda h: -exact(h, head, labels)[0].sum())(hidden)
    given = jnp.where((labels == -100)[:, None], jnp.nan, hidden)
    loss = jax.value_and_grad(lambda h: fused_cross_entropy(h, head, labels, options), has_aux=True)
    (got, _), grad = poisoned(loss)(given)
    assert relative(got, want) <= BF16 and relative(grad, want_grad) <= BF16


def test_log_probabilities():
    draws = Draws()
    hidden, head, labels = inputs(draws, 49152)
    upstream = tuple(draws.normal(2, ROWS))
    options = Options(chunk=128)
    with jax.default_matmul_precision("highest"):
        want, vjp = jax.vjp(lambda h: exact(h, head, labels), hidden)
        want_grad = vjp(upstream)[0]

    def both_ways(hidden):
        found, vjp = jax.vjp(lambda h: token_log_probs(h, head, labels, options), hidden)
        return *found, vjp(upstream)[0]

    for ours, theirs in zip(poisoned(both_ways)(hidden), (*want, want_grad), strict=True):
        assert relative(ours, theirs) <= BF16
