"""Accuracy, pass@k and maj@k with standard errors, from each question's answers.

Questions are the sample: a standard error is that of a mean over questions, whose answers need not be independent.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

Z95 = 1.959963984540054  # a normal variable is within ± this with probability 0.95


class Estimate(NamedTuple):
    """A mean over questions.

    value: 0 to 1. standard_error: of value. low, high: 95% confidence interval. questions: how many.
    """

    value: float
    standard_error: float
    low: float
    high: float
    questions: int


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that of k answers, drawn from n without putting back, one at least is right (arXiv 2107.03374).

    >>> pass_at_k(n=4, right=1, k=2)
    0.5
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"needs 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}")
    return 1.0 - math.prod((n - right - i) / (n - i) for i in range(k))


def majority(votes: Sequence[Hashable | None], right: Collection[Hashable]) -> float:
    """Whether the most frequent answer is right; of several equally frequent ones, the share that is.

    votes: of each answer what it says, None (no vote) where it says nothing. right: what is right.

    >>> majority(["18", "17", "18", None], right={"18"}), majority(["18", "17"], right={"18"})
    (1.0, 0.5)
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [vote for vote, count in counts.items() if count == most]
    return sum(vote in right for vote in leaders) / len(leaders)


def majority_at_k(votes: Sequence[Hashable | None], right: Collection[Hashable], k: int) -> float:
    """The mean of `majority` over the blocks of k answers, one after the other; those that fill no block are left."""
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]
    return sum(majority(block, right) for block in blocks) / len(blocks)


def estimate(values: Sequence[float], answers: int = 1) -> Estimate:
    """The mean of one value (0 to 1) a question.

    The interval is Wilson's. For zeros and ones it counts the questions; values between them vary less, and count
    like as many zeros and ones as would give their variance, up to every answer.

    Args:
      values: one for each question. answers: to each question.

    >>> one = estimate([1, 1, 1, 0])
    >>> round(one.value, 3), round(one.standard_error, 3), round(one.low, 3), round(one.high, 3)
    (0.75, 0.25, 0.301, 0.954)
    """
    count = len(values)
    if not count:
        raise ValueError("there is no value to take the mean of")
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
    trials = float(count)
    if 0 < mean < 1:
        most = float(count * answers)
        trials = min(most, count * mean * (1 - mean) / (squares / count)) if squares else most
    return Estimate(mean, error, *wilson(mean, trials), count)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """95% interval of a share that was seen in so many trials (Wilson 1927), which need not be a whole number."""
    shrink = 1 + Z95**2 / trials
    centre = (share + Z95**2 / (2 * trials)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, min(share, centre - half)), min(
        1.0, max(share, centre + half)
    )  # rounding leaves the share inside
