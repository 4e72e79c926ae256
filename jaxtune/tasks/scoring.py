"""How well a model does a task: its greedy answers, and the share of them that are right."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.generate import Engine

Message = dict[str, str]


def answers(
    model: Any,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[str]:
    """Greedy answers to conversations that end with a user's turn.

    Args:
        model: a `jaxtune.model.Model`.
        prompts: conversations of {"role", "content"} messages.
        max_new_tokens: tokens of an answer at most; it ends earlier at the end-of-turn token.
        batch_size: prompts generated together at most.

    Returns:
        One text for each prompt, without special tokens and surrounding space.
    """
    tokenizer = model.tokenizer
    ids = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    with Engine(model, max_sequences=batch_size) as engine:
        found = engine.generate(ids, max_new_tokens=max_new_tokens)
    return [text.strip() for text in found.texts(tokenizer)]


def accuracy(
    predictions: Sequence[str], expected: Sequence[str], is_right: Callable[[str, str], bool]
) -> float:
    """Share of predictions that `is_right(prediction, expected)` accepts, 0 to 1."""
    return sum(map(is_right, predictions, expected)) / len(expected)
