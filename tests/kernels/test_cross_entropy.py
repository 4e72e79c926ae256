"""The chunked loss against the plain one, and what it may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import BF16, GRADIENT
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from jaxtune.kernels import cross_entropy
from jaxtune.kernels.cross_entropy import Options, fused_cross_entropy, token_log_probs, token_scores

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, WIDTH, VOCAB = 100, 16, 501


def inputs(masked: float = 0.4):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)) * 0.5, jnp.float32)
    labels = np.where(rng.random(TOKENS) < masked, -100, rng.integers(0, VOCAB, TOKENS))
    return hidden, head, jnp.asarray(labels, jnp.int32)


def plain_logits(hidden, head, options):
    logits = hidden @ head.T * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits / options.temperature


def reference(hidden, head, labels, options):
    logits = plain_logits(hidden, head, options)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    correct = jnp.sum((jnp.argmax(logits, -1) == labels) & (labels != -100))
    return -jnp.sum(jnp.where(labels == -100, 0, chosen)), correct


def plain_log_probs(hidden, head, labels, options):
    log_p = jax.nn.log_softmax(plain_logits(hidden, head, options))
    chosen = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return tuple(jnp.where(labels == -100, 0, x) for x in (chosen, entropy))


def assert_close(got, want):
    assert np.abs(got - want).max() <= GRADIENT * np.abs(want).max()


@pytest.mark.parametrize("chunk", [1, 32, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("logit_scale", "temperature"), [(1.0, 1.0), (0.25, 0.8)])
def test_equals_the_plain_loss(chunk, softcap, logit_scale, temperature):
    options = Options(chunk, softcap, logit_scale, train_head=True, temperature=temperature)
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


@pytest.mark.parametrize("reduce", ["_one_pass", "_two_passes"])
@pytest.mark.parametrize("entropy", [False, True])
def test_sums_of_extreme_logits(reduce, entropy):
    """Both ways to the sums, on rows that a careless one overflows on, beside float64."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 301)) * np.array([0, 1, 30, 1000, 1, 1])[:, None]
    logits[4] -= 1e4
    logits[5, 7] = 500.0
    logits = logits.astype(np.float32)
    top, total, *moment = getattr(cross_entropy, reduce)(jnp.asarray(logits), entropy)
    below = logits.astype(np.float64) - logits.max(1, keepdims=True)
    np.testing.assert_array_equal(top, logits.max(1))
    np.testing.assert_allclose(total, np.exp(below).sum(1), rtol=1e-5)
    for value in moment:
        np.testing.assert_allclose(value, (np.exp(below) * below).sum(1), rtol=1e-5, atol=1e-30)
    assert len(moment) == entropy


@pytest.mark.parametrize("chunk", [1, 32, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("logit_scale", "temperature"), [(1.0, 1.0), (0.25, 0.8)])
def test_log_probs_equal_the_plain_ones(chunk, softcap, logit_scale, temperature):
    options = Options(chunk, softcap, logit_scale, train_head=True, temperature=temperature)
    hidden, head, labels = inputs()
    upstream = tuple(jnp.asarray(x, jnp.float32) for x in np.random.default_rng(2).normal(size=(2, TOKENS)))

    def probe(function):
        values, vjp = jax.vjp(lambda h, w: function(h, w, labels, options), hidden, head)
        return *values, *vjp(upstream)

    for got, want in zip(probe(token_log_probs), probe(plain_log_probs)):
        assert_close(got, want)
    masked = np.asarray(labels) == -100
    assert not any(np.asarray(x)[masked].any() for x in token_log_probs(hidden, head, labels, options))


def test_log_probs_and_the_loss_agree():
    """The same rows, one upstream gradient for all: the two entry points are one computation."""
    hidden, head, labels = inputs()
    options = Options(32, train_head=True)
    loss, grads = jax.value_and_grad(
        lambda h, w: fused_cross_entropy(h, w, labels, options)[0], argnums=(0, 1)
    )(hidden, head)
    summed, others = jax.value_and_grad(
        lambda h, w: -token_log_probs(h, w, labels, options)[0].sum(), argnums=(0, 1)
    )(hidden, head)
    assert_close(summed, loss)
    jax.tree.map(assert_close, others, grads)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_are_trls(temperature):
    hidden, head, labels = inputs(masked=0)
    logits = torch.tensor(np.asarray(hidden @ head.T)) / temperature
    got, entropy = token_log_probs(hidden, head, labels, Options(32, temperature=temperature))
    want = selective_log_softmax(logits[None], torch.tensor(np.asarray(labels), dtype=torch.int64)[None])[0]
    assert_close(got, want.numpy())
    assert_close(entropy, entropy_from_logits(logits[None])[0].numpy())
    assert_close(got, torch.log_softmax(logits, -1)[torch.arange(TOKENS), labels.tolist()].numpy())


@pytest.mark.parametrize("chunk", [32, 1000])
def test_whatever_a_row_without_label_holds(chunk):
    """Also where it shares a chunk with rows that count."""
    hidden, head, labels = inputs()
    masked = np.asarray(labels) == -100
    poisoned = jnp.where(masked[:, None], jnp.nan, hidden)
    options = Options(chunk, train_head=True)

    def probe(hidden):
        (values, vjp) = jax.vjp(lambda h, w: token_log_probs(h, w, labels, options), hidden, head)
        loss, loss_vjp = jax.vjp(lambda h, w: fused_cross_entropy(h, w, labels, options)[0], hidden, head)
        ones = jnp.where(masked, jnp.nan, 1.0)
        return values, vjp((ones, ones)), loss, loss_vjp(jnp.float32(1))

    got, want = probe(poisoned), probe(hidden.at[masked].set(0))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bfloat16_inputs():
    hidden, head, labels = inputs()
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    options = Options(32, train_head=True)
    upstream = jnp.asarray(np.random.default_rng(3).normal(size=TOKENS), jnp.float32)

    def probe(function, *arrays):
        (values, vjp) = jax.vjp(lambda h, w: function(h, w, labels, options), *arrays)
        return *values, *vjp((upstream, jnp.zeros(TOKENS)))

    exact = probe(plain_log_probs, hidden.astype(jnp.float32), head.astype(jnp.float32))
    for got, want, dtype in zip(probe(token_log_probs, hidden, head), exact, ["f4", "f4", jnp.bfloat16] * 2):
        assert got.dtype == dtype or want.ndim == 2
        assert np.linalg.norm(got.astype(jnp.float32) - want) <= BF16 * np.linalg.norm(want)


def test_a_frozen_head_gets_no_gradient_from_log_probs():
    hidden, head, labels = inputs()
    grad = jax.grad(lambda w: token_log_probs(hidden, w, labels, Options(32))[0].sum())(head)
    assert not grad.any()


def test_full_logits_of_log_probs_never_exist():
    tokens, vocab = 4096, 8192
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, WIDTH), (vocab, WIDTH))]
    grad = jax.jit(jax.grad(lambda h, w, y: jnp.sum(token_log_probs(h, w, y, Options(64))[0] ** 2)))
    compiled = grad.lower(*shapes, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * tokens * vocab * 4


def test_a_tie_for_the_first_rank_counts():
    hidden, head, _ = inputs()
    head = head.at[7].set(head[3])
    best = jnp.argmax(hidden @ head.T, -1)
    twins = jnp.where(best == 3, 7, best)
    assert (best == 3).any()
    assert fused_cross_entropy(hidden, head, twins, Options(32))[1] == TOKENS


@pytest.mark.parametrize(
    ("temperature", "softcap", "logit_scale"), [(1.0, None, 1.0), (1.0, 3.0, 0.5), (0.7, 3.0, 1.0)]
)
def test_scores_beside_the_log_probs_are_trls(temperature, softcap, logit_scale):
    hidden, head, labels = inputs()
    masked = np.asarray(labels) == -100
    labels = jnp.where(masked | (jnp.arange(TOKENS) % 2 == 0), labels, jnp.argmax(hidden @ head.T, -1))
    want = ChunkedLogProbFunction.apply(
        *(torch.tensor(np.asarray(x)) for x in (hidden, head)),
        None,
        torch.tensor(np.where(masked, 0, labels)).long(),
        temperature,
        64,
        softcap,
        logit_scale,
    )
    options = Options(32, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    got = token_scores(hidden, head, labels, options)
    by_name = dict(zip(("log_probs", "entropies", "log_sum_sq_probs", "mean_logits", "correct"), want))
    for name, value in by_name.items():
        assert_close(getattr(got, name), np.where(masked, 0, value.float().numpy()))
    assert 0 < got.correct.sum() < TOKENS


def test_scores_that_nobody_asks_for_are_not_computed():
    hidden, head, labels = inputs()
    text = [
        jax.jit(lambda h, f=f: f(h, head, labels, Options(32))).lower(hidden).compile().as_text()
        for f in (lambda *a: token_scores(*a).log_probs, token_scores)
    ]
    assert text[0].count(f"f32[{TOKENS}]") < text[1].count(f"f32[{TOKENS}]")
    assert text[0].count("exponential") < text[1].count("exponential")
