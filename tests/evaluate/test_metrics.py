"""pass@k, maj@k and their intervals against brute force and values computed by hand."""

import doctest
import itertools
import math

import pytest

from jaxtune.evaluate import checkers, metrics
from jaxtune.evaluate.config import EvaluateConfig


def test_examples():
    assert doctest.testmod(metrics) == (0, 4)
    assert doctest.testmod(checkers) == (0, 2)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * right + [False] * (n - right)
        subsets = list(itertools.combinations(answers, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert metrics.pass_at_k(n, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_with_many_answers():
    # the product that the paper gives as the stable form: 1 - prod(1 - k / (n - c + 1 … n))
    n, c, k = 200, 3, 100
    expected = 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n, right, k", [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1)])
def test_pass_at_k_of_nonsense(n, right, k):
    with pytest.raises(ValueError, match=f"n={n}, right={right}, k={k}"):
        metrics.pass_at_k(n, right, k)


@pytest.mark.parametrize(
    "votes, right, expected",
    [
        ([0, 1, 1], {1}, 1.0),
        ([0, 1, 1], {0}, 0.0),
        ([0, 1, None], {1}, 0.5),  # a tie: half of those drawn are right
        ([0, 1, 2], {1}, 1 / 3),
        ([None, None, 0], {0}, 1.0),  # who says nothing has no vote
        ([None, None], {0}, 0.0),
        ([0, 0, 1, 2], set(), 0.0),
    ],
)
def test_majority(votes, right, expected):
    assert metrics.majority(votes, right) == pytest.approx(expected)


def test_majority_at_k_takes_blocks():
    votes = [0, 0, 1, 1, 1, 1, 0]  # blocks of 3: 0 wins, 1 wins; the last vote fills no block
    assert metrics.majority_at_k(votes, {0}, 3) == 0.5
    assert metrics.majority_at_k(votes, {0}, 1) == pytest.approx(3 / 7)  # the accuracy
    assert metrics.majority_at_k(votes, {0}, 7) == 0.0


def test_a_standard_error_is_that_of_a_mean_over_questions():
    values = [1.0, 0.0, 0.5, 0.25]
    mean = 0.4375
    variance = sum((v - mean) ** 2 for v in values) / 3
    found = metrics.estimate(values, answers=4)
    assert found.value == mean and found.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert found.low < mean < found.high


@pytest.mark.parametrize("right, count", [(0, 10), (10, 10), (7, 10), (532, 1319)])
def test_the_interval_of_zeros_and_ones_is_wilsons(right, count):
    """The roots of (p - x)² = z² x (1 - x) / n, which define it."""
    found = metrics.estimate([1.0] * right + [0.0] * (count - right))
    for end in (found.low, found.high):
        gap = (right / count - end) ** 2
        assert gap == pytest.approx(metrics.Z95**2 * end * (1 - end) / count, abs=1e-12)
    assert 0 <= found.low <= right / count <= found.high <= 1 and found.low < found.high


def test_intervals_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    for right, count in [(0, 5), (3, 5), (40, 100)]:
        theirs = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        ours = metrics.wilson(right / count, count)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_many_answers_narrow_the_interval_only_where_questions_agree():
    mixed = [0.5, 0.5, 0.5, 0.5]  # every question as hard: 32 answers count as 32
    split = [1.0, 1.0, 0.0, 0.0]  # two are always right: four questions are what is known
    assert metrics.estimate(mixed, 8)[2:4] == pytest.approx(metrics.wilson(0.5, 32))
    assert metrics.estimate(split, 8)[2:4] == pytest.approx(metrics.wilson(0.5, 4))


def test_one_question_and_none():
    assert math.isnan(metrics.estimate([1.0]).standard_error)
    with pytest.raises(ValueError, match="no value"):
        metrics.estimate([])


def test_which_k():
    assert EvaluateConfig().ks == []
    assert EvaluateConfig(n=12, temperature=1.0).ks == [2, 4, 8, 12]
    assert EvaluateConfig(n=8, temperature=1.0).ks == [2, 4, 8]
    assert EvaluateConfig(n=8, temperature=1.0, k=(5, 1)).ks == [1, 5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 4}, "n=4 answers at temperature 0 would all be the same"),
        ({"n": 2, "temperature": 1.0, "k": (3,)}, "k=3 must be from 1 to n=2"),
        ({"n": 0}, "n must be at least 1"),
        ({"checker": "best"}, "checker='best' is not supported; expected one of 'auto'"),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**arguments)
