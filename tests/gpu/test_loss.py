"""On an NVIDIA GPU (`pytest -m gpu`): the loss and the log-probabilities beside float32 references."""

import jax
import jax.numpy as jnp
import pytest
from gpu_checks import Draws, poisoned, relative
from tolerances import BF16, BF16_LOSS_SUM

from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy, token_log_probs

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 300, 256
CASES = [
    (128256, Options(chunk=128)),  # the last chunk is partly empty
    (49152, Options()),
    (49152, Options(chunk=128, train_head=True)),
    (32768, Options(chunk=64, softcap=30.0, logit_scale=0.5, temperature=0.7, train_head=True)),
]


def inputs(draws: Draws, vocabulary: int):
    """bfloat16 hidden and head, labels; every second row's label is ranked first, by far."""
    head = (0.1 * draws.normal(vocabulary, WIDTH)).astype(jnp.bfloat16)
    labels = jax.random.randint(draws.next_key(), (ROWS,), 0, vocabulary)
    known = (jnp.arange(ROWS) % 2 == 0)[:, None]
    hidden = jnp.where(known, 10 * head[labels], draws.normal(ROWS, WIDTH, dtype=jnp.bfloat16))
    return hidden, head, jnp.where(jax.random.uniform(draws.next_key(), (ROWS,)) < 0.3, -100, labels)


def exact(hidden, head, labels, options):
    """(log-probabilities, entropies, 1 where the label is ranked first) [N] of float32 arrays."""
    logits = options.logit_scale * (hidden @ head.T)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    log_p = jax.nn.log_softmax(logits / options.temperature)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
    return tuple(jnp.where(labels == -100, 0, x) for x in (chosen, entropy, chosen >= log_p.max(1)))


def check(function, of_exact, hidden, head, labels, options, upstream):
    """Values to their sums' exactness, gradients (of the head where it is trained) to bfloat16's."""

    def both_ways(f):
        def run(hidden, head):
            wanted = (hidden, head)[: 1 + options.train_head]
            values, vjp = jax.vjp(lambda *given: f(*(*given, head)[:2]), *wanted)
            return values, vjp(upstream)

        return run

    with jax.default_matmul_precision("highest"):
        want, want_grads = both_ways(of_exact)(*(x.astype(jnp.float32) for x in (hidden, head)))
    given = jnp.where((labels == -100)[:, None], jnp.nan, hidden)
    got, grads = poisoned(both_ways(function))(given, head)
    for ours, theirs in zip(got, want, strict=True):
        assert relative(ours, theirs) <= BF16_LOSS_SUM
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert relative(ours, theirs) <= BF16


@pytest.mark.parametrize("vocabulary, options", CASES)
def test_the_loss(vocabulary, options):
    """And how many labels are ranked first. Rows without label hold no number."""
    hidden, head, labels = inputs(Draws(), vocabulary)

    def of_exact(hidden, head):
        log_probs, _, first = exact(hidden, head, labels, options)
        return -log_probs.sum(), first.sum(dtype=jnp.float32)

    loss = lambda h, w: fused_cross_entropy(h, w, labels, options)  # noqa: E731
    check(loss, of_exact, hidden, head, labels, options, (jnp.float32(1), jnp.float32(0)))


@pytest.mark.parametrize("vocabulary, options", CASES)
def test_log_probabilities(vocabulary, options):
    draws = Draws()
    hidden, head, labels = inputs(draws, vocabulary)
    scores = lambda h, w: token_log_probs(h, w, labels, options)  # noqa: E731
    of_exact = lambda h, w: exact(h, w, labels, options)[:2]  # noqa: E731
    check(scores, of_exact, hidden, head, labels, options, tuple(draws.normal(2, ROWS)))
