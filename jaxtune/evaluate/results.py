"""What an evaluation found: every answer with its verdict, and the metrics of all."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtune.evaluate.checkers import Checker
from jaxtune.evaluate.metrics import Estimate, estimate, majority_at_k, pass_at_k
from jaxtune.evaluate.questions import Message, Question
from jaxtune.rl.experience import Sample


class Completion(NamedTuple):
    """One answer as it was generated.

    question: number of its row. sample: which of the n. text: without special tokens. tokens: how many.
    """

    question: int
    sample: int
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Judged:
    """The answers to one question.

    prompt: what was asked. expected: the reference's answer as text. found: what each completion answers, as text, or
    None. votes: equal numbers where found answers are equal, None where there is none. right: whether each is the
    reference's answer.
    """

    question: Question
    prompt: list[Message]
    expected: str
    completions: list[Completion]
    found: list[str | None]
    votes: list[int | None]
    right: list[bool]


def judge(
    question: Question,
    prompt: list[Message],
    completions: Sequence[Completion],
    reference: Any,
    checker: Checker,
) -> Judged:
    """Checks the answers to a question; reference: what the checker read of the question's answer."""
    found, votes, right = [], [], []
    kinds: list[tuple[Any, bool]] = []  # answers that differ, and whether they are right
    for completion in completions:
        answer = checker.found(completion.text)
        found.append(None if answer is None else checker.show(answer))
        if answer is None:
            votes.append(None)
            right.append(False)
            continue
        vote = next((i for i, (kind, _) in enumerate(kinds) if checker.same(kind, answer)), len(kinds))
        if vote == len(kinds):
            kinds.append((answer, bool(checker.same(reference, answer))))
        votes.append(vote)
        right.append(kinds[vote][1])
    return Judged(question, prompt, checker.show(reference), list(completions), found, votes, right)


@dataclasses.dataclass(frozen=True)
class Results:
    """Answers to all questions.

    judged: by question. ks: of pass@k and maj@k. checker, instruction: as they were chosen. seconds, new_tokens: what
    generating took in this run, without the answers that were there already.
    """

    judged: list[Judged]
    ks: list[int]
    checker: str
    instruction: str
    seconds: float = 0.0
    new_tokens: int = 0

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """accuracy, pass@k and maj@k, each a mean over questions."""
        n = len(self.judged[0].completions)
        values: dict[str, list[float]] = {"accuracy": [sum(one.right) / n for one in self.judged]}
        for k in self.ks:
            values[f"pass@{k}"] = [pass_at_k(n, sum(one.right), k) for one in self.judged]
        for k in self.ks:
            values[f"maj@{k}"] = [majority_at_k(one.votes, _right_votes(one), k) for one in self.judged]
        return {name: estimate(each, n) for name, each in values.items()}

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.metrics["accuracy"].value

    @property
    def shares(self) -> dict[str, float]:
        """answered: completions in which the checker found an answer; cut: those that max_new_tokens ended."""
        completions = [one for judged in self.judged for one in judged.completions]
        answered = sum(found is not None for judged in self.judged for found in judged.found)
        cut = sum(one.finish_reason == "length" for one in completions)
        return {"answered": answered / len(completions), "cut": cut / len(completions)}

    @property
    def mean_tokens(self) -> float:
        """Tokens of a completion."""
        return float(np.mean([one.tokens for judged in self.judged for one in judged.completions]))

    def samples(self) -> list[Sample]:
        """The completions as `jaxtune.rl.completions` shows and saves them."""
        return [
            Sample(
                row={},
                prompt=list(judged.prompt),
                completion=completion.text,
                prompt_ids=[],
                completion_ids=[],
                log_probs=None,
                own=[],
                ended=completion.finish_reason == "stop",
                rewards=np.asarray([right], np.float32),
                extra={
                    "question": judged.question.id,
                    "sample": completion.sample,
                    "expected": judged.expected,
                    "found": found,
                    "tokens": completion.tokens,
                    "finish_reason": completion.finish_reason,
                },
                advantage=math.nan,
            )
            for judged in self.judged
            for completion, found, right in zip(judged.completions, judged.found, judged.right, strict=True)
        ]

    def to_json(self) -> Mapping[str, Any]:
        """Metrics and counts as plain values; no number that JSON does not know."""
        metrics = {
            name: {key: None if math.isnan(value) else value for key, value in one._asdict().items()}
            for name, one in self.metrics.items()
        }
        return {
            "metrics": metrics,
            "completions": {
                "count": sum(len(judged.completions) for judged in self.judged),
                **self.shares,
                "mean_tokens": self.mean_tokens,
            },
            "checker": self.checker,
            "instruction": self.instruction,
            "this_run": {"seconds": self.seconds, "new_tokens": self.new_tokens},
        }


def _right_votes(judged: Judged) -> set[int]:
    return {
        vote for vote, right in zip(judged.votes, judged.right, strict=True) if right and vote is not None
    }
