"""The chunked loss against the plain one, and what it may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENT

from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy

TOKENS, WIDTH, VOCAB = 100, 16, 501


def inputs(masked: float = 0.4):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)) * 0.5, jnp.float32)
    labels = np.where(rng.random(TOKENS) < masked, -100, rng.integers(0, VOCAB, TOKENS))
    return hidden, head, jnp.asarray(labels, jnp.int32)


def reference(hidden, head, labels, options):
    logits = hidden @ head.T * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    correct = jnp.sum((jnp.argmax(logits, -1) == labels) & (labels != -100))
    return -jnp.sum(jnp.where(labels == -100, 0, chosen)), correct


def assert_close(got, want):
    assert np.abs(got - want).max() <= GRADIENT * np.abs(want).max()


@pytest.mark.parametrize("chunk", [1, 32, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
def test_equals_the_plain_loss(chunk, softcap, logit_scale):
    options = Options(chunk, softcap, logit_scale, train_head=True)
    data = inputs()

    def loss(function):
        return jax.value_and_grad(lambda h, w: 3 * function(h, w, data[2], options)[0], argnums=(0, 1))(
            *data[:2]
        )

    (got, (d_hidden, d_head)), (want, (want_hidden, want_head)) = loss(fused_cross_entropy), loss(reference)
    assert_close(got, want)
    assert_close(d_hidden, want_hidden)
    assert_close(d_head, want_head)
    assert fused_cross_entropy(*data, options)[1] == reference(*data, options)[1]


def test_all_rows_masked_is_zero():
    hidden, head, _ = inputs()
    labels = jnp.full(TOKENS, -100)
    loss, grad = jax.value_and_grad(lambda h: fused_cross_entropy(h, head, labels, Options(32))[0])(hidden)
    assert loss == 0 and not grad.any()


def test_masked_rows_are_not_visited():
    """A masked row may hold anything; the loop runs ceil(valid / chunk) times."""
    hidden, head, labels = inputs(masked=0.9)
    poisoned = jnp.where((labels == -100)[:, None], jnp.nan, hidden)
    options = Options(int((labels != -100).sum()))  # one chunk, filled to the last row
    loss, grad = jax.value_and_grad(lambda h: fused_cross_entropy(h, head, labels, options)[0])(poisoned)
    assert np.isfinite(loss) and np.isfinite(grad).all()


def test_frozen_head_gets_no_gradient():
    hidden, head, labels = inputs()
    grad = jax.grad(lambda w: fused_cross_entropy(hidden, w, labels, Options(32))[0])(head)
    assert not grad.any()


def test_full_logits_never_exist():
    tokens, vocab, chunk = 4096, 8192, 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, WIDTH), (vocab, WIDTH))]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    grad = jax.jit(jax.grad(lambda h, w, y: fused_cross_entropy(h, w, y, Options(chunk))[0]))
    used = grad.lower(*shapes, labels).compile().memory_analysis().temp_size_in_bytes
    assert used < 0.1 * tokens * vocab * 4
