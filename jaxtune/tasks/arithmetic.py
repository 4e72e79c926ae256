"""A task for reinforcement learning that needs no data: sums, answered by the number alone.

    "What is 17 + 5? Answer with the number only."    ->    "22"

A small model knows many of these sums but hides them in sentences; `correct` and `short` reward the number and its
form.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

SEED = 3407
_NUMBER = re.compile(r"-?\d+")


def make_rows(count: int, *, largest: int = 20, held_out: bool = False) -> list[dict[str, Any]]:
    """Rows of prompt (messages) and answer (text).

    Args:
        count: rows. largest: of the two numbers. held_out: from the fifth of all sums that training never sees.
    """
    rng = random.Random(SEED)
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    rng.shuffle(pairs)
    fifth = max(1, len(pairs) // 5)
    part = pairs[:fifth] if held_out else pairs[fifth:]
    rows = []
    for _ in range(count):
        a, b = rng.choice(part)
        question = f"What is {a} + {b}? Answer with the number only."
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(a + b)})
    return rows


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def correct(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is the answer, else 0."""
    return [
        float((_NUMBER.findall(_text(c)) or [""])[-1] == right)
        for c, right in zip(completions, answer, strict=True)
    ]


def short(completions: Sequence[Any], **_: Any) -> list[float]:
    """0.5 where a completion is a number and nothing else, else 0."""
    return [0.5 * bool(_NUMBER.fullmatch(_text(completion).strip())) for completion in completions]
