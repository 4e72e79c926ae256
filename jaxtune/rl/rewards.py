"""Reward functions, with the names, arguments and results of TRL's.

One is called with keyword arguments — prompts, completions, completion_ids and the data set's columns — and gives one
number a completion, or None where it does not apply. A completion is a list of messages ({"role", "content"}), of
which the first counts. The classes behind get_* can be pickled; their __name__ is the metric's.
"""

import importlib.util
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

Completion = Sequence[dict[str, Any]]
Rewards = list[float | None]
LogExtra = Callable[[str, list], None]

PARSE_SECONDS = 10
VERIFY_SECONDS = 5
UNPARSEABLE = "[unparseable]"
# One <think> at the start, closed, and no second one after it.
_THINK = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)


def think_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where a completion starts with one <think>…</think>, else 0.

    >>> think_format_reward([[{"content": "<think>why</think> so"}], [{"content": "so"}]])
    [1.0, 0.0]
    """
    return [float(_THINK.match(completion[0]["content"]) is not None) for completion in completions]


def accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], log_extra: LogExtra | None = None, **_: Any
) -> Rewards:
    r"""1 where the LaTeX answer in a completion equals the solution mathematically, else 0.

    Args:
      completions: an answer is what stands in \boxed{…}, or else another LaTeX expression that is said to be it.
      solution: texts with the right answer. One without anything mathematical gives None.
      log_extra: receives the columns solution, gold_parsed, answer_parsed.

    Raises:
      ImportError: math-verify is not installed.
    """
    return _judge([completion[0]["content"] for completion in completions], solution, log_extra)


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    **_: Any,
) -> Rewards:
    """accuracy_reward of what follows the reasoning; 0 where the reasoning does not end.

    reasoning_delimiters: what ends it, the first of them that occurs, at its last place; None: "</think>".
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    contents = []
    for completion in completions:
        content = completion[0]["content"]
        found = next((d for d in delimiters if d in content), None)
        contents.append(None if found is None else content.rsplit(found, 1)[-1])
    return _judge(contents, solution, log_extra)


def _judge(contents: Sequence[str | None], solution: Sequence[str], log_extra: LogExtra | None) -> Rewards:
    """Of each content 1 or 0; 0 for None, an unfinished one; None where the solution says nothing."""
    columns: dict[str, list] = {"solution": list(solution), "gold_parsed": [], "answer_parsed": []}
    rewards: Rewards = []
    check = _checker()
    for content, right in zip(contents, solution, strict=True):
        if content is None:
            reward, *parsed = 0.0, "[incomplete reasoning]", "[incomplete reasoning]"
        else:
            reward, *parsed = check(content, right)
        rewards.append(reward)
        columns["gold_parsed"].append(parsed[0])
        columns["answer_parsed"].append(parsed[1])
    if log_extra is not None:
        for name, values in columns.items():
            log_extra(name, values)
    return rewards


class MathVerify(NamedTuple):
    r"""math-verify.

    parse: (text, what to look for or None for anything) -> what the text says; [] for nothing. verify: (right, found),
    both parsed -> whether they are equal. latex: looks for LaTeX, \boxed first; with True for nothing else than that
    or what is said to be the answer.
    """

    parse: Callable[[str, Sequence[Any] | None], list]
    verify: Callable[[list, list], bool]
    latex: Callable[[bool], Any]


def load_math_verify() -> MathVerify:
    """math-verify for this thread.

    Raises:
      ImportError: it is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("mathematical answers are compared with math-verify: pip install math-verify")
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # Its time limits are alarm signals, which only the main thread may set; elsewhere there are none.
    main = threading.current_thread() is threading.main_thread()
    parse_seconds, verify_seconds = (PARSE_SECONDS, VERIFY_SECONDS) if main else (None, None)
    if not main:
        for name in ("parser", "grader"):  # they would warn of that with every answer
            logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)

    def parse(text, targets):
        wanted = {} if targets is None else {"extraction_config": targets, "extraction_mode": "first_match"}
        return math_verify.parse(text, parsing_timeout=parse_seconds, **wanted)

    def latex(anchored):
        return math_verify.LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=True),
            boxed_match_priority=0,
            try_extract_without_anchor=not anchored,
        )

    return MathVerify(parse, partial(math_verify.verify, timeout_seconds=verify_seconds), latex)


def _checker() -> Callable[[str, str], tuple[float | None, str, str]]:
    """check(content, solution) -> (reward, the parsed solution, the parsed answer)."""
    library = load_math_verify()

    def check(content, solution):
        gold = library.parse(solution, None)
        if not gold:
            return None, UNPARSEABLE, "[skipped]"
        found = library.parse(content, [library.latex(True)])
        right = library.verify(gold, found)
        return float(right), str(gold), str(found) if found else UNPARSEABLE

    return check


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> "CosineScaledReward":
    """accuracy_reward scaled by length along half a cosine (arXiv 2502.03373, appendix C.1).

    A right answer earns max_value_correct with no tokens, down to min_value_correct with max_len or more; a wrong one
    min_value_wrong with none, up to max_value_wrong: who is wrong had better gone on.
    """
    return CosineScaledReward(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)


@dataclass(frozen=True)
class CosineScaledReward:
    """See get_cosine_scaled_reward."""

    max_len: int
    min_value_wrong: float
    max_value_wrong: float
    min_value_correct: float
    max_value_correct: float
    __name__: ClassVar[str] = "cosine_scaled_reward"

    def __call__(
        self,
        completions: Sequence[Completion],
        solution: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> Rewards:
        rewards: Rewards = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            short, long = (
                (self.max_value_correct, self.min_value_correct)
                if right
                else (self.min_value_wrong, self.max_value_wrong)
            )
            cosine = math.cos(math.pi * min(len(ids) / self.max_len, 1))
            rewards.append(None if right is None else long + 0.5 * (short - long) * (1 + cosine))
        return rewards


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> "RepetitionPenalty":
    """max_penalty times the share of a completion's token n-grams that repeat another (arXiv 2502.03373, C.2).

    >>> get_repetition_penalty_reward(ngram_size=2)([[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty is a penalty: 0 or below, got {max_penalty}")
    return RepetitionPenalty(ngram_size, max_penalty)


@dataclass(frozen=True)
class RepetitionPenalty:
    """See get_repetition_penalty_reward."""

    ngram_size: int
    max_penalty: float
    __name__: ClassVar[str] = "repetition_penalty_reward"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(ids) for ids in completion_ids]

    def _of(self, ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[i : i + self.ngram_size]) for i in range(len(ids) - self.ngram_size + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0
        return repeated * self.max_penalty if repeated else 0.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> "SoftOverlongPunishment":
    """0 up to soft_punish_cache tokens before max_completion_len, falling to -1 there and beyond (DAPO, eq. 13).

    >>> get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)([[1] * 90])
    [-0.5]
    """
    return SoftOverlongPunishment(max_completion_len, soft_punish_cache)


@dataclass(frozen=True)
class SoftOverlongPunishment:
    """See get_soft_overlong_punishment."""

    max_completion_len: int
    soft_punish_cache: int
    __name__: ClassVar[str] = "soft_overlong_punishment_reward"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(len(ids)) for ids in completion_ids]

    def _of(self, length: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if length <= free:
            return 0.0
        return (free - length) / self.soft_punish_cache if length <= self.max_completion_len else -1.0
