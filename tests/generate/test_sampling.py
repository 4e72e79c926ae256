"""Sampling against transformers' logits processors, a sort-based filter, and the distribution it must draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxtune.generate import Sampling
from jaxtune.generate.sampling import choose, filter_logits, penalise, row_keys

pytestmark = pytest.mark.usefixtures("quick_compilation")

FILTERS = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_k of 1": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "tiny top_p": ({"top_p": 1e-4}, [TopPLogitsWarper(1e-4)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


def random_logits(rows: int = 6, vocab: int = 200) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 3


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_transformers(name):
    options, judges = FILTERS[name]
    want = torch.tensor(random_logits())
    for judge in judges:
        want = judge(None, want)
    got = filter_logits(jnp.asarray(random_logits()), Sampling(do_sample=True, **options))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def by_sorting(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """What is kept of each row, ties of the last one included, in float64."""
    kept = np.ones(logits.shape, bool)
    if top_k:
        kept &= logits >= -np.sort(-logits, -1)[:, top_k - 1 : top_k]
    if top_p < 1:
        p = np.where(kept, np.exp(logits.astype(np.float64)), 0)
        p /= p.sum(-1, keepdims=True)
        for row, mine, probability in zip(logits, kept, p, strict=True):
            order = np.argsort(-row, kind="stable")
            before = np.cumsum(probability[order]) - probability[order]
            mine &= row >= row[order][before < top_p].min()
    return kept


@pytest.mark.parametrize("options", [{"top_k": 9}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.9}])
def test_ties_of_the_last_kept_token_are_kept(options):
    logits = np.round(random_logits(16) / 2)  # about 12 values for 200 tokens
    logits[0], logits[1], logits[1, ::2] = 0, 0.0, -0.0
    got = np.isfinite(filter_logits(jnp.asarray(logits), Sampling(do_sample=True, **options)))
    np.testing.assert_array_equal(got, by_sorting(logits, **options))
    assert got[0].all() and got[1].all() and (got.sum(-1) > 9).any()


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = random_logits(), np.random.default_rng(1).integers(0, 200, (6, 30))
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids), torch.tensor(logits))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, 1)
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(seen), 1.3), want.numpy(), rtol=1e-6)


DRAWN = 20000
SMALL = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], np.float32))
DISTRIBUTIONS = {
    "plain": ({}, [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]),
    "temperature": ({"temperature": 2.0}, np.sqrt([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])),
    "top_k": ({"top_k": 3}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "top_p": ({"top_p": 0.7}, [0.4, 0.25, 0.15, 0, 0, 0]),
    "min_p": ({"min_p": 0.2}, [0.4, 0.25, 0.15, 0.1, 0, 0]),
}


def draw(sampling: Sampling, seed: int = 0):
    streams = jnp.stack([jnp.arange(DRAWN) // 100, jnp.arange(DRAWN) % 100], 1)
    return choose(
        jnp.tile(SMALL, (DRAWN, 1)), None, row_keys(jax.random.key(seed), streams), jnp.int32(3), sampling
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_follow_the_distribution(name):
    options, want = DISTRIBUTIONS[name]
    want = np.array(want) / np.sum(want)
    got = draw(Sampling(do_sample=True, **options))
    counts = np.bincount(got.token, minlength=6)
    assert not counts[want == 0].any()
    assert chisquare(counts[want > 0], DRAWN * want[want > 0]).pvalue > 1e-3
    kept = got.logprob if got.kept_logprob is None else got.kept_logprob
    np.testing.assert_allclose(np.exp(kept), want[got.token], rtol=1e-5)
    whole = np.exp(SMALL / options.get("temperature", 1))
    np.testing.assert_allclose(np.exp(got.logprob), (whole / whole.sum())[got.token], rtol=1e-5)


def test_noise_is_the_rows_own():
    sampling = Sampling(do_sample=True)
    keys = row_keys(jax.random.key(0), jnp.array([[0, 0], [0, 1], [1, 0], [0, 1]]))
    logits = jnp.zeros((4, 1000))
    together = choose(logits, None, keys, jnp.int32(1), sampling).token
    assert together[1] == together[3] and len(set(together.tolist())) == 3
    alone = choose(logits[:1], None, keys[1:2], jnp.int32(1), sampling).token
    assert alone[0] == together[1]
    assert choose(logits[:1], None, keys[1:2], jnp.int32(2), sampling).token[0] != alone[0]


def test_bad_values_raise():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampling(do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(ValueError, match=r"top_k must be 0 \(off\) or more"):
        Sampling(top_k=-1)
